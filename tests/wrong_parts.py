"""Parts of a study that a user got wrong, each in another way."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.heterofl import HeteroFL
from mosaic_jax.fl.uploads import Compressor, Rule
from mosaic_jax.server.base import ServerTraining
from tests import own_parts


class Undecorated(Algorithm):
    factor: float = 2.0


@dataclasses.dataclass(frozen=True)
class Bare(Algorithm):
    factor: float


@dataclasses.dataclass(frozen=True)
class Nameless(own_parts.Idle):
    after = "init"


# --- of one group


@dataclasses.dataclass(frozen=True)
class Doubled(own_parts.Idle):
    """Its name is that of an algorithm in `own_parts`."""

    name = "doubled"
    after = "init"


@dataclasses.dataclass(frozen=True)
class Partial(Algorithm):
    """Claims a group of the library."""

    group = "partial"


@dataclasses.dataclass(frozen=True)
class OwnHeteroFL(HeteroFL):
    """Not wrong: its fields are those of its base, in a group of its own."""


# --- at odds with other settings


@dataclasses.dataclass(frozen=True)
class PickyAlgorithm(Algorithm):
    def problems(self, study):
        if study.init.rounds < 100:
            yield f"init.rounds = {study.init.rounds}: must be >= 100 for this"


@dataclasses.dataclass(frozen=True)
class OwnProgram(Algorithm):
    """Not wrong: its clients do something else than local SGD."""

    def holdings(self, classifier, num_clients, rates):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PickyServer(ServerTraining):
    least: int = schema.at_least(1, default=100)

    def init(self, task, model, key):
        return ()

    def train(self, task, state, model, teachers, key, number):
        return state, model, {}

    def problems(self, study):
        yield f"init.rounds = {study.init.rounds}: must be >= {self.least} for it"


@dataclasses.dataclass(frozen=True)
class PickyStage(own_parts.Idle):
    name = "picky"
    after = "init"

    def problems(self, study):
        yield f"init.rounds = {study.init.rounds}: must be >= 100 for PickyStage"


# --- what is sent


@dataclasses.dataclass(frozen=True)
class All(Rule):
    """Uploads as they are, one by one."""

    def combine(self, upload, weight, attackers):
        return upload

    def most_attackers(self, clients):
        return 0


@dataclasses.dataclass(frozen=True)
class Half(Compressor):
    """Half of an array, and no more is read of it."""

    def encode(self, array, key):
        return array[::2]

    def decode(self, message, size):
        return message


# --- networks


class WithoutClasses(nn.Module):
    width: int = 4

    features = head = __call__ = own_parts.Patches.features


class WithoutHead(nn.Module):
    num_classes: int

    features = __call__ = own_parts.Patches.features


class WithDepth(own_parts.Patches):
    depth: int = dataclasses.field(kw_only=True)


class OneClassMore(own_parts.Patches):
    def head(self, features):
        return self.classes(features)[:, :1]


class FeaturesOnly(own_parts.Patches):
    def features(self, x, *, train, mask=None):
        return x


class WithoutMask(own_parts.Patches):
    def __call__(self, x, *, train):
        return self.head(self.features(x, train=train))


class FlaxNorm(own_parts.Patches):
    """Works, but its batch-norm does not tell a batch's own moments."""

    @nn.compact
    def features(self, x, *, train, mask=None):
        x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
        return nn.relu(self.first(x))


# --- functions


def returns_a_dict(directory):
    return {"train": directory}


def finds_nothing(directory):
    return (directory / "nothing.npz").read_bytes()


def one_argument(logits):
    return logits[:, 0]


def returns_a_mean(a_logits, b_logits):
    return jnp.mean((a_logits - b_logits) ** 2)


NUMBER = 3
