"""A run directory whose copy an object store keeps: what is there, whatever happens."""

import json
import shutil
import time

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mosaic_jax.core import errors, files
from mosaic_jax.run import (
    checkpoint,
    environment,
    lease,
    mirror,
    object_store,
    peers,
    processes,
    store,
)
from tests.run.test_store import saved as finished

URL = "memory://bucket/run"
LOOP = "stages/init/abc/checkpoints/round"


@pytest.fixture(autouse=True)
def empty():
    """No object is there, before and after."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name)`: from here on files are kept on the machine of that name."""

    def start(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return mirror.opened(URL)

    return start


def there(url=URL):
    """Content of every object but the lease, by name."""
    filesystem = fsspec.filesystem("memory")
    root = filesystem._strip_protocol(url)
    return {
        path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in names(url)
    }


def names(url=URL):
    return fsspec.filesystem("memory").find(url)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder, *steps):
    """Checkpoints of these steps, and records."""
    files.write_json(folder / "config.json", {"settings": {}})
    loop = checkpoint.Checkpoints(folder / LOOP, {"stage": "init"})
    for step in steps:
        loop.save(step, state(step), {"step": step})
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\n")
    loop.close()


def state(step):
    return {"w": np.full(3, float(step), np.float32), "n": np.arange(step)}


def latest(folder):
    """The step of the newest checkpoint, which is as it was saved."""
    loop = checkpoint.Checkpoints(folder / LOOP, {"stage": "init"})
    found = loop.latest()
    loop.close()
    if found is None:
        return None
    step, arrays, notes = found
    for name, array in state(step).items():
        np.testing.assert_array_equal(arrays[name], array)
    assert notes == {"step": step}
    return step


class Vanished(BaseException):
    """The machine is gone: nothing is done any more."""


def vanish(monkeypatch):
    """From here on this process sends nothing, and releases nothing."""
    for name in ("put", "remove", "write"):
        monkeypatch.setattr(object_store.ObjectStore, name, lambda *_: None)


def is_down(monkeypatch):
    """From here on the store cannot be reached."""

    def refuse(*_, **__):
        raise ConnectionError("no route to host\nand much more")

    for name in ("put", "rm", "cat_file", "pipe_file", "find", "get"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)


def test_a_folder_is_a_folder(tmp_path):
    with mirror.opened(str(tmp_path / "run")) as (folder, copy):
        assert folder == tmp_path / "run" and copy is None
    assert not names()


def test_another_machine_goes_on_with_all_that_was_sent(machine, caplog):
    caplog.set_level("INFO", "mosaic_jax")
    with machine("one") as (folder, copy):
        assert content(folder) == {}
        write(folder, 2, 4)
        copy.saved()
        write(folder, 6)
        (folder / "report.html").write_text("drawn")
        (folder / ".lock").write_text("mine")
        (folder / "half.partial").write_text("ha")
    expected = content(folder)
    assert len(list(folder.glob(f"{LOOP}/[0-9]*"))) == 2
    with machine("two") as (other, _):
        assert other != folder and other.name == "run"
        del expected[".lock"], expected["half.partial"]
        assert content(other) == expected
        assert latest(other) == 6
    # The folder, in one line.
    assert f"{URL} is a copy of {folder}" in caplog.text
    assert f"files to {URL} in 0." in caplog.text


def test_what_stages_had_is_removed_and_nothing_else(machine):
    with machine("one") as (folder, copy):
        write(folder, 2)
        (folder / "note.txt").write_text("kept")
        copy.saved()
        shutil.rmtree(folder / "stages/init/abc/checkpoints")
        (folder / "note.txt").unlink()
    assert there().keys() == {".lock", "config.json", "metrics.jsonl", "note.txt"}


def test_nothing_is_sent_twice(machine, monkeypatch):
    sent = []
    put = object_store.ObjectStore.put
    monkeypatch.setattr(
        object_store.ObjectStore,
        "put",
        lambda self, names, folder: (sent.extend(names), put(self, names, folder)),
    )
    with machine("one") as (folder, copy):
        write(folder, 2)
        copy.saved()
        first = sent.copy()
        copy.saved()
        assert sent == first and len(set(sent)) == len(sent)
        (folder / "config.json").write_text("{}")
    with machine("one"):
        pass
    assert sent == [*first, "config.json"]


