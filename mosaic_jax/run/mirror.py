"""A run directory whose copy an object store keeps.

The run works in a local folder, where locks, renames and appended files are what they
are. What it needs to go on elsewhere is fetched at the start, and sent whenever a
checkpoint or a stage is whole: seals after what they seal, removals last. So whenever
the machine vanishes, what the store has is a state that resumes.

Of several processes each has a folder of its own. All fetch everything, each sends the
parts of checkpoints that it wrote, and the first everything else.
"""

import contextlib
import fcntl
import hashlib
import logging
import pathlib
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping

from mosaic_jax.core import errors, files
from mosaic_jax.run import (
    checkpoint,
    config_file,
    environment,
    lease,
    object_store,
    peers,
    processes,
    store,
)
from mosaic_jax.run.object_store import ObjectStore
from mosaic_jax.run.stopwatch import Stopwatch

_log = logging.getLogger(__name__)

# What is never sent: locks, and files and folders that are not whole yet.
_ASIDE = re.compile(
    r"(^|/)(\.lock|\.shared|[^/]*\.partial|[^/]*orbax-checkpoint-tmp[^/]*)(/|$)"
)
# The part of a checkpoint that another process than the first wrote.
_PART = re.compile(r"(?P<folder>.*/)part_(?P<number>\d+)/(?P<step>\d+)\.npz")
# Files by when they are sent: of a stage, its seals from the inside out, records.
_SEALS = {checkpoint.SEAL: 1, store.RECORD: 2}
_RECORDS = 3

# Size in bytes and time of change: a file that was sent and is as it was has the same.
Stamp = list[int]


