"""Studies whose run directory is a URL: on one machine, and on the next."""

import json
import shutil
import signal
import time

import pytest

import mosaic_jax
from mosaic_jax.cli import launch, submit, sweep, watch
from mosaic_jax.cli import run as program
from mosaic_jax.core import errors, trees
from mosaic_jax.run import checkpoint, study
from tests import launched, running, several, tiny

# Where a machine is lost: in rounds, in the clients' own steps, between the loops of a
# stage, on the server.
MOMENTS = [
    "init round 2 ",
    "generators gan 4 ",
    "prototypes: running",
    "distill student 4 ",
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name)`: its cache; what is started from here on is started there."""

    def go_to(name):
        cache = tmp_path / name
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        return cache / "mosaic_jax" / "stores"

    return go_to


def config(**changes):
    return tiny.config(**tiny.SHORT | changes).to_dict()


def test_what_a_run_saves_and_leaves_is_sent(machine, tmp_path, monkeypatch):
    """Without training: the checkpoints of real ones are for the slow tests."""

    def ran(works, folder):
        (folder / "config.json").write_text("{}")
        works[0].saved()
        assert (there / "config.json").exists() and works[0].writes
        (folder / "summary.json").write_text("{}")
        return None, []

    monkeypatch.setattr(launch.experiments, "run", ran)
    monkeypatch.setattr(launch.telling, "ending", lambda *_: None)
    machine("one")
    there = tmp_path / "store" / "run"
    assert launch.run(config(), f"file://{there}") == 0
    assert (there / "summary.json").exists()
    assert json.loads((there / ".lock").read_text())["released"]


@pytest.mark.slow
def test_a_study_is_sent(machine, tmp_path):
    url = f"file://{tmp_path}/store/run"
    first, there = machine("one"), tmp_path / "store" / "run"
    assert launch.run(config(), url) == 0
    (folder,) = first.glob("*/0/run")
    sent = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
    here = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert sent == here
    assert {"summary.json", "report.html", "split.json"} <= set(map(str, here))
    assert json.loads((there / "progress.json").read_text())["state"] == "done"
    assert json.loads((there / ".lock").read_text())["released"]


@pytest.mark.slow
def test_a_study_is_found_again(machine, tmp_path, capsys):
    url = f"file://{tmp_path}/store/run"
    first = machine("one")
    assert launch.run(config(), url) == 0
    (folder,) = first.glob("*/0/run")
    machine("two")
    capsys.readouterr()
    assert launch.run(config(), url) == 0
    told = capsys.readouterr().err
    assert "init: reused from" in told and "init: running" not in told
    # Of a folder, and of what is only looked at.
    assert launch.run(config(), tmp_path / "other", reuse_from=[url]) == 0
    told = capsys.readouterr().err
    assert "init: reused from" in told and "init: running" not in told
    assert launch.run(config(), url, dry_run="count") == 0
    assert "finished already: init" in capsys.readouterr().out
    # From it another study may start, but not itself.
    start = f"{url}:init"
    found = study.build(tiny.study(**tiny.SHORT, model__start=start)).start
    expected = study.build(
        tiny.study(**tiny.SHORT, model__start=f"{folder}:init")
    ).start
    assert trees.digest(found) == trees.digest(expected)
    assert launch.run(config(model__start=start), url) == 2
    assert "must be another run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_comparison_of_several_seeds(machine, tmp_path, capsys):
    url, there = f"file://{tmp_path}/store/run", tmp_path / "store" / "run"
    compared = config(compare="fedavg,fedprox", seeds=2)
    machine("one")
    assert launch.run(compared, url) == 0
    assert len(list(there.glob("fed*/seed_*/stages/init/*/done.json"))) == 4
    assert (there / "comparison.html").exists()
    machine("two")
    capsys.readouterr()
    assert launch.run(compared, url) == 0
    assert "init: running" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nothing://bucket/run", "Protocol not known: nothing: must be a URL that"),
        ("oci://bucket/run", "needs the package ocifs: pip install ocifs"),
        ("http://127.0.0.1:9/run", "http://127.0.0.1:9/run: "),
    ],
)
def test_a_store_that_is_none_is_one_line_before_any_work(
    machine, tmp_path, capsys, url, told
):
    machine("one")
    words = ["--config", "digits_mosaic", f"--config.data.dir={tmp_path}/none"]
    assert program.main([*words, "--workdir", url]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line and not more
    assert url in line


BUCKET = "gs://bucket/run"
WORDS = ["--config", "digits_mosaic", "--workdir", BUCKET]


@pytest.mark.parametrize(
    ("command", "words"),
    [(sweep, WORDS), (watch, [BUCKET])],
    ids=["sweep", "watch"],
)
def test_what_needs_a_folder_says_so(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "must be a folder: URLs are for" in line
    assert not list(tmp_path.iterdir())


def test_a_study_from_python_and_a_job_need_a_folder():
    with pytest.raises(errors.ConfigError, match="must be a folder: URLs are for"):
        mosaic_jax.Study(tiny.config(**tiny.SHORT), BUCKET)
    with pytest.raises(errors.ConfigError, match="must be a folder: URLs are for"):
        submit._of_run(WORDS)


@pytest.mark.slow
def test_lost_machines_cost_no_bit(machine, tmp_path):
    """Each is killed and its disk is gone; the next one goes on with the store."""
    done = launched.run(tmp_path / "undisturbed")
    assert done.returncode == 0, done.stderr
    url, there = f"file://{tmp_path}/store/run", tmp_path / "store" / "run"
    for number, moment in enumerate(MOMENTS):
        cache = machine(f"machine {number}")
        code, log = launched.stop_at(url, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, log
        assert "fetched" in log or not number
        shutil.rmtree(cache)
        forget_the_lease(there)
    cache = machine("the last")
    code, log = launched.stop_at(url, "finetune round 2 ", signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert json.loads((there / "progress.json").read_text())["state"] == "interrupted"
    machine("one more")
    done = launched.run(url)
    assert done.returncode == 0, done.stderr
    assert "finetune round: resuming at step 2" in done.stderr
    assert running.final_model(there) == running.final_model(tmp_path / "undisturbed")
    summaries = [
        json.loads((folder / "summary.json").read_text())["test_accuracy"]
        for folder in (there, tmp_path / "undisturbed")
    ]
    assert summaries[0] == summaries[1]


ROUNDS = ["--config.init.rounds=30", "--config.compute.silent_seconds=8"]


def progress(there):
    try:
        return json.loads((there / "progress.json").read_text()).get("step", 0)
    except (FileNotFoundError, ValueError):  # files are not whole from the first byte
        return 0


def forget_the_lease(there):
    """The process that held it is known to be dead: nobody has to wait."""
    held = json.loads((there / ".lock").read_text())
    (there / ".lock").write_text(json.dumps(held | {"time": 0.0}))


@pytest.mark.slow
def test_processes_that_share_nothing_but_the_store(machine, tmp_path):
    whole, there = tmp_path / "store" / "whole", tmp_path / "store" / "run"
    machine("one")
    codes, output = several.start([f"file://{whole}"] * 2, [ROUNDS] * 2)
    assert codes == [0, 0], output
    found = several.launch([f"file://{there}"] * 2, [ROUNDS] * 2)
    try:
        while progress(there) < 5:
            assert all(process.poll() is None for process in found)
            time.sleep(0.05)
        found[1].kill()
        for process in found:
            process.communicate(timeout=200)
    finally:
        for process in found:
            process.kill()
    assert list(there.glob("stages/init/*/checkpoints/round/part_1/*.npz"))
    forget_the_lease(there)
    cache = machine("two")
    codes, output = several.start([f"file://{there}"] * 2, [ROUNDS] * 2)
    assert codes == [0, 0], output
    assert all("resuming at step" in text for text in output), output
    # Each has a folder of its own, and the other's part only of what was fetched.
    folders = [next(cache.glob(f"*/{number}/run")) for number in (0, 1)]
    assert [(one / "summary.json").exists() for one in folders] == [True, False]
    (part,) = there.glob("stages/init/*/artifacts/part_1/0.npz")
    parts = [(one / part.relative_to(there)).exists() for one in folders]
    assert parts == [False, True]
    assert not [*there.glob("stages/*/*/checkpoints/**/*.npz")]
    assert digest(there) == digest(whole)
    # The finished study is everyone's.
    cache = machine("three")
    codes, output = several.start([f"file://{there}"] * 2, [ROUNDS] * 2)
    assert codes == [0, 0], output
    assert all("init: reused from" in text for text in output)
    codes, output = several.start([f"file://{whole}", f"file://{there}"], [ROUNDS] * 2)
    assert codes == [2, 2], output
    assert all("--workdir that is a URL = " in text for text in output)


def digest(there):
    """Of the artifacts of the stage init."""
    (folder,) = there.glob("stages/init/*/artifacts")
    saved = checkpoint.Checkpoints(folder)
    arrays = saved.latest()[1]
    saved.close()
    return trees.digest(dict(arrays))
