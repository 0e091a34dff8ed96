"""What the project promises about code and paths from elsewhere."""

import ast
import importlib.metadata
import pathlib
import re

import pytest

from mosaic_jax.core import errors, files

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [
    ROOT / "launch.py",
    *sorted((ROOT / "mosaic_jax").rglob("*.py")),
    *sorted((ROOT / "configs").rglob("*.py")),
]
# Modules that run what they read, and functions that do.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "extractall", "extract"}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            target = node.func
            name = getattr(target, "attr", getattr(target, "id", ""))
            on_module = isinstance(target, ast.Attribute)
            yield name, on_module, {word.arg: word.value for word in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_runs_what_it_reads(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not UNSAFE_MODULES & {name.partition(".")[0] for name in names}
    text = path.read_text()
    for name, on_module, words in calls(tree):
        # re.compile and lowered.compile() are others.
        assert name not in UNSAFE_CALLS or (name == "compile" and on_module), name
        if "allow_pickle" in words:
            assert words["allow_pickle"].value is False
    readers = text.count("np.load(") + text.count("format.read_array(")
    assert readers == text.count("allow_pickle=False")
    assert text.count("torch.load(") == text.count("weights_only=True)")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "../x"])
def test_names_from_files_lead_nowhere_else(tmp_path, name):
    with pytest.raises(errors.CheckpointError, match="no name of a folder"):
        files.child(tmp_path, name)
    assert files.child(tmp_path, "mosaic+fedrolex") == tmp_path / "mosaic+fedrolex"


def packages(text):
    return re.findall(r"^([A-Za-z0-9_.\-]+)", text, re.MULTILINE)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_every_dependency_with_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=\S)", lock.strip())
    pinned = {}
    for entry in entries:
        name, version = re.match(r"([\w.\-]+)==([\w.+]+)", entry).groups()
        assert "--hash=sha256:" in entry, name
        pinned[normal(name)] = version
    wanted = packages((ROOT / "requirements.txt").read_text())
    assert {normal(name) for name in wanted} <= pinned.keys()
    # Whatever these need is there too.
    for name in wanted:
        for needed in importlib.metadata.requires(name) or []:
            if "extra ==" not in needed and ";" not in needed:
                assert normal(packages(needed)[0]) in pinned, (name, needed)
