"""What every federated algorithm and every method of the server must hold to.

The tests go over the registries, with the fields of configs/base.py: a new method is
covered by being registered.
"""

import dataclasses
import functools
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base as config_base
from mosaic_jax import (
    algorithms,
    checkpoint,
    distillation,
    experiment,
    methods,
    parallel,
    prng,
    settings,
    trees,
)
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.distillation.base import ServerTraining, Task
from mosaic_jax.models.cnn import CNN
from mosaic_jax.settings import Local
from mosaic_jax.stages import rounds
from tests import tiny

KEY = prng.root(0)
SHAPE = (16, 16, 1)
NUM_CLASSES = 4
SIZES = [10, 19, 8, 13]
# By the client's number, where an algorithm deals out parts of the network.
RATES = np.array([1.0, 0.5, 1.0, 0.5])
NUM_ROUNDS = 2
# Sizes and counts of a method's fields are cut to this: tests compile, not train.
SMALL = 3
CLASSIFIER = Classifier(CNN(NUM_CLASSES, width=2), (0.4,), (0.3,))
NAMES = [*algorithms.ALGORITHMS, *distillation.METHODS]
every_method = pytest.mark.parametrize("name", NAMES)


def component(registry, name):
    """The method with its default fields, no larger than a test can pay for."""
    fields = config_base.get_config().methods.get(name, {})
    small = {
        key: min(value, SMALL) if type(value) is int else value
        for key, value in dict(fields).items()
    }
    return settings.check(registry[name], small, f"methods.{name}")


def build(name, data, **layout):
    """Rounds of algorithm `name`, or of FedAvg with method `name` on the server."""
    fields = {"clients_per_round": layout.pop("clients_per_round", 0)}
    if name in distillation.METHODS:
        algorithm = algorithms.FedAvg()
        fields["server"] = component(distillation.METHODS, name)
        fields["task"] = Task(
            CLASSIFIER, SHAPE, NUM_CLASSES, "none", "auto", batch_norm="eval"
        )
    else:
        algorithm = component(algorithms.ALGORITHMS, name)
    if algorithm.partial:
        fields["rates"] = tuple(RATES[data.client.number].tolist())
    layout = {"at_once": 1, "num_devices": 1} | layout
    return rounds.Rounds(
        classifier=CLASSIFIER,
        algorithm=algorithm,
        local=Local(steps=2, batch_size=8, learning_rate=0.01, weight_decay=1e-3),
        axis=parallel.build(np.asarray(data.client.size), **layout),
        augmentation="none",
        keep_models=True,
        **fields,
    )


@functools.cache
def start(name):
    """The state before the first round."""
    model = jax.jit(CLASSIFIER.init, static_argnums=1)(prng.named(KEY, "model"), SHAPE)
    return build(name, tiny.dataset(SIZES)).initial_state(model, KEY)


@functools.cache
def program(name, count):
    """A compiled round of `count` clients, one at a time."""
    return jax.jit(build(name, tiny.dataset(SIZES[:count])).run)


def run(name, data, state, numbers=range(NUM_ROUNDS), step=None):
    """State after rounds `numbers`, and the losses and metrics of the last."""
    step = step or program(name, data.num_clients)
    for number in numbers:
        state, loss, metrics = step(data, KEY, state, number)
    return state, (loss, metrics)


@functools.cache
def expected(name):
    return run(name, tiny.dataset(SIZES), start(name))


def of_clients(state, rows):
    """`state` with the clients `rows` only, in this order."""
    names = ("client", "client_model", "last_round")
    return state.replace(**{n: trees.take(getattr(state, n), rows) for n in names})


def close(found, wanted, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        wanted,
    )


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@every_method
def test_everything_is_finite_and_moves(name):
    state, found = expected(name)
    assert trees.all_finite((state, found))
    assert trees.digest(state.model.params) != trees.digest(start(name).model.params)


@every_method
def test_order_of_clients_does_not_matter(name):
    data, order = tiny.dataset(SIZES), np.array([2, 3, 0, 1])
    turned = data.replace(client=trees.take(data.client, order))
    state, _ = run(name, turned, of_clients(start(name), order))
    close(state, of_clients(expected(name)[0], order))


