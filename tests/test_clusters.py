"""examples/cluster: every file is what its tool reads, every command is one of ours."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from mosaic_jax.cli import config_files, run, sweep
from mosaic_jax.run import settings

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "cluster"
FILES = sorted(FOLDER.iterdir())


def words_of(path):
    """The words of each command of this console in a file."""
    if path.name == "kubernetes.yaml":
        container = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"][0]
        return [[*container["command"], *container["args"]]]
    # A line that goes on is one with the next.
    text = re.sub(r"\\\n\s*", "", path.read_text())
    commands = re.findall(r"^\s*(mosaic (?:run|sweep) .*)$", text, re.M)
    return [shlex.split(command) for command in commands]


def kubernetes():
    """The objects of kubernetes.yaml by kind."""
    text = (FOLDER / "kubernetes.yaml").read_text()
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_ours(path, tmp_path):
    commands = words_of(path)
    assert commands
    for _, command, *words in commands:
        if command == "run":
            # What a machine fills in is a number here.
            filled = [re.sub(r"\$\(.*\)$", "0", word) for word in words]
            given = run.parse(filled)
            assert given.coordinator.endswith(":1234") and given.num_processes > 1
            settings.from_mapping(given.config.to_dict())
        else:
            args = sweep.parse_words(words)
            found = sweep.parse(
                args.config, args.grid, args.seeds, tmp_path, args.fixed
            )
            assert len(found.cells) > 1


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"])
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_processes_of_kubernetes_find_each_other():
    found = kubernetes()
    name = found["Service"]["metadata"]["name"]
    job = found["Job"]["spec"]
    pod = job["template"]["spec"]
    assert found["Service"]["spec"]["selector"] == {"job-name": name}
    assert (pod["subdomain"], found["Job"]["metadata"]["name"]) == (name, name)
    (words,) = words_of(FOLDER / "kubernetes.yaml")
    given = run.parse([re.sub(r"\$\(.*\)$", "1", word) for word in words[2:]])
    assert given.coordinator == f"{name}-0.{name}:1234"
    assert job["completions"] == job["parallelism"] == given.num_processes
    assert job["completionMode"] == "Indexed" and given.process_id == 1
    mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert given.workdir.startswith(tuple(mounts))


def test_skypilot_keeps_the_workdir():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert {"name", "resources", "file_mounts", "setup", "run"} == set(task)
    (words,) = words_of(FOLDER / "skypilot.yaml")
    args = sweep.parser().parse_args(words[2:])
    assert str(args.workdir).startswith(tuple(task["file_mounts"]))
    assert config_files.load(args.config)
