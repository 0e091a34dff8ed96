"""Studies that run within a test: driven by hand, broken off, and what they made."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import trees
from mosaic_jax.run import checkpoint, runner
from mosaic_jax.run.running import Running
from tests import tiny


def drive(run):
    """The `Outcome` of a stage's run, whose loops are run as the library does it."""
    state = None
    while True:
        try:
            steps = run.send(state)
        except StopIteration as end:
            return end.value
        # Arrays in host memory are the stage's to write to.
        state = jax.tree.map(
            lambda x: np.array(x) if isinstance(x, np.ndarray) else x, steps.state
        )
        window = steps.window if steps.work.on_host else jax.jit(steps.window)
        for first in range(0, steps.num_steps, steps.every):
            state, _ = window(steps.args, state, first, steps.window_end(first))


def link_of(work, name):
    """The stage `name` at its place in the chain of an experiment."""
    return next(link for link in work.study.chain if link.name == name)


def outcome(work, name, artifacts):
    """What stage `name` hands on; its artifacts are added to `artifacts`."""
    found = drive(work.start(link_of(work, name), artifacts))
    artifacts |= found.artifacts
    return found


def artifacts(work):
    """Artifacts of every finished stage of an experiment, by the stage's name."""
    links = {link.name: link for link in work.study.chain}
    return {
        stage.name: stage.artifacts(work.study.template(links[stage.name]))
        for stage in work.finished()
    }


def check_templates(work):
    """The template of every stage has the shapes and types of what is on disk of it."""
    stages = work.finished()
    assert [stage.name for stage in stages] == [link.name for link in work.study.chain]
    for link, stage in zip(work.study.chain, stages, strict=True):
        template = work.study.template(link)
        assert list(template) == list(link.provides(work.settings))
        assert set(template) <= set(stage.record.provides), link.name
        if not template:
            continue
        # As it was written, before any template was laid on it.
        saved = checkpoint.Checkpoints(
            stage.directory / "artifacts", stage.record.identity
        )
        _, found, _ = saved.latest()
        saved.close()
        expected = trees.flatten(template)
        named = {path for path in found if path.partition("/")[0] in template}
        assert named == set(expected), link.name
        for path, leaf in expected.items():
            told = f"{link.name}: {path}"
            shape, kind = jnp.shape(leaf), jnp.result_type(leaf)
            assert found[path].dtype == kind, told
            assert len(found[path].shape) == len(shape), told
            for length, wanted in zip(found[path].shape, shape, strict=True):
                assert wanted in (-1, length), told
        restored = stage.artifacts(template)
        assert set(trees.flatten(restored)) == set(expected)


def stop_after(work, windows):
    """Break the run off as a kill would, after some windows were saved."""
    save, count = Running.save, 0

    def counted(self):
        nonlocal count
        save(self)
        count += self.step == self.steps.window_end(self.step - 1)
        if count == windows:
            raise Killed

    Running.save = counted
    try:
        with contextlib.suppress(Killed):
            work.run()
    finally:
        Running.save = save
    assert count == windows


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    """With `monkeypatch`, the process dies once a checkpoint of `step` is written."""
    save = checkpoint.Checkpoints.save

    def watched(self, at, *args):
        save(self, at, *args)
        if at == step:
            raise Killed

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)


def final_model(workdir):
    """Digest of the last model of a finished study of end_to_end/tiny_config.py."""
    study = runner.Experiment(tiny.study(warmup__rounds=2), workdir)
    return trees.digest(artifacts(study)["finetune"]["final_model"])
