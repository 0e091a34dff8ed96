"""What is run on every change is what one runs in a clone."""

import pathlib
import re
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def commands(path):
    """What its steps run."""
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_are_the_clones(path):
    targets = re.findall(r"^([\w/$().-]+(?: [\w/$().-]+)*):", *makefile())
    known = {
        name.replace("$(VENV)", ".venv") for one in targets for name in one.split()
    }
    named = [
        word
        for line in commands(path)
        if line.startswith("make ")
        for word in line.split()[1:]
    ]
    assert named and set(named) <= known
    for line in commands(path):
        for file in re.findall(r"tests/[\w/.]+", line):
            assert (ROOT / file).exists()


def makefile():
    return (ROOT / "Makefile").read_text(), re.MULTILINE


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_and_ends(path):
    content = yaml.safe_load(path.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["timeout-minutes"] < 360  # which is where GitHub ends it


def test_every_python_is_tested():
    content = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    versions = content["jobs"]["tests"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={versions[0]}"
    minors = [int(version.partition(".")[2]) for version in versions]
    assert minors == list(range(minors[0], minors[-1] + 1)) and len(minors) >= 3


def test_forms_ask_for_something():
    asked = [yaml.safe_load(path.read_text()) for path in FORMS]
    forms = [form for form in asked if "body" in form]
    assert len(forms) == 2
    for form in forms:
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert any(
            field.get("validations", {}).get("required") for field in form["body"]
        )
