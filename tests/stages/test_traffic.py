"""Bytes that cross between clients and server, counted by hand."""

import dataclasses
import types

import numpy as np
import pytest

from mosaic_jax.core.types import ModelState
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.server import base, fedgen
from mosaic_jax.stages import run_rounds
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


def sent(algorithm, *, every=2, **fields):
    axis = parallel.build(np.full(CLIENTS, 10), num_devices=1)
    info = types.SimpleNamespace(image_shape=SHAPE, num_classes=4)
    context = types.SimpleNamespace(
        data=types.SimpleNamespace(info=info),
        clients=tiny.dataset([10] * CLIENTS, 4),
        settings=tiny.study(evaluation__every=every),
    )
    program = tiny.rounds(axis, algorithm, **fields)
    return run_rounds.traffic(context, program, ROUNDS)


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
