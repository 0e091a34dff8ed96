"""What HeteroFL, FedRolex and Federated Dropout share: clients with narrow networks."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax import settings
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.models import norm
from mosaic_jax.types import Array, Tree


@dataclasses.dataclass(frozen=True)
class PartialTraining(Algorithm):
    """Every parameter is averaged over the clients that hold it (Diao et al., 2021).

    A client at rate r trains ceil(r w) channels of each hidden layer of w; which ones,
    `channels` tells. Parameters that nobody holds keep their values.

    Attributes:
      batch_norm: "static": training keeps no running statistics of the global model; it
        is sent to the clients before it is used or measured, and each answers with its
        moments on the client's batches. "running": the usual ones, averaged like
        parameters, which mixes moments of networks of unlike widths.
      scaler: convolutions' outputs are divided by r in training.
      weighting: of clients in the mean: "size", by their images, or "uniform", as in
        HeteroFL's code.
      masked_loss: logits of classes that a client lacks are 0 in its loss, and its rows
        of the classifier for them do not count in the mean.
    """

    batch_norm: str = settings.one_of("static", "running")
    scaler: bool = settings.anything()
    weighting: str = settings.one_of("size", "uniform")
    masked_loss: bool = settings.anything()

    partial = True

    @property
    def queries(self) -> bool:
        """By `batch_norm`."""
        return self.batch_norm == "static"

    def present(self, label_count: Array) -> Array | None:
        """Those that the client has images of, with the masked loss."""
        return label_count > 0 if self.masked_loss else None

    def weight(self, size: Array) -> Array:
        """By `weighting`; a client without images has none."""
        return jnp.sign(size) if self.weighting == "uniform" else size

    def logits(self, logits: Array, label_count: Array, number: Array) -> Array:
        """0 for classes that the client lacks, with the masked loss."""
        del number
        return (
            jnp.where(label_count[None] > 0, logits, 0) if self.masked_loss else logits
        )

    def batch_stats(self, old: Tree, new: Tree, step: Array) -> Tree:
        """By `batch_norm`."""
        if self.batch_norm == "running":
            return new
        return jax.tree.map(lambda a, b: norm.cumulative(a, b, step), old, new)