def test_seals_come_after_what_they_seal_and_removals_last(machine, monkeypatch):
    done = []
    put, remove = MemoryFileSystem.put_file, object_store.ObjectStore.remove

    def watched(self, lpath, rpath, **given):
        done.append(rpath.removeprefix("/bucket/run/"))
        put(self, lpath, rpath, **given)

    def watched_removal(self, gone):
        done.append("removed")
        remove(self, gone)

    monkeypatch.setattr(MemoryFileSystem, "put_file", watched)
    monkeypatch.setattr(object_store.ObjectStore, "remove", watched_removal)
    with machine("one") as (folder, copy):
        finished(folder, 3)
        write(folder, 2, 4)
        copy.saved()
        write(folder, 6)
    first = done[: done.index("metrics.jsonl") + 1]
    second = done[len(first) :]
    for sent in (first, second):
        kinds = [name.rpartition("/")[2] for name in sent]
        seals = [i for i, kind in enumerate(kinds) if kind == "seal.json"]
        data = [i for i, name in enumerate(sent) if "/default/" in name]
        assert seals and data and max(data) < min(seals)
        if "done.json" in kinds:
            assert max(seals) < kinds.index("done.json") < kinds.index("metrics.jsonl")
    assert "done.json" in {name.rpartition("/")[2] for name in first}
    assert second[-1] == "removed" and second.count("removed") == 1


def test_whenever_the_machine_vanishes_the_store_resumes(machine, monkeypatch):
    """After each object that arrives or goes: the newest checkpoint, or that before."""
    moments, sealed = [], 2
    put, remove = MemoryFileSystem.put_file, MemoryFileSystem._rm

    def watched(self, lpath, rpath, **given):
        nonlocal sealed
        put(self, lpath, rpath, **given)
        if rpath.endswith("seal.json"):
            sealed = int(rpath.split("/")[-2])
        moments.append((sealed, there()))

    def watched_removal(self, path):
        remove(self, path)
        moments.append((sealed, there()))

    with monkeypatch.context() as patch, machine("one") as (folder, copy):
        write(folder, 2)
        copy.saved()
        patch.setattr(MemoryFileSystem, "put_file", watched)
        patch.setattr(MemoryFileSystem, "_rm", watched_removal)
        for step in (4, 6):
            write(folder, step)
            copy.saved()
    assert len(moments) > 20 and sealed == 6
    for number, (step, objects) in enumerate(moments):
        MemoryFileSystem.store.clear()
        held = json.loads(objects.pop(".lock")) | {"released": True}
        objects[".lock"] = json.dumps(held).encode()
        for name, data in objects.items():
            fsspec.filesystem("memory").pipe_file(f"{URL}/{name}", data)
        with machine(f"moment {number}") as (folder, _):
            assert latest(folder) == step, number


def test_a_seal_waits_for_the_parts_of_all_processes(machine, monkeypatch, caplog):
    """The other process, of two, cannot send its part at first."""
    part = f"{LOOP}/part_1/2.npz"
    filesystem = fsspec.filesystem("memory")
    with monkeypatch.context() as patch, machine("one") as (folder, copy):
        write(folder, 2)
        told = ["memory://bucket/run: no route to host", []]
        patch.setattr(processes, "exchange", lambda mine: [mine, told])
        patch.setattr(peers, "count", lambda: 2)
        copy.saved()
        assert "no route to host: tried again" in caplog.text
        assert any(LOOP in name for name in names())
        assert not any(name.endswith("seal.json") for name in names())
        filesystem.pipe_file(f"{URL}/{part}", b"theirs")
        told[:] = ["", [part]]
        copy.saved()
        assert {part, f"{LOOP}/2/seal.json"} <= there().keys()
        # It goes with the last of its checkpoint.
        shutil.rmtree(folder / LOOP / "2")
        copy.saved()
        assert not any(LOOP in name for name in names())


