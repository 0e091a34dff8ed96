"""Networks (flax linen): classifiers, the DCGAN pair and the meta heads."""

import flax.linen as nn

from mosaic_jax.models import cnn, resnet

Module = nn.Module


def build_classifier(
    name: str,
    num_classes: int,
    *,
    width: int,
    dtype: str,
    lowering: str,
    norm: str,
    rate: float,
) -> Module:
    """The classifier called `name`: "cnn" or a key of `resnet.DEPTHS`."""
    kind = (width, dtype, lowering, norm, rate)
    if name == "cnn":
        return cnn.CNN(num_classes, *kind)
    return resnet.ResNet(num_classes, name, *kind)
