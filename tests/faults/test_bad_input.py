"""Generated settings, splits and data files: a valid run, or one line and code 2.

The short form draws a few of each; `-m slow` draws 2,000 cases and runs some studies.
"""

import contextlib
import copy
import dataclasses
import gzip
import io
import pathlib
import tarfile
import tempfile
import warnings
import zipfile

import flax.traverse_util
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mosaic_jax import server
from mosaic_jax.cli import launch
from mosaic_jax.core import errors
from mosaic_jax.data import federated, formats, partition, sources
from mosaic_jax.data.dataset import Arrays, Info
from mosaic_jax.fl import algorithms
from mosaic_jax.nn import meta, networks, norm
from mosaic_jax.run import runner
from tests import images, tiny

FLAT = flax.traverse_util.flatten_dict(tiny.config().to_dict(), sep=".")
# Where the cache goes: a random one would litter the disk.
FIELDS = sorted(set(FLAT) - {"data.dir"})
WORDS = sorted(
    {value for value in FLAT.values() if isinstance(value, str)}
    | {*networks.NETWORKS, *partition.MODES, *norm.NORMS, *meta.HEADS}
    | {*algorithms.ALGORITHMS, *server.METHODS, "none", "auto", "\0", "init"}
)


def cases(count):
    """As many of a property; those of the short form are the same each time."""
    return hypothesis_settings(
        max_examples=count,
        derandomize=count < 100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def short_and_long(few, many):
    """Two tests of a check that takes the drawn case, for `few` and `many` cases."""

    def decorate(strategy):
        def make(check):
            def test_short():
                cases(few)(given(strategy)(check))()

            def test_long():
                cases(many)(given(strategy)(check))()

            return test_short, pytest.mark.slow(test_long)

        return make

    return decorate


# --- settings


def values():
    return st.one_of(
        st.integers(-3, 40),
        st.integers(),
        st.floats(),
        st.floats(0, 2),
        st.text(max_size=8),
        st.sampled_from(WORDS),
        st.booleans(),
        st.none(),
        st.lists(st.floats(0, 1), max_size=3).map(tuple),
        st.just({}),
    )


def own_type(name):
    """Values of the field's type, from likely to absurd."""
    value = FLAT[name]
    kinds = {
        bool: st.booleans(),
        int: st.one_of(st.integers(-3, 40), st.integers()),
        float: st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats()),
        str: st.one_of(st.sampled_from(WORDS), st.text(max_size=8)),
        tuple: st.lists(st.one_of(st.floats(0, 1), st.sampled_from(WORDS)), max_size=3),
    }
    return kinds[type(value)].map(type(value))


def pairs(value_of):
    return st.sampled_from(FIELDS).flatmap(
        lambda name: st.tuples(st.just(name), value_of(name))
    )


NOTHING = {"unknown": st.just({}), "drop": st.just([])}
CHANGES = st.one_of(
    st.fixed_dictionaries(
        {"set": st.lists(pairs(own_type), min_size=1, max_size=4).map(dict), **NOTHING}
    ),
    st.fixed_dictionaries(
        {"set": st.lists(pairs(lambda _: values()), max_size=3).map(dict), **NOTHING}
    ),
    st.fixed_dictionaries(
        {
            "set": st.just({}),
            "unknown": st.dictionaries(
                st.text(min_size=1, max_size=6), st.integers(), max_size=1
            ),
            "drop": st.lists(st.sampled_from(FIELDS), max_size=1),
        }
    ),
)


def changed(changes):
    flat = copy.deepcopy(FLAT) | changes["set"]
    flat |= {f"data.{name}": value for name, value in changes["unknown"].items()}
    for name in changes["drop"]:
        flat.pop(name)
    tree = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".") if name in FLAT else ["data", name[5:]]
        here = tree
        for group in groups:
            here = here.setdefault(group, {})
        here[leaf] = value
    return tree


class Valid(Exception):
    """Everything is checked; work would begin."""


@contextlib.contextmanager
def stopping_before_work():
    def begin(works):
        raise Valid

    whole, runner.run_together = runner.run_together, begin
    try:
        yield
    finally:
        runner.run_together = whole


