"""A study small enough for a test: real digits, two pixels' worth of network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import digits_mosaic
from mosaic_jax.core import prng
from mosaic_jax.core.types import Client, FederatedDataset, LabelledImages, ModelState
from mosaic_jax.fl import algorithms, parallel
from mosaic_jax.fl.client_program import Turn
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.fl.training import Local
from mosaic_jax.nn import norm, resnet
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run import settings
from mosaic_jax.stages.prototype_federation import PrototypeFederation
from mosaic_jax.stages.rounds import Rounds


def __getattr__(name):
    """`KEY`, made when it is asked for: processes of one study must join before."""
    if name == "KEY":
        return prng.root(0)
    raise AttributeError(name)


FIELDS = {
    "data.num_clients": 3,
    "data.alpha": 1.0,
    "data.validation": 0.7,
    "model.name": "cnn",
    "model.width": 2,
    "local.steps": 2,
    "local.batch_size": 16,
    "init.rounds": 4,
    "evaluation.every": 2,
    "generators.steps": 6,
    "generators.batch_size": 16,
    "generators.width": 2,
    "generators.collapse_below": 0.0,
    "experts.local_steps": 4,
    "prototypes.clusters": 3,
    "meta.steps": 6,
    "distill.steps": 6,
    "distill.pool": 0,
    "distill.own_classes": False,
    "distill.balanced": False,
    "distill.samples_per_generator": 8,
    "finetune.rounds": 4,
    "audit.images": 0,
    "log.every_steps": 2,
    "log.checkpoint_seconds": 0.0,
    "log.trackers": (),
    "compute.devices": 1,
}


# Changes of it: two rounds, and nothing after them.
SHORT = {
    "method": "federated",
    "init__rounds": 2,
    "warmup__rounds": 0,
    "finetune__rounds": 0,
    "evaluation__every": 1,
}


def config(**changes):
    """ConfigDict of the tiny study; changes as group__field=value.

    Without fine-tuning where `method` is "federated".
    """
    result = digits_mosaic.get_config()
    if changes.get("method") == "federated":
        changes = {"finetune__rounds": 0} | changes
    fields = FIELDS | {
        name.replace("__", "."): value for name, value in changes.items()
    }
    for name, value in fields.items():
        result.update_from_flattened_dict({name: value})
    return result


def study(**changes) -> settings.Settings:
    """Settings of the tiny study."""
    return settings.from_mapping(config(**changes).to_dict())


class Net(nn.Module):
    """One convolution with batch-norm and a linear layer: compiles in no time."""

    num_classes: int
    norm: str = "batch"

    def setup(self):
        self.conv = resnet.conv(4, 3, 2)
        self.bn = norm.NORMS[self.norm]()
        self.fc = resnet.Linear(self.num_classes)

    def features(self, x, *, train, mask=None):
        return nn.relu(self.bn(self.conv(x), train=train, mask=mask)).mean((1, 2))

    def head(self, features):
        return self.fc(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train, mask=mask))


def classifier(num_classes: int = 4, **fields) -> Classifier:
    """`Net` for grey images."""
    return Classifier(Net(num_classes, **fields), (0.4,), (0.3,))


def varied(network: Classifier, key) -> ModelState:
    """A model for images of 16 x 16 grey pixels, no two of whose numbers are equal."""
    # From clones of the key: tests draw their models from it again and again.
    model = jax.jit(network.init, static_argnums=1)(jax.random.clone(key), (16, 16, 1))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.clone(key), len(leaves))
    noise = [
        jax.random.uniform(one, leaf.shape, minval=0.01, maxval=0.1)
        for one, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(jnp.add, model, jax.tree.unflatten(structure, noise))


def dataset(sizes: list[int], num_classes: int = 4, pad: int = 0) -> FederatedDataset:
    """Random images, `sizes[i]` for client i; index rows `pad` longer than needed."""
    np_rng = np.random.RandomState(0)
    total = sum(sizes)
    image = np_rng.randint(0, 256, (total, 16, 16, 1)).astype(np.uint8)
    label = np_rng.randint(0, num_classes, total).astype(np.int32)
    parts = np.split(np.arange(total), np.cumsum(sizes)[:-1])
    index = np.stack([np.resize(part, max(sizes) + pad) for part in parts])
    count = np.stack([np.bincount(label[p], minlength=num_classes) for p in parts])
    return FederatedDataset(
        LabelledImages(jnp.asarray(image), jnp.asarray(label)),
        Client(
            number=jnp.arange(len(sizes), dtype=jnp.int32),
            index=jnp.asarray(index, jnp.int32),
            size=jnp.asarray(sizes, jnp.int32),
            label_count=jnp.asarray(count, jnp.int32),
        ),
    )


LOCAL = Local(steps=3, batch_size=8, learning_rate=0.01, weight_decay=1e-3)


def rounds(axis, algorithm=None, network=None, rates=(), **fields) -> Rounds:
    """Rounds of all clients of `axis`, each with its rate's part of the network."""
    algorithm = algorithm or algorithms.FedAvg()
    network = network or classifier()
    fields = {"local": LOCAL, "augmentation": "none", "keep_models": True} | fields
    return Rounds(
        algorithm=algorithm,
        holdings=algorithm.holdings(network, axis.num_clients, tuple(rates)),
        axis=axis,
        **fields,
    )


def federation(algorithm, networks=None, *, axis, **fields) -> PrototypeFederation:
    """Rounds of prototypes of all clients of `axis`; `networks` are dealt in turn."""
    networks = networks or (classifier(),)
    numbers = np.arange(axis.num_clients)
    fields = {"local": LOCAL, "augmentation": "none"} | fields
    return PrototypeFederation(
        algorithm=algorithm,
        classifiers=networks,
        members=[numbers[i :: len(networks)] for i in range(len(networks))],
        axis=axis,
        image_shape=(16, 16, 1),
        num_classes=networks[0].module.num_classes,
        **fields,
    )


def run_rounds(algorithm, count=2, *, data, network=None, **fields):
    """State after `count` rounds on one device, and the losses of the last."""
    axis = parallel.build(np.asarray(data.client.size), num_devices=1)
    network = network or classifier()
    program = rounds(axis, algorithm, network, **{"keep_models": False} | fields)
    model = network.init(prng.named(prng.root(0), "model"), (16, 16, 1))
    state = program.initial_state(model, prng.root(0))
    step = jax.jit(functools.partial(program.run, axis.place(data), prng.root(0)))
    for number in range(count):
        state, loss, _ = step(state, number)
    return state, loss


def turn(model=None, state=(), label_count=None, number=0) -> Turn:
    """What an algorithm's hooks see of a client in round `number`."""
    client = Client(jnp.array(0), jnp.array([0]), jnp.array(1), label_count)
    return Turn(model, {}, client, state, jnp.array(number), prng.root(0), LOCAL)


def seen(**fields) -> Seen:
    """What a loss may look at; fields as of `turn`."""
    number, key = jnp.array(0), prng.root(0)
    return Seen(turn(**fields), None, None, number, key, classifier())


def are_close(found, expected):
    """Whether two trees are equal up to rounding."""
    try:
        close(found, expected)
    except AssertionError:
        return False
    return True


def close(found, expected, rtol=1e-5):
    """Check that two trees are equal up to rounding."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5),
        found,
        expected,
    )
