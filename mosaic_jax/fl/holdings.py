"""Which part of the global network each client holds, and what it does in a round.

Here every client holds all of it; in `fl/parts.py` clients hold parts of it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.fl.client_program import ClientProgram
from mosaic_jax.fl.local_sgd import Hooks
from mosaic_jax.fl.training import Local
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Group:
    """Clients `members` [m] int that hold networks of the same `rate`, in (0, 1]."""

    rate: float
    members: np.ndarray


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` participants come from each group of clients.

    They are in proportion to the groups' `sizes`, rounded so that they sum to `count`.
    """
    ends = np.cumsum(sizes) * (count / sum(sizes))
    return np.diff(np.rint(ends).astype(int), prepend=0).tolist()


class Holdings:
    """What the clients of a study hold of the global network.

    Attributes:
      classifier: of the global model.
      recalibrates: batch-norm statistics of the global model are not averaged; clients
        are asked for them before the model is used.
    """

    classifier: Classifier
    recalibrates: bool = False

    @property
    def groups(self) -> list[Group]:
        """Clients that are batched together, as networks of one size."""
        raise NotImplementedError

    def program(self, rate: float, local: Local) -> ClientProgram:
        """What a client of the group of this `rate` does in a round, by `local` SGD."""
        raise NotImplementedError

    def combine(self, mean_upload: Tree, model: ModelState) -> Tree:
        """The mean upload as the algorithm aggregates it.

        Args:
          mean_upload: weighted mean over clients of what their programs left.
          model: global, of the round before.
        """
        del model
        return mean_upload

    def forward_flops(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """FLOPs of one image's logits in each client's network, [C]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WholeNetwork(Holdings):
    """Every client holds, trains and sends all of it."""

    classifier: Classifier
    algorithm: Hooks
    num_clients: int

    @property
    def groups(self) -> list[Group]:
        """A single group: all clients, at rate 1."""
        return [Group(1.0, np.arange(self.num_clients))]

    def program(self, rate: float, local: Local) -> ClientProgram:
        """Local SGD as the algorithm has it; `rate` is 1."""
        del rate
        return self.algorithm.program(self.classifier, local)

    def forward_flops(self, image_shape: tuple[int, int, int]) -> np.ndarray:
        """The same number for every client: FLOPs of the whole network."""
        return np.full(self.num_clients, self.classifier.flops(image_shape))
