"""A finished stage is found again only as what it was saved as."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, files, trees
from mosaic_jax.run import store
from mosaic_jax.run.store import FinishedStage, Record

IDENTITY = {"study": "a" * 16, "stage": "init", "fingerprint": "b" * 16, "seed": 0}
TEMPLATE = {"model": {"w": jnp.zeros(3)}, "count": jnp.zeros((), jnp.int32)}


def record(identity=IDENTITY, **changes):
    """A record as a runner makes it, before it is sealed."""
    fields = {
        "identity": identity,
        "provides": list(TEMPLATE),
        "models": {"init": {"test_accuracy": 0.5}},
        "results": {},
        "headline": {},
        "clients": {"generator": {"0": "kept"}},
        "section": None,
        "up": {"models": 12},
        "down": {},
        "sent_before": [],
        "flops": 1.0,
        "history": [{"step": 1, "loss": 0.25}],
        "seconds": 1.0,
        "time": {"computing": 1.0},
        "peak_memory_bytes": 1,
        "files": {},
    }
    return Record(**fields | changes)


def saved(root, value, identity=IDENTITY, **changes):
    """A finished stage whose artifacts and pictures are made of `value`."""
    directory = store.directory_of(root, "init", identity["fingerprint"])
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "time.json").write_text("{}")
    artifacts = {
        "model": {"w": np.full(3, value, np.float32)},
        "count": np.int32(value),
    }
    store.save_artifacts(directory, identity, artifacts)
    pictures = {"film": np.full((2, 4, 4, 1), value, np.uint8)}
    store.seal(directory, record(identity, **changes), pictures)
    return directory


def find(root, identity=IDENTITY, provides=tuple(TEMPLATE)):
    return store.find(root, identity, provides)


def put(source, target):
    """`source`, a file or a folder, in the place of `target`."""
    if target.is_dir():
        shutil.rmtree(target)
    copy = shutil.copytree if source.is_dir() else shutil.copy
    copy(source, target)


def test_what_was_saved_comes_back(tmp_path):
    directory = saved(tmp_path, 3)
    stage = find(tmp_path)
    assert stage.name == "init" and stage.directory == directory
    found = stage.artifacts(TEMPLATE)
    np.testing.assert_array_equal(found["model"]["w"], [3, 3, 3])
    assert found["count"] == 3
    assert list(stage.artifacts({"count": TEMPLATE["count"]})) == ["count"]
    assert stage.artifacts({}) == {}
    (film,) = store.pictures(directory).values()
    assert film.shape == (2, 4, 4, 1) and (film == 3).all()
    assert dataclasses.replace(stage.record, files={}) == record()
    # Needed only while it ran.
    assert not (directory / "checkpoints").exists()
    assert not (directory / "time.json").exists()


def test_nothing_is_found_where_nothing_is(tmp_path, caplog):
    assert find(tmp_path) is None
    saved(tmp_path, 3)
    assert find(tmp_path, IDENTITY | {"fingerprint": "c" * 16}) is None
    assert not caplog.text


@pytest.mark.parametrize("name", ["pictures.npz", "artifacts"])
def test_files_of_the_same_stage_of_another_run_are_told(tmp_path, caplog, name):
    """Its identity is the same, the files are whole: only their sums differ."""
    mine, theirs = saved(tmp_path / "mine", 3), saved(tmp_path / "theirs", 4)
    put(theirs / name, mine / name)
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path / "mine") is None
    assert "its files are not those it was saved with; stage init runs" in caplog.text
    put(theirs / "done.json", mine / "done.json")
    other = "artifacts" if name == "pictures.npz" else "pictures.npz"
    put(theirs / other, mine / other)
    assert find(tmp_path / "mine") is not None


@pytest.mark.parametrize("name", ["pictures.npz", "artifacts"])
def test_missing_files_are_told(tmp_path, caplog, name):
    directory = saved(tmp_path, 3)
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path) is None
    assert "its files are not those it was saved with" in caplog.text


def test_a_file_that_was_not_there_is_told(tmp_path, caplog):
    directory = saved(tmp_path, 3, provides=[])
    put(directory / "artifacts" / "0", directory / "artifacts" / "1")
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path, provides=()) is None
    assert "its files are not those it was saved with" in caplog.text


@pytest.mark.parametrize("field", IDENTITY)
def test_a_record_of_another_study_is_told(tmp_path, caplog, field):
    other = 1 if field == "seed" else "c" * 16
    directory = saved(tmp_path, 3)
    theirs = saved(tmp_path / "theirs", 3, IDENTITY | {field: other})
    put(theirs, directory)
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path) is None
    assert f"belongs to another study: its {field} is" in caplog.text


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "digit": lambda text: text.replace('"test_accuracy": 0.5', '"test_accuracy": 0.6'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_record_is_told(tmp_path, caplog, kind):
    path = saved(tmp_path, 3) / "done.json"
    text = path.read_text()
    path.write_text(DAMAGES[kind](text))
    assert path.read_text() != text
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path) is None
    assert "done.json" in caplog.text and "stage init runs again" in caplog.text


@pytest.mark.parametrize("kind", ["a field more", "a field less"])
def test_a_record_of_another_version_is_told(tmp_path, caplog, kind):
    path = saved(tmp_path, 3) / "done.json"
    content = {
        field.name: getattr(store.read_record(path.parent), field.name)
        for field in dataclasses.fields(Record)
    }
    if kind == "a field more":
        content["audit"] = {}
    else:
        del content["headline"]
    files.write_json(path, content)
    with pytest.raises(errors.CheckpointError, match="damaged or of another version"):
        store.read_record(path.parent)
    with caplog.at_level(logging.WARNING, "mosaic_jax"):
        assert find(tmp_path) is None
    assert "of another version; stage init runs again" in caplog.text


def test_a_stage_that_lacks_an_artifact_does_not_serve(tmp_path, caplog):
    """It is a finished one of a study that wanted less: no damage."""
    saved(tmp_path, 3, provides=["model"])
    assert find(tmp_path) is None
    assert find(tmp_path, provides=("model",)) is not None
    assert not caplog.text


def test_artifacts_of_other_shapes_or_damaged_ones_are_told(tmp_path):
    directory = saved(tmp_path, 3)
    stage = find(tmp_path)
    wrong = TEMPLATE | {"model": {"w": jnp.zeros(4)}}
    with pytest.raises(errors.CheckpointError, match=r"w: saved float32\[3\], expect"):
        stage.artifacts(wrong)
    # The seal that is compared stays; what it seals does not.
    for path in directory.glob("artifacts/*/**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    stage = find(tmp_path)
    with pytest.raises(errors.CheckpointError, match="artifacts are damaged"):
        stage.artifacts(TEMPLATE)


def test_any_length_is_taken_where_the_template_says_so(tmp_path):
    saved(tmp_path, 3)
    template = TEMPLATE | {"model": {"w": jax.ShapeDtypeStruct((-1,), jnp.float32)}}
    found = find(tmp_path).artifacts(template)
    assert found["model"]["w"].shape == (3,)


def test_a_copy_is_whole_and_takes_the_place_of_what_was_there(tmp_path):
    stage = FinishedStage("init", saved(tmp_path / "one", 3), record())
    target = store.directory_of(tmp_path / "two", "init", IDENTITY["fingerprint"])
    saved(tmp_path / "two", 4)
    target.with_name(target.name + ".partial").mkdir()
    # Of a stage that was finished this moment.
    (stage.directory / "checkpoints").mkdir()
    (stage.directory / "time.json").write_text("{}")
    store.copy(stage, target)
    assert {path.name for path in target.iterdir()} == {
        *("artifacts", "done.json", "pictures.npz")
    }
    found = find(tmp_path / "two").artifacts(TEMPLATE)
    assert trees.digest(found) == trees.digest(
        find(tmp_path / "one").artifacts(TEMPLATE)
    )
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_records_are_json(tmp_path):
    path = saved(tmp_path, 3) / "done.json"
    content = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(Record)}
    assert names <= set(content) or names <= set(content["content"])