class Mirror:
    """A local folder and the store that keeps a copy of it.

    Attributes:
      url: of the copy.
      folder: run directory of this process.
      base: what lies around it, of this process alone.
    """

    def __init__(self, copy: ObjectStore, base: pathlib.Path) -> None:
        """Remember what was sent from here before; the store is not asked yet.

        Args:
          copy: the store.
          base: a folder for the run directory and what is known of it; it is created.
        """
        self.url, self.base, self.folder = copy.url, base, base / _name(copy.url)
        self._store, self._lease = copy, lease.Lease(copy)
        base.mkdir(parents=True, exist_ok=True)
        self._identity = _identity(base)
        # It is there as long as the folder is whole.
        self._known_by = base / "sent.json"
        # Names that the store has, as far as the first process knows, and how many
        # files were sent so far.
        self._there, self._count = set[str](), 0
        try:
            self._sent: dict[str, Stamp] = files.read_json(self._known_by)["sent"]
        except (errors.CheckpointError, KeyError):
            self._forget()

    def begin(self) -> None:
        """Take the lease, and make the folder what the store has.

        If nothing was sent since but from this folder, it is at least as far: then the
        store is brought up to date instead. All processes must call this.

        Raises:
          ConfigError: another process works there, or it is no run directory.
          StoreError: the store cannot be reached.
        """
        is_latest = False
        if environment.is_primary():
            last = self._lease.last(self._identity)
            sizes = self._store.sizes()
            _check_kind(self.url, sizes, is_known=bool(last))
            is_whole = self._known_by.exists() and self.folder.is_dir()
            is_latest = is_whole and last == self._identity
            if not is_latest:
                self._forget()
            self._lease.take(self._identity)
            self._there = set(sizes) - {lease.NAME}
            if is_latest:
                sent = self._sent.items()
                self._sent = {n: stamp for n, stamp in sent if sizes.get(n) == stamp[0]}
                self._send([0])
                self._seal()
        processes.exchange("the store is up to date")
        if processes.several() or not is_latest:
            self._fetch()
        _log.info("%s is a copy of %s", self.url, self.folder)

    def saved(self) -> None:
        """Send what is new; all processes call this, once files of the run are whole.

        Where the store cannot be reached a warning says so, and the next call sends it.

        Raises:
          StoreError: another process has taken the run over.
        """
        if problem := self._sent_together():
            _log.warning("%s: tried again at the next checkpoint", problem)

    def end(self) -> None:
        """Send what is new, as by `saved`, at the end of a run.

        Raises:
          StoreError: it cannot be sent.
        """
        if problem := self._sent_together():
            raise errors.StoreError(
                f"{problem}: what is missing there lies in {self.folder}: the same"
                " command, started again on this machine, sends it"
            )

    def stop(self, *, together: bool) -> None:
        """Send what is new where a run ends early; a problem is only logged.

        Args:
          together: whether all processes call this; else records alone are sent, which
            no other process has to wait for.
        """
        if self._lease.lost:
            return
        try:
            if together:
                self.end()
            elif environment.is_primary():
                self._send([_RECORDS])
        except errors.StoreError as error:
            _log.warning("%s", error)

    def leave(self) -> None:
        """End holding the lease, so that another machine may go on at once."""
        with contextlib.suppress(errors.StoreError):
            self._lease.release()

    def _sent_together(self) -> str:
        """Send what is new; returns why that was not possible, "" if it was."""
        begin, count = time.monotonic(), self._count
        with Stopwatch.waits():
            problem = self._tried(self._data)
            # What the first process sent it knows by itself.
            parts = [] if environment.is_primary() else list(self._own())
            problems = processes.exchange([problem, parts])
            if self._lease.lost:
                raise errors.StoreError(f"{self._lease.lost}: this run ends")
            problem = next((told for told, _ in problems if told), "")
            if environment.is_primary() and not problem:
                for _, names in problems:
                    self._there |= set(names)
                problem = self._tried(self._seal)
        if self._count > count:
            told = self._count - count, self.url, time.monotonic() - begin
            _log.info("sent %d files to %s in %.1f s", *told)
        return problem

    def _tried(self, send: Callable[[], None]) -> str:
        try:
            send()
        except errors.StoreError as error:
            return str(error)
        return ""

    def _data(self) -> None:
        """Send what seals are about."""
        if environment.is_primary():
            self._lease.check()
        if not self._lease.lost:
            self._send([0])

    def _seal(self) -> None:
        """Send seals and records once what they are about is there, and tidy up."""
        self._send(range(1, _RECORDS + 1))
        gone = {name for name in self._there if not self._is_kept(name)}
        if gone:
            self._store.remove(gone)
            self._there -= gone
            self._sent = {n: stamp for n, stamp in self._sent.items() if n not in gone}
        self._remember()

    def _send(self, ranks: Collection[int]) -> None:
        """Send new and changed files of these ranks, one rank after the other."""
        changed = {
            name: stamp
            for name, stamp in self._own().items()
            if self._sent.get(name) != stamp
        }
        for rank in ranks:
            found = {n: stamp for n, stamp in changed.items() if _rank(n) == rank}
            if found:
                self._store.put(found, self.folder)
                self._sent |= found
                self._there |= set(found)
                self._count += len(found)

    def _own(self) -> dict[str, Stamp]:
        """The files that this process sends: its parts; the first, everything else."""
        me, count = peers.index(), peers.count()
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if _ASIDE.search(name):
                continue
            part = _PART.fullmatch(name)
            number = int(part["number"]) if part else 0
            # Parts of an earlier start with more processes go with the rest.
            mine = number == me if number < count else me == 0
            if mine and (me or self._is_kept(name)):
                with contextlib.suppress(FileNotFoundError):  # a tracker may remove it
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        found[name] = [status.st_size, status.st_mtime_ns]
        return found

    def _is_kept(self, name: str) -> bool:
        """Whether the first process has a file, or the checkpoint of a part.

        Stages alone have files that pass: what else is in the store stays there.
        """
        if part := _PART.fullmatch(name):
            return (self.folder / part["folder"] / part["step"]).is_dir()
        return not _is_of_stage(name) or (self.folder / name).exists()

    def _fetch(self) -> None:
        """Make the folder what the store has; it is never there in part."""
        begin = time.monotonic()
        sizes = self._store.sizes()
        names = [name for name in sizes if not _ASIDE.search(name)]
        self._forget()
        fresh = self.base / "fetched.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        self._store.get(names, fresh)
        shutil.rmtree(self.folder, ignore_errors=True)
        fresh.rename(self.folder)
        self._there = set(sizes) - {lease.NAME}
        self._sent = self._own()
        self._remember()
        if names:
            size, seconds = sum(sizes[name] for name in names), time.monotonic() - begin
            told = len(names), size / 1e6, self.url, seconds
            _log.info("fetched %d files, %.1f MB, from %s in %.1f s", *told)

    def _remember(self) -> None:
        files.write_json(self._known_by, {"sent": self._sent}, indent=None)

    def _forget(self) -> None:
        """What the folder has counts no more."""
        self._known_by.unlink(missing_ok=True)
        self._sent = {}


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[tuple[pathlib.Path, Mirror | None]]:
    """The folder that a run works in, and what keeps its copy, where that is asked for.

    Args:
      workdir: a folder, or the URL of the copy; then all processes must call this.

    Raises:
      ConfigError: another process works there, it is no run directory, or the scheme of
        the URL is unknown or needs a package.
      StoreError: the store cannot be reached; at the end, what is new cannot be sent.
    """
    if not files.is_url(workdir):
        yield pathlib.Path(workdir), None
        return
    copy = object_store.connect(f"--workdir = {workdir}", workdir)
    mirror = Mirror(copy, _cache_of(workdir) / str(peers.index()))
    with environment.locked(mirror.base, workdir), contextlib.ExitStack() as held:
        held.callback(mirror.leave)
        mirror.begin()
        try:
            yield mirror.folder, mirror
        except errors.Interrupted:  # all processes stop, after the same step
            mirror.stop(together=True)
            raise
        except BaseException:
            mirror.stop(together=not processes.several())
            raise
        mirror.end()


