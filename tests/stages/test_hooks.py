"""What an algorithm's hooks may see, against loops over clients in NumPy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import prng, trees
from mosaic_jax.fl import algorithms, parallel, training
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.anchors import Anchor
from mosaic_jax.fl.training import Local
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages.host_rounds import HostRounds
from tests import tiny

KEY = prng.root(0)
SHAPE, NUM_CLASSES = (16, 16, 1), 4
SIZES = [10, 19, 8]
ROUNDS = 3
LOCAL = Local(steps=3, batch_size=8, learning_rate=0.05, weight_decay=0.0)


class Linear(nn.Module):
    """Logistic regression on pixels: its gradient is a line of NumPy."""

    num_classes: int

    def setup(self):
        self.dense = nn.Dense(self.num_classes)

    def features(self, x, *, train, mask=None):
        return x.reshape(len(x), -1)

    def head(self, features):
        return self.dense(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train, mask=mask))


CLASSIFIER = Classifier(Linear(NUM_CLASSES), (0.4,), (0.3,))


@dataclasses.dataclass(frozen=True)
class ControlVariates(Algorithm):
    """SCAFFOLD (Karimireddy et al., 2020), with the second of its control variates."""

    learning_rate: float = LOCAL.learning_rate
    steps: int = LOCAL.steps
    sends_state = True

    def init_server(self, model):
        return jax.tree.map(jnp.zeros_like, model.params)

    init_client = init_server

    def penalty(self, params, seen):
        # A linear term, whose gradient is c - c_i.
        terms = jax.tree.map(
            lambda p, c, own: jnp.sum(p * (c - own)),
            params,
            seen.turn.server,
            seen.turn.state,
        )
        return sum(jax.tree.leaves(terms))

    def upload(self, turn, trained, loss):
        scale = 1 / (self.steps * self.learning_rate)
        own = jax.tree.map(
            lambda old, c, start, end: old - c + scale * (start - end),
            turn.state,
            turn.server,
            turn.model.params,
            trained.params,
        )
        moved = jax.tree.map(jnp.subtract, own, turn.state)
        return (trained, moved), own

    def aggregate(self, server_state, model, mean_upload, share):
        model, moved = mean_upload
        state = jax.tree.map(lambda c, by: c + share * by, server_state, moved)
        return state, model


@dataclasses.dataclass(frozen=True)
class Curious(Algorithm):
    """Adds to the gradient what it sees; the server keeps the clients' mean loss."""

    def init_server(self, model):
        return jnp.zeros(())

    def penalty(self, params, seen):
        dense = params["dense"]
        noise = jax.random.normal(seen.key, dense["bias"].shape)
        by_step = seen.step * jnp.sum(dense["bias"])
        by_features = jnp.mean(seen.features, axis=0) @ dense["kernel"].mean(axis=1)
        return by_step + by_features + jnp.sum(noise * dense["bias"])

    def upload(self, turn, trained, loss):
        return (trained, loss), turn.state

    def aggregate(self, server_state, model, mean_upload, share):
        return mean_upload[1], mean_upload[0]


def program_of(algorithm, data, **layout):
    fields = {
        "clients_per_round": layout.pop("clients_per_round", 0),
        "anchor": layout.pop("anchor", None),
    }
    layout = {"at_once": 1, "num_devices": 1} | layout
    axis = parallel.build(np.asarray(data.client.size), **layout)
    return tiny.rounds(axis, algorithm, CLASSIFIER, local=LOCAL, **fields)


@functools.cache
def initial():
    return jax.jit(CLASSIFIER.init, static_argnums=1)(prng.named(KEY, "model"), SHAPE)


def run(algorithm, **layout):
    """The state after some rounds, and the losses of the last."""
    data = tiny.dataset(SIZES, NUM_CLASSES)
    program = program_of(algorithm, data, **layout)
    state = program.initial_state(initial(), KEY)
    step = jax.jit(program.run)
    for number in range(ROUNDS):
        state, loss, _ = step(data, KEY, state, number)
    return program, state, loss


@functools.cache
def batches(client, number):
    """Normalised pixels [B, F], labels and masks of a client's round, as arrays."""
    data = tiny.dataset(SIZES, NUM_CLASSES)
    batch_at = training.client_batches(
        trees.take(data.client, client),
        data.images,
        number * LOCAL.steps,
        LOCAL.steps,
        key=KEY,
        batch_size=LOCAL.batch_size,
        augmentation="none",
    )
    found = []
    for step in range(LOCAL.steps):
        batch = jax.device_get(batch_at(step))
        x = ((batch.image + 1) / 2 - 0.4) / 0.3
        found.append((x.reshape(len(x), -1), batch.label, batch.mask))
    return found


def gradient(params, x, label, mask):
    """Of the masked mean cross-entropy, and that."""
    logits = x @ params["kernel"] + params["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    hot = np.eye(NUM_CLASSES)[label]
    loss = -(np.log((p * hot).sum(axis=1)) * mask).sum() / mask.sum()
    error = (p - hot) * mask[:, None] / mask.sum()
    return {"kernel": x.T @ error, "bias": error.sum(axis=0)}, loss


def start():
    params = jax.device_get(initial().params)["dense"]
    return {name: np.array(leaf, np.float64) for name, leaf in params.items()}


def mean(trained, who):
    weight = np.array([SIZES[i] for i in who], float)
    return {
        name: sum(
            w * one[name] for w, one in zip(weight / weight.sum(), trained, strict=True)
        )
        for name in trained[0]
    }


def close(found, expected):
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-5)


