"""Which part of the network each client holds, by its rate and the algorithm."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from mosaic_jax import prng, trees
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.models import submodel
from mosaic_jax.types import Array, Client, ModelState


@dataclasses.dataclass(frozen=True)
class Group:
    """Clients `members` [m] int that hold networks of the same `rate`."""

    rate: float
    members: np.ndarray


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts of the network of `classifier`; "wide" is all of it.

    Attributes:
      classifier: wide.
      algorithm: says which channels, and scales.
      rates: of each client.
    """

    classifier: Classifier
    algorithm: Algorithm
    rates: tuple[float, ...]

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Clients that hold networks of one size; the largest first."""
        rates = np.array(self.rates)
        found = sorted(set(rates.tolist()), reverse=True)
        return [Group(rate, np.flatnonzero(rates == rate)) for rate in found]

    def classifier_of(self, rate: float, *, scaled: bool = True) -> Classifier:
        """The classifier that a client at `rate` trains, with the scaler or without."""
        if rate == 1:
            return self.classifier
        scale = 1 / rate if scaled and self.algorithm.scaler else 1.0
        module = self.classifier.module.clone(rate=rate, scale=scale)
        return dataclasses.replace(self.classifier, module=module)

    def channels(
        self, key: Array, number: Array, client: Array, rate: float
    ) -> submodel.Channels:
        """What client number `client` at `rate` holds in round `number`."""
        if rate == 1:
            return {}
        result, key = {}, prng.named(key, "channels")
        for space, width in self._widths.items():
            count = submodel.kept(width, rate)
            draw = prng.at(prng.named(key, space), number, client)
            if count < width:
                result[space] = self.algorithm.channels(draw, number, width, count)
        return result

    def cut(self, model: ModelState, channels: submodel.Channels) -> ModelState:
        """The narrow network of `channels`."""
        return submodel.cut(model, self._spaces, channels) if channels else model

    def paste(self, model: ModelState, channels: submodel.Channels) -> ModelState:
        """The wide network that is zero outside of `channels`."""
        if not channels:
            return model
        return submodel.paste(model, self._spaces, channels, self._widths)

    def share(
        self, model: ModelState, client: Client, key: Array, number: Array, rate: float
    ) -> ModelState:
        """1 where one client trains the wide `model` in round `number`, else 0."""
        channels = self.channels(key, number, client.number, rate)
        masks = submodel.masks(channels, self._widths)
        present = self.algorithm.present(client.label_count)
        if present is not None:
            masks[submodel.CLASSES] = present.astype(jnp.float32)
        return submodel.held(model, self._spaces, masks)

    def share_of_all(
        self, model: ModelState, client: Client, key: Array, number: Array
    ) -> ModelState:
        """`share` of every client [C, ...], in their order; `number` [] or [C]."""
        number = jnp.broadcast_to(jnp.asarray(number), client.size.shape)
        parts = [
            jax.vmap(
                lambda one, number, rate=group.rate: self.share(
                    model, one, key, number, rate
                )
            )(*trees.take((client, number), group.members))
            for group in self.groups
        ]
        order = np.argsort(np.concatenate([group.members for group in self.groups]))
        return trees.take(trees.concatenate(parts), order)

    def budgets(self, image_shape: tuple[int, int, int]) -> list[dict[str, Any]]:
        """What a client of each group holds, sends and computes for an image."""
        rows = []
        for group in self.groups:
            narrow = self.classifier_of(group.rate)
            init = functools.partial(narrow.init, image_shape=image_shape)
            model = jax.eval_shape(init, prng.root(0))
            rows.append(
                {
                    "rate": group.rate,
                    "clients": group.members.tolist(),
                    "num_parameters": int(
                        parameter_overview.count_parameters(model.params)
                    ),
                    "bytes": trees.num_bytes(model),
                    "flops": narrow.flops(image_shape),
                }
            )
        return rows

    # Read where a client's part is narrow only: other networks need not have them.

    @property
    def _spaces(self) -> submodel.Spaces:
        return self.classifier.module.spaces

    @property
    def _widths(self) -> dict[str, int]:
        return self.classifier.module.widths
