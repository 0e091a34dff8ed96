"""Training images in host memory: rounds alone put them on the devices."""

import dataclasses

import jax
import numpy as np
import pytest

from mosaic_jax import stages
from mosaic_jax.core import costs, errors, prng
from mosaic_jax.data import federated
from mosaic_jax.fl import parallel
from mosaic_jax.run import forecast, rehearsal, study
from mosaic_jax.run.runner import Experiment
from mosaic_jax.stages.base import Stage
from mosaic_jax.stages.host_rounds import IN_HOST, HostRounds
from tests import running, tiny
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


QUICK = "anchored"


def studied(name):
    return tiny.study(**SHORT | {"finetune__rounds": 1} | STUDIES[name])


def test_every_stage_is_in_one_of_them():
    def kinds(of):
        return {of}.union(*map(kinds, of.__subclasses__()))

    chains = [stages.chain(studied(name)) for name in STUDIES]
    seen = {type(link.stage) for chain in chains for link in chain}
    library = {kind for kind in kinds(Stage) if kind.__module__.startswith("mosaic")}
    named = {kind for kind in library if "name" in vars(kind)}
    assert seen == named


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow)
        for name in STUDIES
    ],
)
def test_stages_say_whether_they_read_images(name, monkeypatch):
    """Every stage is gone through with images that only rounds get."""
    work = study.build(studied(name))
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


SIZES = [10, 19, 8, 13]
KEY = prng.root(0)


def rounds_of(data, **layout):
    axis = parallel.build(np.array(SIZES), **layout)
    return tiny.rounds(axis, clients_per_round=3)


def run_on_host(program, data, in_host=None):
    """State in host memory after two rounds, and the losses of the last."""
    model = jax.jit(tiny.classifier().init, static_argnums=1)(KEY, (16, 16, 1))
    state = program.initial_state(model, KEY)
    kept = {name: jax.tree.map(np.array, getattr(state, name)) for name in IN_HOST}
    state, on_host = state.replace(**kept), HostRounds(program, in_host)
    for number in range(2):
        state, loss, _ = on_host.run(data, KEY, state, number)
    return (state, loss), on_host


def test_images_in_host_memory_are_the_same_images():
    """Bit for bit on one device, and compiled once; on two up to rounding."""
    data = tiny.dataset(SIZES)
    in_host, nowhere = jax.tree.map(np.array, data), data.replace(images=())
    one = rounds_of(data, at_once=1, num_devices=1)
    expected, _ = run_on_host(one, one.axis.place(data))
    found, on_host = run_on_host(one, nowhere, in_host)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert on_host._run_clients._cache_size() == 1
    two = rounds_of(data, at_once=1, num_devices=2)
    client = two.axis.replicate(in_host.client)
    found, _ = run_on_host(two, nowhere.replace(client=client), in_host)
    tiny.close(found, expected)


ROUNDS = {
    "method": "federated",
    "data__num_clients": 5,
    "init__clients_per_round": 2,
    "init__rounds": 2,
    "warmup__rounds": 0,
}


@pytest.mark.slow
def test_a_study_without_images_on_its_devices(tmp_path):
    """It is that with images there, bit for bit, and found again as the same."""
    host, device = (
        Experiment(tiny.study(**ROUNDS, **fields), tmp_path / name)
        for name, fields in (
            ("host", {"compute__images": "host"}),
            ("device", {"compute__client_state": "host"}),
        )
    )
    assert [one for _, one in host.plan()] == [one for _, one in device.plan()]
    context = host.placement.context(running.link_of(host, "init"))
    assert context.clients.images == () and context.state_on_host
    found, expected = (running.outcome(one, "init", {}) for one in (host, device))
    jax.tree.map(
        np.testing.assert_array_equal,
        found.artifacts,
        jax.device_get(expected.artifacts),
    )
    assert found.models == expected.models
    # Nor are they counted before it runs.
    needed = [forecast.forecast(one.study, None)[0].memory for one in (host, device)]
    images = host.data.clients.images.image
    width = host.data.clients.client.index.shape[1]
    assert needed[1] - needed[0] >= images[0].size * (len(images) - width)


FEDERATED = {"method": "federated", "compute__images": "host"}
IN_FILES = {"method": "federated", "data__in_memory": False, "data__name": "tfds:x"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"compute__images": "host"},
            r"compute.images = 'host': must be auto or device for the stage"
            " 'generators', which reads clients' images outside of federated rounds",
        ),
        (
            FEDERATED | {"init__method": "heterofl"},
            r"compute.images = 'host': must be auto or device for the stage 'init'",
        ),
        (
            FEDERATED | {"compute__client_state": "device"},
            r"must be auto or device for compute.client_state = 'device'",
        ),
        (
            FEDERATED | {"attack__name": "alie", "attack__share": 0.67},
            r"must be auto or device for attack.name = 'alie', whose attackers wait",
        ),
        (
            IN_FILES | {"compute__images": "device"},
            r"compute.images = 'device': must be auto or host for data.in_memory = F",
        ),
        (
            IN_FILES | {"init__method": "heterofl"},
            r"data.in_memory = False: must be True for the stage 'init'",
        ),
    ],
)
def test_what_needs_all_images_is_refused(fields, told, monkeypatch):
    """Before any image is read."""
    monkeypatch.delattr(federated, "load")
    with pytest.raises(errors.ConfigError, match=told):
        study.build(tiny.study(**fields))
