"""A study small enough for a test: real digits, two pixels' worth of network."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from configs import digits_mosaic
from mosaic_jax import settings
from mosaic_jax.classifier import Classifier
from mosaic_jax.models import norm, resnet
from mosaic_jax.types import Client, FederatedDataset, LabelledImages

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
    "distill.samples_per_generator": 8,
    "finetune.rounds": 4,
    "audit.images": 0,
    "log.every_steps": 2,
    "log.checkpoint_seconds": 0.0,
    "log.tensorboard": False,
    "compute.devices": 1,
}


def config(**changes):
    """ConfigDict of the tiny study; changes as group__field=value."""
    result = digits_mosaic.get_config()
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

    def setup(self):
        self.conv = resnet.conv(4, 3, 2)
        self.bn = norm.BatchNorm()
        self.fc = resnet.Linear(self.num_classes)

    def features(self, x, *, train, mask=None):
        return nn.relu(self.bn(self.conv(x), train=train, mask=mask)).mean((1, 2))

    def head(self, features):
        return self.fc(features)

    def __call__(self, x, *, train, mask=None):
        return self.head(self.features(x, train=train, mask=mask))


def classifier(num_classes: int = 4) -> Classifier:
    """`Net` for grey images."""
    return Classifier(Net(num_classes), (0.4,), (0.3,))


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