def finished_stages(told: str, url: str, *, needed: bool = True) -> pathlib.Path:
    """A local copy of the finished stages below a URL, with the run's summary.

    Args:
      told: how messages begin, such as "--reuse_from = URL".
      url: of a run directory, which others may be working in.
      needed: whether it is an error if there is none.

    Raises:
      ConfigError: there is none, or the scheme is unknown or needs a package.
      StoreError: the store cannot be reached.
    """
    copy = object_store.connect(told, url)
    base = _cache_of(url) / "read"
    base.mkdir(parents=True, exist_ok=True)
    folder, fresh = base / _name(url), base / "fetched.partial"
    with (base / ".lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        sizes = copy.sizes()
        records = {name for name in sizes if name.endswith(f"/{store.RECORD}")}
        if needed and not records:
            raise errors.ConfigError(f"{told}: no finished stage is there")
        summaries = {name for name in sizes if name.endswith("summary.json")}
        shutil.rmtree(fresh, ignore_errors=True)
        copy.get(records | summaries, fresh)
        changed = {
            name.removesuffix(store.RECORD)
            for name in records
            if _content(folder / name) != _content(fresh / name)
        }
        stages = {name for name in sizes if _is_finished(name, changed)}
        copy.get(stages - records, fresh)
        for name in changed:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in sorted(stages | summaries, key=_rank):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).replace(folder / name)
    return folder


def _is_finished(name: str, stages: Collection[str]) -> bool:
    """Whether a file is of one of the finished stages, given by "FOLDER/"."""
    stage = next((stage for stage in stages if name.startswith(stage)), None)
    if stage is None:
        return False
    inside = name.removeprefix(stage).partition("/")[0]
    return inside not in (store.CHECKPOINTS, store.TIMES)


def _content(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _rank(name: str) -> int:
    """When a file is sent, from 0 on."""
    last = pathlib.PurePosixPath(name).name
    return _SEALS.get(last, 0) if _is_of_stage(name) else _RECORDS


def _is_of_stage(name: str) -> bool:
    return "stages" in pathlib.PurePosixPath(name).parts


def _check_kind(url: str, sizes: Mapping[str, int], *, is_known: bool) -> None:
    """Check that a place is empty, or a run directory: all of it is fetched.

    Raises:
      ConfigError: it is something else.
    """
    names = {pathlib.PurePosixPath(name).name for name in sizes}
    if names and not is_known and config_file.NAME not in names:
        raise errors.ConfigError(
            f"--workdir = {url}: holds something else, such as"
            f" {min(sizes)}: must be a new place or a run directory"
        )


def _identity(base: pathlib.Path) -> str:
    """What this folder, of this machine, is called in leases."""
    path = base / "identity"
    if not path.exists():
        files.write_bytes(path, uuid.uuid4().hex.encode())
    return path.read_text()


def _cache_of(url: str) -> pathlib.Path:
    """The folder of this user for what is known of a URL."""
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return files.cache() / "stores" / digest


def _name(url: str) -> str:
    """What the run directory at a URL is called, as reports show it."""
    return pathlib.PurePosixPath(url.partition("://")[2]).name or "run"