def test_each_process_sends_its_own_part(machine, monkeypatch):
    with machine("one") as (folder, copy):
        write(folder, 2)
        for number in (1, 2):
            path = folder / LOOP / f"part_{number}" / "2.npz"
            path.parent.mkdir()
            path.write_bytes(b"part")
        monkeypatch.setattr(peers, "count", lambda: 3)
        copy.saved()
        assert not any("part" in name for name in names())
        with monkeypatch.context() as patch:
            patch.setattr(peers, "index", lambda: 2)
            patch.setattr(environment, "is_primary", lambda: False)
            (folder / "config.json").write_text("of another")
            before = there()
            copy.saved()
            assert there().keys() - before.keys() == {f"{LOOP}/part_2/2.npz"}
            assert there()["config.json"] == before["config.json"]


def test_a_truncated_object_is_noticed(machine):
    with machine("one") as (folder, _):
        write(folder, 2, 4)
    (name,) = [one for one in names() if "/4/" in one and one.endswith("/_METADATA")]
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file(name, filesystem.cat_file(name)[:-9])
    with machine("two") as (folder, _):
        assert latest(folder) == 2
    # Nor is it there any more.
    assert not any("/4/" in one for one in names())


def test_a_store_that_is_down_for_a_while(machine, monkeypatch, caplog):
    with machine("one") as (folder, copy):
        write(folder, 2)
        copy.saved()
        before = there()
        with monkeypatch.context() as patch:
            is_down(patch)
            write(folder, 4, 6)
            copy.saved()
            (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
            assert record.getMessage() == (
                f"{URL}: ConnectionError: no route to host: tried again at the next"
                " checkpoint"
            )
        assert there() == before
        copy.saved()
        assert latest(folder) == 6
    with machine("two") as (other, _):
        assert content(other) == content(folder)


def test_a_store_that_is_down_at_the_end(machine, monkeypatch):
    """One line; this machine has what is missing there, another one goes on without."""
    with monkeypatch.context() as patch:
        with pytest.raises(errors.StoreError) as error:
            with machine("one") as (folder, copy):
                write(folder, 2)
                copy.saved()
                write(folder, 4)
                is_down(patch)
        assert "\n" not in str(error.value)
        assert f"lies in {folder}: the same command" in str(error.value)
    with machine("one") as (folder, copy):
        assert latest(folder) == 4
        # It is there before any work.
        assert any("/4/" in name for name in names())


def test_an_error_is_not_hidden_by_a_store_that_is_down(machine, monkeypatch, caplog):
    with pytest.raises(errors.DivergedError), machine("one") as (folder, copy):
        write(folder, 2)
        copy.saved()
        (folder / "progress.json").write_text("failed")
        is_down(monkeypatch)
        raise errors.DivergedError("not finite")
    assert "no route to host" in caplog.text


@pytest.mark.parametrize("kind", [errors.DivergedError, errors.Interrupted])
def test_what_a_run_leaves_early_is_sent(machine, kind):
    with pytest.raises(kind), machine("one") as (folder, _):
        write(folder, 2)
        raise kind(15)
    with machine("two") as (other, _):
        assert content(other) == content(folder)


def test_a_killed_process_goes_on_at_once_on_its_machine(machine, monkeypatch):
    """Its folder is further than the store: that is what is used, and sent."""
    with monkeypatch.context() as patch:
        with pytest.raises(Vanished), machine("one") as (folder, copy):
            write(folder, 2)
            copy.saved()
            write(folder, 4)
            vanish(patch)
            raise Vanished
    assert not any("/4/" in name for name in names())
    with machine("one") as (folder, _):
        assert latest(folder) == 4
        assert any("/4/" in name for name in names())


def test_a_process_killed_while_it_fetches_begins_again_at_once(machine, monkeypatch):
    with machine("one") as (folder, _):
        write(folder, 2)
    with monkeypatch.context() as patch:

        def cut_off(self, names, folder):
            (folder / "stages").mkdir(parents=True)
            vanish(patch)
            raise Vanished

        patch.setattr(object_store.ObjectStore, "get", cut_off)
        with pytest.raises(Vanished), machine("two"):
            pass
    before = there()
    assert not json.loads(before[".lock"])["released"]
    with machine("two") as (folder, _):
        assert latest(folder) == 2
    assert there().keys() == before.keys()


def test_a_folder_that_others_have_overtaken_is_dropped(machine, monkeypatch):
    with monkeypatch.context() as patch:
        with pytest.raises(Vanished), machine("one") as (folder, copy):
            write(folder, 2)
            copy.saved()
            write(folder, 3)
            vanish(patch)
            raise Vanished
    monkeypatch.setattr(lease, "OLD", 0.0)
    with machine("two") as (other, _):
        assert latest(other) == 2
        write(other, 5)
    with machine("one") as (folder, _):
        assert content(folder) == content(other)
        assert latest(folder) == 5


def test_one_machine_at_a_time(machine):
    with machine("one") as (folder, _):
        write(folder, 2)
        with pytest.raises(errors.ConfigError) as error, machine("two"):
            pass
        told = str(error.value)
        assert told.startswith(f"--workdir = {URL}: in use by process ")
        assert " on " in told and "which was there 0 s ago" in told
        # On the same machine the kernel knows better.
        with pytest.raises(errors.ConfigError, match=f"{URL}: in use by process"):
            with machine("one"):
                pass
    with machine("two"):
        pass


def test_who_was_silent_too_long_is_told_and_sends_nothing(machine, monkeypatch):
    with pytest.raises(errors.StoreError) as error, machine("one") as (folder, copy):
        write(folder, 2)
        copy.saved()
        with monkeypatch.context() as patch:
            patch.setattr(lease, "OLD", 0.0)
            with machine("two") as (other, _):
                write(other, 4)
        before = there()
        write(folder, 3)
        copy.saved()
    assert "has taken memory://bucket/run over: this run ends" in str(error.value)
    assert there() == before


def test_a_lease_is_renewed_while_its_process_lives(machine, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_EVERY", 0.01)
    with machine("one"):
        first = json.loads(there()[".lock"])
        latest = time.monotonic() + 10
        while json.loads(there()[".lock"])["time"] == first["time"]:
            assert time.monotonic() < latest
            time.sleep(0.01)
        assert not json.loads(there()[".lock"])["released"]
    assert json.loads(there()[".lock"])["released"]


def test_a_copied_run_directory_is_gone_on_with(machine, tmp_path):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", 2)
    (tmp_path / "run" / ".lock").write_text("123 on host")
    filesystem = fsspec.filesystem("memory")
    for name, data in content(tmp_path / "run").items():
        filesystem.pipe_file(f"{URL}/{name}", data)
    with machine("one") as (folder, _):
        assert latest(folder) == 2


def test_what_is_no_run_directory_is_left_alone(machine):
    fsspec.filesystem("memory").pipe_file(f"{URL}/photo.png", b"mine")
    with pytest.raises(errors.ConfigError, match="something else, such as photo.png"):
        with machine("one"):
            pass
    assert there() == {"photo.png": b"mine"}


def test_names_lead_nowhere_else(machine, monkeypatch):
    found = {"/bucket/run/../../x": {"size": 1}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: found)
    with pytest.raises(errors.StoreError, match="no name of a file"), machine("one"):
        pass


def test_finished_stages_are_fetched_and_nothing_else(machine):
    with machine("one") as (folder, _):
        directory = finished(folder, 3)
        (directory / "time.json").write_text("{}")
        write(folder, 2)
        (folder / "summary.json").write_text("{}")
    found = mirror.finished_stages(URL, URL)
    assert found != folder
    assert {path for path in content(found) if "stages" not in path} == {"summary.json"}
    stage = store.directory_of(found, "init", directory.name)
    assert content(stage) == {
        name: data for name, data in content(directory).items() if name != "time.json"
    }
    assert {path.name for path in (found / "stages").glob("*/*")} == {directory.name}
    # What is there is not fetched again, what has changed is.
    with machine("one") as (folder, _):
        shutil.rmtree(directory)
        finished(folder, 4)
    found = mirror.finished_stages(URL, URL)
    assert content(stage) == content(directory)


def test_no_finished_stage(machine):
    machine("one")
    with pytest.raises(errors.ConfigError, match=f"{URL}: no finished stage"):
        mirror.finished_stages(URL, URL)
    assert mirror.finished_stages(URL, URL, needed=False).name == "run"
