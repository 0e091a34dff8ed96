"""Clients that hold, train and send parts of one network, by their rates.

As HeteroFL (Diao et al., 2021) does it, for whichever channels an algorithm chooses.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from mosaic_jax.core import prng, trees
from mosaic_jax.core.types import Array, Batch, Client, ModelState, Tree
from mosaic_jax.fl.client_program import ClientProgram, Result, Traffic, Turn
from mosaic_jax.fl.holdings import Group, Holdings
from mosaic_jax.fl.local_sgd import LocalSGD
from mosaic_jax.fl.training import Local
from mosaic_jax.nn import norm, submodel
from mosaic_jax.nn.classifier import Classifier

if TYPE_CHECKING:
    from mosaic_jax.fl.algorithms.partial import PartialTraining


@dataclasses.dataclass(frozen=True)
class PartsOfNetwork(Holdings):
    """Parts of the network of `classifier`; "wide" is all of it.

    Attributes:
      classifier: wide.
      algorithm: says which channels, and scales.
      rates: of each client, in (0, 1].
    """

    classifier: Classifier
    algorithm: "PartialTraining"
    rates: tuple[float, ...]

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Clients that hold networks of one size; the largest first."""
        rates = np.array(self.rates)
        found = sorted(set(rates.tolist()), reverse=True)
        return [Group(rate, np.flatnonzero(rates == rate)) for rate in found]

    def program(self, rate: float, local: Local) -> ClientProgram:
        """Local SGD on the part of the network that clients of `rate` hold."""
        narrow = self.classifier_of(rate)
        return NarrowSGD(self, rate, LocalSGD(narrow, self.algorithm, local))

    def combine(self, mean_upload: Tree, model: ModelState) -> Tree:
        """Every parameter's mean over the clients that hold it.

        Args:
          mean_upload: a `submodel.Part`: weighted sums of values and of who holds them.
          model: global, whose values stay where nobody holds a parameter.
        """
        return submodel.merge(mean_upload, model)

    def forward_flops(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """FLOPs of one image [C], by each client's rate."""
        of_rate = {
            rate: self.classifier_of(rate).flops(image_shape)
            for rate in set(self.rates)
        }
        return np.array([of_rate[rate] for rate in self.rates])

    @property
    def recalibrates(self) -> bool:
        """Whether clients are asked for batch-norm statistics of the global model."""
        return self.algorithm.batch_norm == "static"

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
        """Channels that a client holds in a round, by space.

        Spaces that it holds all channels of are left out.

        Args:
          key: random key of all rounds.
          number: [] int32, number of the round.
          client: [] int32, number of the client.
          rate: of the client.
        """
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

    def mask(
        self, model: ModelState, client: Client, key: Array, number: Array, rate: float
    ) -> ModelState:
        """The mask of the parameters that one client trains; see `submodel.Part`.

        Args:
          model: with the wide shapes.
          client: the client.
          key: random key of all rounds.
          number: [] int32, number of the round.
          rate: of the client.
        """
        channels = self.channels(key, number, client.number, rate)
        masks = submodel.masks(channels, self._widths)
        present = self.algorithm.present(client.label_count)
        if present is not None:
            masks[submodel.CLASSES] = present.astype(jnp.float32)
        return submodel.held(model, self._spaces, masks)

    def masks(
        self, model: ModelState, client: Client, key: Array, number: Array
    ) -> ModelState:
        """`mask` of all clients, leaves [C, ...], in their order.

        Args:
          model: with the wide shapes.
          client: all clients, leaves [C, ...].
          key: random key of all rounds.
          number: [] or [C] int32, number of the round of each client.
        """
        number = jnp.broadcast_to(jnp.asarray(number), client.size.shape)
        parts = [
            jax.vmap(
                lambda one, number, rate=group.rate: self.mask(
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


@dataclasses.dataclass(frozen=True)
class NarrowSGD(ClientProgram):
    """A client's turn on a narrow network, from and to the wide one.

    Attributes:
      holdings: that the client has a part in.
      rate: of the client.
      inner: what it does with the narrow network.
    """

    holdings: PartsOfNetwork
    rate: float
    inner: LocalSGD

    def init(self, turn: Turn) -> Tree:
        """The narrow model and the optimiser's state."""
        return self.inner.init(self._cut(turn))

    def step(
        self, turn: Turn, carry: Tree, batch: Batch, step: Array
    ) -> tuple[Tree, Array]:
        """One step; running statistics become the plain mean over the steps so far."""
        old = carry[0]
        (model, opt_state), loss = self.inner.step(self._cut(turn), carry, batch, step)
        if self.holdings.recalibrates:
            statistics = jax.tree.map(
                lambda a, b: norm.cumulative(a, b, step),
                old.batch_stats,
                model.batch_stats,
            )
            model = model.replace(batch_stats=statistics)
        return (model, opt_state), loss

    def final(self, turn: Turn, carry: Tree, loss: Array) -> Result:
        """A wide `submodel.Part` as the upload, and the model padded with zeros."""
        held, channels = self.holdings, self._channels(turn)
        found = self.inner.final(self._cut(turn), carry, loss)
        mask = held.mask(turn.model, turn.client, turn.key, turn.number, self.rate)
        upload = held.paste(found.upload, channels)
        return Result(
            upload=submodel.Part(submodel.within(upload, mask), mask),
            model=held.paste(found.model, channels),
            state=found.state,
        )

    def traffic(self, image_shape: tuple[int, int, int], client: Client) -> Traffic:
        """The narrow network one way, the upload the other."""
        return self.inner.traffic(image_shape, client)

    def _cut(self, turn: Turn) -> Turn:
        """The turn of the narrow network, kept near the same part of the anchor."""
        channels = self._channels(turn)
        anchor = self.holdings.cut(turn.anchor, channels) if turn.anchor else {}
        return turn.replace(
            model=self.holdings.cut(turn.model, channels), anchor=anchor
        )

    def _channels(self, turn: Turn) -> submodel.Channels:
        return self.holdings.channels(
            turn.key, turn.number, turn.client.number, self.rate
        )
