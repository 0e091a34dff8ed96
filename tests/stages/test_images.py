"""Training images in host memory: rounds alone put them on the devices."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from mosaic_jax.core import costs, errors, prng
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.parallel import ClientAxis
from mosaic_jax.run import rehearsal, study
from mosaic_jax.stages.host_rounds import HostRounds
from mosaic_jax.stages.prototype_host import OnHost
from tests import tiny
from tests.stages.test_templates import CHAINS, SHORT


class Guarded:
    """Images that may be read by `ClientAxis.gather` alone."""

    def __init__(self, images):
        self._images, self.is_open = images, False

    def __getattr__(self, name):
        if not self.is_open:
            raise PermissionError(name)
        return getattr(self._images, name)


# Each stage of the library is in one of them, and with it each way that it may read.
STUDIES = {
    "mosaic": {"warmup__rounds": 1, "refine__steps": 1, "audit__images": 4},
    "published": CHAINS["published"],
    "latest": {"experts__local_steps": 0, "leakage__images": 4},
    "server": CHAINS["server"] | {"server__when": "once", "server__method": "dense"},
    "every_round": CHAINS["server"],
    "feddf": CHAINS["server"] | {"server__when": "once", "server__method": "feddf"},
    "static": {"init__method": "heterofl", "experts__local_steps": 0},
    "running": {"init__method": "heterofl", "method": "federated"}
    | {"methods__partial__batch_norm": "running"},
    "prototypes": {"init__method": "fedproto", "method": "federated"},
    "anchored": {"method": "federated", "finetune__anchor": "distilled"},
}


@pytest.mark.parametrize("name", STUDIES)
def test_stages_say_whether_they_read_images(name, monkeypatch):
    """Every stage is gone through with images that only rounds get."""
    fields = SHORT | {"finetune__rounds": 1} | STUDIES[name]
    work = study.build(tiny.study(**fields))
    found, run = {}, rehearsal._run

    def tried(link, context, needed, recorder):
        images = Guarded(context.data.clients.images)
        data = context.data.clients.replace(images=images)
        without = dataclasses.replace(
            context,
            data=dataclasses.replace(context.data, clients=data),
            clients=context.clients.replace(images=()),
            state_on_host=True,
        )
        with monkeypatch.context() as patch:
            patch.setattr(type(context.axis), "gather", opened(images))
            try:
                outcome = run(link, without, needed, recorder)
            except (PermissionError, AttributeError):
                found[link.name] = True
                return run(link, context, needed, recorder)
        found[link.name] = False
        return outcome

    monkeypatch.setattr(rehearsal, "_run", tried)
    list(rehearsal.rehearse(work, shapes_alone))
    told = {link.name: link.stage.reads_images(work.settings) for link in work.chain}
    assert found == told


def shapes_alone(program, args, named, name):
    """What a rehearsal needs to know of a program to go on."""
    del name
    return rehearsal.Seen(
        costs.Loop(costs.Counts()), 0, program.eval_shape(*args, **named)
    )


def opened(images):
    gather = rehearsal._Still.gather

    def allowed(axis, data, rows):
        images.is_open = True
        try:
            return gather(axis, data.replace(images=images._images), rows)
        finally:
            images.is_open = False

    return allowed