def scaffold(drawn):
    """SCAFFOLD with the clients `drawn` [rounds][m]: model, c and all c_i."""
    model, steps, rate = start(), LOCAL.steps, LOCAL.learning_rate
    c = {name: np.zeros_like(leaf) for name, leaf in model.items()}
    own = [dict(c) for _ in SIZES]
    for number, who in enumerate(drawn):
        trained, moved = [], []
        for i in who:
            params = dict(model)
            for x, label, mask in batches(i, number):
                slope, _ = gradient(params, x, label, mask)
                params = {
                    n: params[n] - rate * (slope[n] + c[n] - own[i][n]) for n in params
                }
            new = {
                n: own[i][n] - c[n] + (model[n] - params[n]) / (steps * rate)
                for n in params
            }
            trained.append(params)
            moved.append({n: new[n] - own[i][n] for n in new})
            own[i] = new
        # By weight, so that c stays the weighted mean of all c_i.
        share = sum(SIZES[i] for i in who) / sum(SIZES)
        by = mean(moved, who)
        model = mean(trained, who)
        c = {n: c[n] + share * by[n] for n in c}
    return model, c, own


@pytest.mark.parametrize(
    "layout",
    [{}, {"at_once": 3}, {"clients_per_round": 2}],
    ids=["one by one", "batched", "some"],
)
def test_the_servers_state_reaches_the_clients(layout):
    program, state, _ = run(ControlVariates(), **layout)
    drawn = [
        program.participation.participants(KEY, n)[0].tolist() for n in range(ROUNDS)
    ]
    assert all(len(who) == layout.get("clients_per_round", 3) for who in drawn)
    model, c, own = scaffold(drawn)
    assert max(np.abs(leaf).max() for leaf in c.values()) > 1e-3
    close(state.model.params["dense"], model)
    close(state.server["dense"], c)
    for i in range(len(SIZES)):
        close(trees.take(state.client, i)["dense"], own[i])
    # Without the control variates the model is another one.
    plain = run(algorithms.FedAvg(), **layout)[1].model
    assert trees.digest(plain) != trees.digest(state.model)


def test_it_reaches_clients_whose_states_are_in_host_memory():
    data = tiny.dataset(SIZES, NUM_CLASSES)
    program = program_of(ControlVariates(), data, clients_per_round=2)
    state = program.initial_state(initial(), KEY)
    state = state.replace(
        client=jax.tree.map(np.array, state.client),
        client_model=jax.tree.map(np.array, state.client_model),
    )
    on_host = HostRounds(program)
    for number in range(ROUNDS):
        state, _, _ = on_host.run(data, KEY, state, number)
    expected = run(ControlVariates(), clients_per_round=2)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (state.model, state.server, state.client),
        (expected.model, expected.server, expected.client),
    )


def test_steps_features_keys_and_the_loss_are_seen():
    _, state, loss = run(Curious())
    model, noises = start(), []
    for number in range(ROUNDS):
        trained, losses = [], []
        for i in range(len(SIZES)):
            params, total = dict(model), 0.0
            for step, (x, label, mask) in enumerate(batches(i, number)):
                slope, value = gradient(params, x, label, mask)
                key = prng.at(prng.named(KEY, "hooks"), number, i, step)
                noise = np.asarray(jax.random.normal(key, (NUM_CLASSES,)))
                noises.append(tuple(noise.tolist()))
                slope["bias"] = slope["bias"] + step + noise
                slope["kernel"] = (
                    slope["kernel"] + x.mean(axis=0)[:, None] / NUM_CLASSES
                )
                params = {n: params[n] - LOCAL.learning_rate * slope[n] for n in params}
                total += value / LOCAL.steps
            trained.append(params)
            losses.append(total)
        model = mean(trained, range(len(SIZES)))
    close(state.model.params["dense"], model)
    np.testing.assert_allclose(loss, losses, rtol=1e-4)
    np.testing.assert_allclose(
        state.server, np.average(losses, weights=SIZES), rtol=1e-4
    )
    assert len(set(noises)) == len(noises)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["proximal", "distilled"])
@pytest.mark.parametrize("layout", [{}, {"at_once": 3}, {"clients_per_round": 2}])
def test_an_anchor_is_the_model_before_the_first_round_in_all_rounds(kind, layout):
    weight, temperature = 0.7, 2.0
    anchor = Anchor(kind, weight, temperature)
    program, state, _ = run(algorithms.FedAvg(), anchor=anchor, **layout)
    model, near = start(), start()
    for number in range(ROUNDS):
        (who,) = program.participation.participants(KEY, number)
        who, trained = who.tolist(), []
        for i in who:
            params = dict(model)
            for x, label, mask in batches(i, number):
                slope, _ = gradient(params, x, label, mask)
                if kind == "proximal":
                    pull = {n: weight * (params[n] - near[n]) for n in params}
                else:
                    own, told = (
                        softmax((x @ one["kernel"] + one["bias"]) / temperature)
                        for one in (params, near)
                    )
                    apart = weight * temperature * (own - told) * mask[:, None]
                    apart /= mask.sum()
                    pull = {"kernel": x.T @ apart, "bias": apart.sum(axis=0)}
                params = {
                    n: params[n] - LOCAL.learning_rate * (slope[n] + pull[n])
                    for n in params
                }
            trained.append(params)
        model = mean(trained, who)
    close(state.model.params["dense"], model)
    close(state.anchor.params["dense"], near)
    plain = run(algorithms.FedAvg(), **layout)[1].model
    assert trees.digest(plain) != trees.digest(state.model)