def told(call):
    """Exit code of `call`, whose lines on stderr must be errors of one line each."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        code = call()
    lines = output.getvalue().splitlines()
    if code == 2:
        lines = [line for line in lines if not line[:1].isdigit()]  # log lines
        assert lines, "code 2 and not a word"
        assert all(line.startswith("error: ") for line in lines), lines
        assert all(len(line) < 500 for line in lines), lines
    return code


def check_settings(changes):
    with tempfile.TemporaryDirectory() as folder, stopping_before_work():
        mapping = changed(changes)
        mapping["data"]["dir"] = str(CACHE)
        workdir = pathlib.Path(folder) / "run"
        try:
            code = told(lambda: launch.run(mapping, workdir))
        except Valid:
            return
        assert code == 2
        # Nothing is begun.
        assert not list(workdir.rglob("*.json"))


CACHE = pathlib.Path(tempfile.gettempdir()) / "mosaic_jax_test_data"
test_settings, test_settings_long = short_and_long(15, 1000)(CHANGES)(check_settings)


def plausible(name):
    """What a user might well set a field to."""
    kinds = {
        bool: st.booleans(),
        int: st.integers(0, 12),
        float: st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]),
        str: st.sampled_from(WORDS),
        tuple: st.just(FLAT[name]),
    }
    return kinds[type(FLAT[name])]


@pytest.mark.slow
def test_studies_that_pass_the_checks_run(tmp_path):
    ran = []

    @cases(100)
    @given(st.lists(pairs(plausible), min_size=1, max_size=3))
    def check(changes):
        if len(ran) >= 25:
            return
        mapping = changed({"set": dict(changes), "unknown": {}, "drop": []})
        mapping["data"]["dir"] = str(CACHE)
        with stopping_before_work():
            try:
                told(lambda: launch.run(mapping, tmp_path / "checked"))
                return
            except Valid:
                pass
        workdir = tmp_path / str(len(ran))
        ran.append(changes)
        code = told(lambda: launch.run(mapping, workdir))
        assert code in (0, 2), changes
        if code == 0:
            assert (workdir / "report.html").exists() or mapping["seeds"] > 1

    check()
    assert len(ran) == 25


# --- splits

SPLIT = st.fixed_dictionaries(
    {
        "label": st.lists(st.integers(0, 6), min_size=1, max_size=200),
        "mode": st.sampled_from(sorted(partition.MODES)),
        "num_clients": st.integers(1, 250),
        "alpha": st.floats(1e-4, 1e4),
        "validation": st.sampled_from([0.0, 0.3, 0.9]),
        "max_images": st.integers(0, 50),
        "seed": st.integers(0, 2**31 - 1),
    }
)


def check_split(case):
    label = np.array(case["label"], np.int32)
    image = np.zeros((len(label), 16, 16, 1), np.uint8)
    info = Info(7, 16, 1, (0.5,), (0.5,), "none")
    config = dataclasses.replace(
        tiny.study().data,
        split=case["mode"],
        num_clients=case["num_clients"],
        alpha=case["alpha"],
        validation=case["validation"],
        max_images=case["max_images"],
    )
    try:
        data = federated.build(
            config,
            case["seed"],
            info,
            Arrays(image, label, image, label, np.arange(len(label)) // 4),
        )
    except errors.DataError as error:
        assert "\n" not in str(error)
        return
    assert len(data.parts) == config.num_clients
    held = np.concatenate(data.parts)
    assert len(set(held)) == len(held)
    assert min(map(len, data.parts)) >= 1
    assert (data.label_count.sum(1) == data.clients.client.size).all()


test_splits, test_splits_long = short_and_long(60, 500)(SPLIT)(check_split)


def check_split_file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"split.{content[0]}"
        path.write_bytes(content[1])
        with contextlib.suppress(errors.DataError):
            parts = partition.read(path, num_images=5, num_clients=2)
            assert sorted(np.concatenate(parts)) == sorted(set(np.concatenate(parts)))


SPLIT_FILE = st.tuples(
    st.sampled_from(["json", "csv"]),
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=3)),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=8,
        ).map(lambda clients: str({"clients": clients}).replace("'", '"').encode()),
        st.lists(st.text("01,9-a ", max_size=6), max_size=5).map(
            lambda rows: "\n".join(["client,index", *rows]).encode()
        ),
    ),
)
test_split_files, test_split_files_long = short_and_long(60, 100)(SPLIT_FILE)(
    check_split_file
)


# --- data files


def cifar(folder):
    images.cifar_archive(folder / "cifar-10-binary.tar.gz")


def tiny_imagenet(folder):
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        for name, content in images.tiny_imagenet_files().items():
            archive.writestr(name, content)


def food101(folder):
    with tarfile.open(folder / "food-101.tar.gz", "w:gz") as archive:
        for name, content in images.food101_files().items():
            images.add(archive, name, content)


def own(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(5):
            (folder / name / f"{i}.png").write_bytes(images.png(9 * i, 16, "L"))


def npz(folder):
    image = np.zeros((12, 16, 16, 3), np.uint8)
    np.savez(folder / "mine.npz", x_train=image, y_train=np.arange(12) % 3)


FORMATS = {
    "cifar10": cifar,
    "tiny_imagenet": tiny_imagenet,
    "food101": food101,
    "folder": own,
    "npz": npz,
}
BYTES = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.integers(1, 99)),
    st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 200)),
)


def damaged(content, kind, place, amount):
    at = int(place * max(len(content) - 1, 0))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ amount]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + b"\xff" * amount + content[at:]
    return content[:at] + bytes(amount) + content[at + amount :]


def loads_or_says(name, folder):
    path = folder / "mine.npz" if name == "npz" else folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoders, on what is no picture
        try:
            info, arrays = sources.load(name, path)
        except errors.DataError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 500
            return
    assert arrays.train_image.dtype == np.uint8
    assert arrays.train_image.shape == (len(arrays.train_label), *info.image_shape)
    for label in (arrays.train_label, arrays.test_label):
        assert 0 <= label.min() <= label.max() < info.num_classes


def check_file(case):
    name, which, changes = case
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        FORMATS[name](folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[int(which * (len(files) - 1))]
        content = path.read_bytes()
        for change in changes:
            content = damaged(content, *change) if content else content
        path.write_bytes(content)
        loads_or_says(name, folder)


FILE = st.tuples(
    st.sampled_from(sorted(FORMATS)),
    st.floats(0, 1),
    st.lists(BYTES, min_size=1, max_size=3),
)
test_files, test_files_long = short_and_long(60, 250)(FILE)(check_file)


ARRAY = st.tuples(
    st.lists(st.integers(0, 20), max_size=4),
    st.sampled_from(["uint8", "int8", "int64", "float32", "bool", "U3", "O", "c8"]),
    st.integers(-3, 300),
)


def check_arrays(case):
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        names = ("x_train", "y_train", "x_test", "y_test")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # casts
            arrays = {
                name: np.full(shape, value).astype(kind)
                for name, (shape, kind, value) in zip(names, case, strict=False)
            }
        np.savez(folder / "mine.npz", **arrays)
        loads_or_says("npz", folder)


test_arrays, test_arrays_long = short_and_long(60, 100)(st.lists(ARRAY, max_size=4))(
    check_arrays
)


def check_idx(content):
    with contextlib.suppress(errors.DataError):
        array = formats.idx(pathlib.Path("x"), content)
        assert array.dtype == np.uint8
    with tempfile.NamedTemporaryFile() as file:
        file.write(gzip.compress(content)[: len(content)])
        file.flush()
        with contextlib.suppress(errors.DataError):
            formats.gunzip_idx(pathlib.Path(file.name))


IDX = st.tuples(
    st.just(b"\x00\x00\x08"), st.binary(max_size=40), st.binary(max_size=40)
).map(b"".join)
test_idx, test_idx_long = short_and_long(60, 50)(IDX)(check_idx)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cifar-10-batches-bin/data_batch_1.bin", tarfile.SYMTYPE),
        ("cifar-10-batches-bin/data_batch_1.bin", tarfile.LNKTYPE),
        ("cifar-10-batches-bin/data_batch_1.bin", tarfile.CHRTYPE),
        ("cifar-10-batches-bin/data_batch_1.bin", tarfile.FIFOTYPE),
        ("../data_batch_1.bin", tarfile.REGTYPE),
        ("/etc/cifar-10-batches-bin/data_batch_1.bin", tarfile.REGTYPE),
    ],
)
def test_tar_of_links_and_foreign_paths(tmp_path, name, kind):
    """They are not the file looked for, and nothing is written."""
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(
        errors.DataError, match="has no cifar-10-batches-bin/data_batch"
    ):
        sources.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]
