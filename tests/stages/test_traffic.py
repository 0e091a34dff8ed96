"""Bytes that cross between clients and server, counted by hand."""

import dataclasses
import types

import numpy as np
import pytest

from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.anchors import Anchor
from mosaic_jax.server import base, fedgen
from mosaic_jax.stages import federation, run_rounds
from tests import tiny

SHAPE = (16, 16, 1)
# Of `tiny.Net` for grey images and four classes, in float32: a 3 x 3 kernel of four
# channels, scale and shift, a linear layer with bias; mean and variance.
PARAMS = 4 * (3 * 3 * 4 + 2 * 4 + 4 * 4 + 4)
MOMENTS = 4 * 2 * 4
MODEL = PARAMS + MOMENTS
CLIENTS, ROUNDS = 3, 5


@dataclasses.dataclass(frozen=True)
class Twice(Algorithm):
    """Sends its model, and how far it has come."""

    def upload(self, turn, trained, loss):
        return (trained, turn.model), turn.state

    def aggregate(self, server_state, model, mean_upload, share):
        return server_state, mean_upload[0]


@dataclasses.dataclass(frozen=True)
class Less(Algorithm):
    """Keeps its statistics."""

    def upload(self, turn, trained, loss):
        return trained.params, turn.state

    def aggregate(self, server_state, model, mean_upload, share):
        return server_state, ModelState(mean_upload, model.batch_stats)


@dataclasses.dataclass(frozen=True)
class Steering(Algorithm):
    """The server sends a direction, as large as the parameters, with the model."""

    sends_state = True

    def init_server(self, model):
        return model.params


def sent(algorithm, *, every=2, first=0, **fields):
    axis = parallel.build(np.full(CLIENTS, 10), num_devices=1)
    info = types.SimpleNamespace(image_shape=SHAPE, num_classes=4)
    context = types.SimpleNamespace(
        data=types.SimpleNamespace(info=info),
        clients=tiny.dataset([10] * CLIENTS, 4),
        settings=tiny.study(evaluation__every=every),
    )
    program = tiny.rounds(axis, algorithm, **fields)
    return run_rounds.traffic(context, program, ROUNDS, first=first)


@pytest.mark.parametrize(
    ("algorithm", "upload"),
    [(algorithms.FedAvg(), MODEL), (Twice(), 2 * MODEL), (Less(), PARAMS)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("taking_part", [0, 2])
def test_what_an_algorithm_uploads_is_counted(algorithm, upload, taking_part):
    up, down = sent(algorithm, clients_per_round=taking_part)
    count = ROUNDS * (taking_part or CLIENTS)
    assert up == {"models": count * upload}
    assert down == {"models": count * MODEL}


@pytest.mark.parametrize("taking_part", [0, 2])
def test_a_state_that_is_sent_along_is_counted(taking_part):
    up, down = sent(Steering(), clients_per_round=taking_part)
    count = ROUNDS * (taking_part or CLIENTS)
    assert up == {"models": count * MODEL}
    assert down == {"models": count * (MODEL + PARAMS)}


@pytest.mark.parametrize("every", [1, 2, 5])
def test_questions_for_moments_are_counted(every):
    """Of the model that is handed on; how often it is measured changes no result."""
    heterofl = algorithms.HeteroFL(batch_norm="static")
    up, down = sent(heterofl, every=every, rates=(1.0,) * CLIENTS)
    assert up["moments"] == CLIENTS * MOMENTS
    assert down["queried_models"] == CLIENTS * MODEL
    assert up["models"] == ROUNDS * CLIENTS * MODEL
    running = algorithms.HeteroFL(batch_norm="running")
    assert set(sent(running, rates=(1.0,) * CLIENTS)[0]) == {"models"}


def test_label_counts_of_a_round_are_counted_where_the_server_trains():
    up, _ = sent(algorithms.FedAvg(), server=base.ServerTraining(), clients_per_round=2)
    assert up["used_label_counts"] == ROUNDS * 2 * 4 * 4


def test_lessons_are_counted():
    task = base.Task(tiny.classifier(), SHAPE, 4, "none", "auto", "eval", CLIENTS)
    method = fedgen.FedGen(latent_dim=3, hidden=5)
    _, down = sent(algorithms.FedAvg(), server=method, task=task, clients_per_round=2)
    # From noise and label to hidden units, their batch-norm, then to the four features;
    # and the shares of the classes.
    generator = (3 + 4) * 5 + 5 + 4 * 5 + 5 * 4 + 4
    assert down == {
        "models": ROUNDS * 2 * MODEL,
        "lessons": ROUNDS * 2 * 4 * (generator + 4),
    }


ANCHOR = Anchor("proximal", 1.0, 1.0)


def test_an_anchor_that_all_get_as_the_first_model_costs_nothing():
    assert sent(algorithms.FedAvg(), anchor=ANCHOR) == sent(algorithms.FedAvg())


@pytest.mark.parametrize("first", [0, 7])
def test_who_joins_later_gets_the_anchor_once(first):
    up, down = sent(
        algorithms.FedAvg(), first=first, anchor=ANCHOR, clients_per_round=1
    )
    key = federation.rounds_key(tiny.study())
    axis = parallel.build(np.full(CLIENTS, 10), num_devices=1)
    program = tiny.rounds(axis, algorithms.FedAvg(), clients_per_round=1)
    who = [
        program.participation.participants(key, first + i)[0].item()
        for i in range(ROUNDS)
    ]
    assert len(set(who)) > 1
    assert up == {"models": ROUNDS * MODEL}
    assert down == {"models": ROUNDS * MODEL, "anchor": (len(set(who)) - 1) * MODEL}


def test_parts_of_the_anchor_come_with_every_later_round():
    algorithm = algorithms.FedRolex(batch_norm="running")
    _, down = sent(algorithm, rates=(1.0,) * CLIENTS, anchor=ANCHOR)
    assert down["anchor"] == (ROUNDS - 1) * CLIENTS * MODEL


@pytest.mark.parametrize("taking_part", [0, 2])
def test_uploads_that_are_lost_are_not_counted(taking_part):
    local = dataclasses.replace(tiny.LOCAL, failures=0.5)
    fields = {"clients_per_round": taking_part, "local": local}
    up, down = sent(algorithms.FedAvg(), **fields)
    axis = parallel.build(np.full(CLIENTS, 10), num_devices=1)
    program = tiny.rounds(axis, algorithms.FedAvg(), **fields)
    key, data = federation.rounds_key(tiny.study()), tiny.dataset([10] * CLIENTS, 4)
    turnout = program.participation.turnout
    arrived = sum(
        int(turnout(data.client, key, i).arrived.sum()) for i in range(ROUNDS)
    )
    count = ROUNDS * (taking_part or CLIENTS)
    assert 0 < arrived < count
    assert up == {"models": arrived * MODEL} and down == {"models": count * MODEL}
    up, _ = sent(algorithms.FedAvg(), server=base.ServerTraining(), **fields)
    assert up["used_label_counts"] == arrived * 4 * 4
