"""What HeteroFL, FedRolex and Federated Dropout share: clients with narrow networks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from mosaic_jax.core import schema
from mosaic_jax.core.types import Array
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.fl.parts import PartsOfNetwork
from mosaic_jax.nn import networks
from mosaic_jax.nn.classifier import Classifier

# What a network must have so that parts of it can be held.
NEEDED = ("rate", "scale", "widths", "spaces")


@dataclasses.dataclass(frozen=True)
class PartialTraining(Algorithm):
    """Every parameter is averaged over the clients that hold it (Diao et al., 2021).

    A client at rate r trains ceil(r w) channels of each hidden layer of w; which ones,
    `channels` tells. Parameters that nobody holds keep their values.

    With batch_norm "static", training keeps no running statistics of the global model;
    it is sent to the clients before it is used or measured, and each answers with its
    moments on its batches. "running" averages the usual ones like parameters,
    which mixes moments of networks of unlike widths. With `masked_loss`, the rows of a
    client's classifier for classes that it lacks do not count in the mean.
    """

    group = "partial"

    batch_norm: str = schema.one_of(
        ("static", "running"),
        default="static",
        meaning="static: moments asked of the clients; running: averaged ones",
    )
    scaler: bool = schema.anything(
        default=True, meaning="outputs of convolutions are divided by r in training"
    )
    weighting: str = schema.one_of(
        ("size", "uniform"),
        default="size",
        meaning="of clients in the mean; uniform: as in HeteroFL's code",
    )
    masked_loss: bool = schema.anything(
        default=False, meaning="logits of classes that a client lacks are 0 in its loss"
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Settings of the network that clients cannot hold parts of."""
        model, method = study.model, f"init.method = {study.init.method!r}"
        if self.sends_state:
            yield (
                f"{method}: sends_state must be False where clients hold parts of the"
                " network: nothing cuts the server's state"
            )
        if model.norm != "batch":
            yield (
                f"model.norm = {model.norm!r}: must be batch for {method}, whose"
                " clients lack channels of a group"
            )
        if model.others:
            yield (
                f"model.others = {model.others}: must be () for {method}, whose"
                " clients hold parts of one network"
            )
        if model.rate != 1:
            yield (
                f"model.rate = {model.rate}: must be 1 for {method}: budgets say what"
                " clients hold"
            )
        network = networks.class_of(model.name)
        missing = [name for name in NEEDED if not hasattr(network, name)]
        if missing:
            yield (
                f"model.name = {model.name!r}: must have {', '.join(missing)}, as"
                f" mosaic_jax.nn.cnn.CNN has, for {method}, whose clients hold parts"
                " of it"
            )

    def channels(self, key: Array, number: Array, width: int, kept: int) -> Array:
        """The `kept` channels [kept] of `width` that a client holds in a round.

        Args:
          key: of the study, the client, the round and the layer.
          number: int32 [] of the round.
          width: channels of the whole layer.
          kept: of these that the client holds.
        """
        raise NotImplementedError

    def present(self, label_count: Array) -> Array | None:
        """Classes [K] bool whose rows of the classifier a client trains; None: all.

        Those that the client has images of, with the masked loss.
        """
        return label_count > 0 if self.masked_loss else None

    def weight(self, size: Array) -> Array:
        """By `weighting`; a client without images has none."""
        return jnp.sign(size) if self.weighting == "uniform" else size

    def logits(self, logits: Array, seen: Seen) -> Array:
        """0 for classes that the client lacks, with the masked loss."""
        if not self.masked_loss:
            return logits
        return jnp.where(seen.turn.client.label_count[None] > 0, logits, 0)

    def holdings(
        self, classifier: Classifier, num_clients: int, rates: tuple[float, ...]
    ) -> PartsOfNetwork:
        """Parts of the network, by the clients' rates.

        Args:
          classifier: of the global model.
          num_clients: C.
          rates: [C] of the clients, in (0, 1].
        """
        del num_clients
        return PartsOfNetwork(classifier, self, rates)
