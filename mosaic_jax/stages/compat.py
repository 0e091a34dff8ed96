"""Settings that only studies of the published code of Mosaic (`:published`) need."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mosaic_jax.core import schema


@dataclasses.dataclass(frozen=True)
class Compat(schema.Group):
    """Choices of the published code that this library makes otherwise by default."""

    generators_first: bool = schema.anything(
        default=False, meaning="clients train their GANs before the first round"
    )
    fresh_classifier: bool = schema.anything(
        default=False,
        meaning="a classifier trained for it shapes a GAN, not the client's model",
    )
    classifier_epochs: int = schema.at_least(
        1, default=50, meaning="epochs of training a fresh classifier"
    )
    classifier_batch_norm: str = schema.one_of(
        ("eval", "train"),
        default="eval",
        meaning="of the GAN's classifier; train: moments of the generated images",
    )
    diversity_target: str = schema.one_of(
        ("labels", "uniform"),
        default="labels",
        meaning="classes that a client's samples spread over: its own shares, or all",
    )
    value_range: str = schema.one_of(
        ("signed", "normalised"),
        default="signed",
        meaning="of images in a GAN; normalised: reals are, and tanh counts as such",
    )
    ema_debiased: bool = schema.anything(
        default=True, meaning="False: the head's running mean starts at its random init"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """GANs that are trained before the first round have no client model to use."""
        weight = study.generators.inversion_weight
        if self.generators_first and not self.fresh_classifier:
            yield (
                "compat.fresh_classifier = False: must be True for"
                " compat.generators_first, when no client model exists"
            )
        if self.generators_first and weight > 0:
            yield (
                f"generators.inversion_weight = {weight}: must be 0 for"
                " compat.generators_first, when no global model exists"
            )
