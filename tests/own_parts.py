"""Parts of a study that a user brings along, outside of the library."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import schema, trees
from mosaic_jax.data.dataset import Arrays
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.uploads import Attack, Compressor, Rule
from mosaic_jax.server.base import ServerTraining
from mosaic_jax.stages.base import Outcome, Stage


@dataclasses.dataclass(frozen=True)
class Halfway(Stage):
    """Between the global model of the rounds and the distilled student."""

    name = "halfway"
    after = "distill"

    weight: float = schema.between(0, 1, default=0.5, meaning="of the student")

    def needs(self, study):
        return ("global_model", "student")

    def provides(self, study):
        return ("halfway_model",)

    def template(self, blueprint):
        return {"halfway_model": blueprint.model}

    def run(self, context, global_model, student):
        yield from ()
        mean = jax.tree.map(
            lambda one, other: (1 - self.weight) * one + self.weight * other,
            global_model,
            student,
        )
        number = {"mean": self.weight, "low": 0.0, "high": 1.0, "meaning": "weight"}
        return Outcome(artifacts={"halfway_model": mean}, headline={"halfway": number})


@dataclasses.dataclass(frozen=True)
class AfterHalfway(Stage):
    """A second stage, after the user's first."""

    name = "after_halfway"
    after = "halfway"

    def needs(self, study):
        return ("halfway_model",)

    def run(self, context, halfway_model):
        yield from ()
        return Outcome(artifacts={})


class Idle(Stage):
    def run(self, context, **artifacts):
        yield from ()


@dataclasses.dataclass(frozen=True)
class NotThere(Idle):
    name = "lost"
    after = "distil"


@dataclasses.dataclass(frozen=True)
class NamedLikeAGroup(Idle):
    name = "local"
    after = "init"


@dataclasses.dataclass(frozen=True)
class NamedLikeAnother(Idle):
    name = "reference"
    after = "init"


class Undecorated(Stage):
    name = "undecorated"
    after = "init"


@dataclasses.dataclass(frozen=True)
class TooEarly(Idle):
    name = "too_early"
    after = "init"

    def needs(self, study):
        return ("student",)


class Patches(nn.Module):
    """Two layers over all pixels, without batch-norm."""

    num_classes: int
    width: int = 4

    def setup(self):
        self.first = nn.Dense(self.width)
        self.classes = nn.Dense(self.num_classes)

    def features(self, x, *, train, mask=None):
        return nn.relu(self.first(x.reshape(len(x), -1)))

    def head(self, features):
        return self.classes(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train, mask=mask))


@dataclasses.dataclass(frozen=True)
class Largest(Rule):
    """The upload of the client with the largest weight."""

    times: float = schema.above(0, default=1.0, meaning="that")

    def combine(self, upload, weight, attackers):
        best = jnp.argmax(weight)
        return jax.tree.map(lambda leaf: self.times * leaf[best], upload)

    def most_attackers(self, clients):
        return clients


@dataclasses.dataclass(frozen=True)
class Silence(Attack):
    """Nothing new, times a factor."""

    times: float = schema.at_least(0, default=0.0, meaning="of the update")

    def updates(self, update, attackers, key):
        return jax.tree.map(lambda leaf: self.times * leaf, update)


@dataclasses.dataclass(frozen=True)
class Halves(Compressor):
    """Half precision."""

    times: float = schema.above(0, default=1.0, meaning="before rounding")

    def encode(self, array, key):
        return (self.times * array).astype(jnp.float16)

    def decode(self, message, size):
        return message.astype(jnp.float32) / self.times


@dataclasses.dataclass(frozen=True)
class Doubled(Algorithm):
    """Weights of clients times a factor: FedAvg for any."""

    factor: float = schema.above(0, default=2.0, meaning="of the weights")

    def weight(self, size):
        return self.factor * size


@dataclasses.dataclass(frozen=True)
class Shrink(ServerTraining):
    """The aggregate, shrunk."""

    when = "once"
    by: float = schema.between(0, 1, default=0.5, meaning="of every parameter")

    def init(self, task, model, key):
        return ()

    def train(self, task, state, model, teachers, key, number):
        params = jax.tree.map(lambda leaf: self.by * leaf, model.params)
        return state, model.replace(params=params), {}


def stripes(directory):
    """Four classes of 16 x 16 images, told apart by where they are bright."""
    np_rng = np.random.RandomState(0)

    def draw(count):
        label = np.arange(count) % 4
        image = np_rng.randint(0, 100, (count, 16, 16, 1))
        for number, one in enumerate(label):
            image[number, :, 4 * one : 4 * one + 4] += 150
        return image.astype(np.uint8), label

    return Arrays(*draw(120), *draw(40))


def square(a_logits, b_logits):
    """Mean squared difference of logits [B, K], [B]."""
    return jnp.mean((a_logits - b_logits) ** 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class First(Stage):
    """The first of two stages that follow the same one; it needs clients' models."""

    name = "first"
    after = "init"

    def needs(self, study):
        return ("client_models",)

    def run(self, context, client_models):
        yield from ()
        return Outcome(artifacts={})


@dataclasses.dataclass(frozen=True)
class Second(Stage):
    """The second of them."""

    name = "second"
    after = "init"

    def run(self, context):
        yield from ()
        return Outcome(artifacts={})


@dataclasses.dataclass(frozen=True)
class Breaks(Stage):
    """Says that it provides a number, and returns something else, by `how`."""

    name = "breaks"
    after = "init"

    how: str = schema.one_of(
        ("other", "more", "shape", "headline", "results"), default="other", meaning=""
    )

    def provides(self, study):
        return ("number",)

    def template(self, blueprint):
        return {"number": trees.shape((), jnp.float32)}

    def run(self, context):
        yield from ()
        found = {"number": jnp.zeros(())}
        changes = {
            "other": {"artifacts": {"global_model": jnp.zeros(())}},
            "more": {"artifacts": found | {"global_model": jnp.zeros(())}},
            "shape": {"artifacts": {"number": jnp.zeros(3)}},
            "headline": {"headline": {"x": {"mean": 0.5}}},
            "results": {"results": {"x": jnp.zeros(())}},
        }
        return Outcome(**({"artifacts": found} | changes[self.how]))


@dataclasses.dataclass(frozen=True)
class Untold(Idle):
    """Provides what its template does not have."""

    name = "untold"
    after = "init"

    def provides(self, study):
        return ("number",)


@dataclasses.dataclass(frozen=True)
class Judges(Stage):
    """Reads what trains on the server."""

    name = "judges"
    after = "init"

    def reads(self, study):
        return ("server.method",)

    def run(self, context):
        yield from ()
        return Outcome(artifacts={})