@every_method
def test_a_client_of_weight_0_changes_nothing(name):
    """Be what it holds finite or not."""
    data = tiny.dataset(SIZES)
    last = len(SIZES) - 1
    nobody = dataclasses.replace(
        data.client,
        size=data.client.size.at[last].set(0),
        label_count=data.client.label_count.at[last].set(0),
    )
    broken = jax.tree.map(lambda x: x.at[last].set(jnp.nan), start(name).client)
    state, _ = run(
        name, data.replace(client=nobody), start(name).replace(client=broken)
    )
    rows = np.arange(last)
    alone = data.replace(client=trees.take(data.client, rows))
    without, _ = run(name, alone, of_clients(start(name), rows))
    close(of_clients(state, rows), without)


@every_method
def test_resume_is_bit_for_bit(name, tmp_path):
    data = tiny.dataset(SIZES)
    state, _ = run(name, data, start(name), range(1))
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, state)
    _, restored, _ = saved.latest()
    saved.close()
    state = checkpoint.restore_into(start(name), restored)
    same(run(name, data, state, range(1, NUM_ROUNDS)), expected(name))


@every_method
def test_batched_equals_one_by_one(name):
    data = tiny.dataset(SIZES)
    step = jax.jit(build(name, data, at_once=len(SIZES)).run)
    close(run(name, data, start(name), step=step), expected(name))


@every_method
def test_some_take_part_and_states_may_be_in_host_memory(name):
    data = tiny.dataset(SIZES)
    some = build(name, data, clients_per_round=2)
    state, (loss, _) = run(name, data, start(name), range(1), jax.jit(some.run))
    assert len(loss) == 2
    who = np.concatenate(some.participants(KEY, 0))
    others = np.setdiff1d(np.arange(len(SIZES)), who)
    same(
        trees.take((state.client, state.client_model), others),
        trees.take((start(name).client, start(name).client_model), others),
    )
    moved = jax.tree.map(
        lambda new, old: jnp.any(new != old, axis=range(1, new.ndim)),
        state.client_model.params,
        start(name).client_model.params,
    )
    assert jnp.all(jnp.any(jnp.stack(jax.tree.leaves(moved)), axis=0)[who])
    on_host = start(name).replace(
        client=jax.tree.map(np.array, start(name).client),
        client_model=jax.tree.map(np.array, start(name).client_model),
    )
    host, _, _ = rounds.HostRounds(some).run(data, KEY, on_host, 0)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host.client_model))
    close(host, state)


def test_the_lists_of_server_methods_agree():
    assert methods.SERVER.keys() == distillation.METHODS.keys()
    assert set(methods.SERVER.values()) <= {"once", "every_round"}


def test_lists_of_comparisons_name_what_there_is():
    known = {"mosaic", *NAMES}
    for name in (*methods.COMPARED, *methods.HETEROGENEOUS):
        assert set(name.partition("@")[0].split("+")) <= known


DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "adding_a_method.md"


@pytest.mark.parametrize("base", [Algorithm, ServerTraining])
def test_every_hook_is_documented(base):
    hooks = {name for name in vars(base) if not name.startswith("_")}
    named = set(re.findall(r"`(\w+)", DOCUMENT.read_text()))
    assert hooks - named == set()


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """The method in the document, registered as the document says; its fields."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "noise_of_the_document.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("noise_of_the_document")
    monkeypatch.setitem(distillation.METHODS, "noise", module.Noise)
    yield {"images": 8, "learning_rate": 0.01}
    del sys.modules["noise_of_the_document"]


@pytest.mark.parametrize("when", ["once", "every_round"])
def test_the_method_in_the_document_runs(noise, when, monkeypatch, tmp_path):
    monkeypatch.setitem(methods.SERVER, "noise", when)
    config = tiny.config(
        init__rounds=1, evaluation__every=1, finetune__rounds=0, server__rounds=2
    ).to_dict()
    config["methods"]["noise"] = noise
    methods.choose(config, "noise")
    study = experiment.Experiment(settings.from_mapping(config), tmp_path / when)
    summary = study.run()
    assert np.isfinite(summary["test_accuracy"]["final"])
    of_training = {"once": "server", "every_round": "init"}[when]
    without = dataclasses.replace(
        study.settings, server=dataclasses.replace(study.settings.server, method="none")
    )
    plain = experiment.Experiment(without, tmp_path / "plain").flops
    assert summary["flops"][of_training] > plain.get(of_training, 0)
