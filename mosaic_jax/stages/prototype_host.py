"""Rounds of prototypes where clients' models or images do not fit on the devices."""

from collections.abc import Iterator

import jax
import numpy as np

from mosaic_jax.core import programs, trees
from mosaic_jax.core.types import Array, FederatedDataset, Tree
from mosaic_jax.fl import parallel
from mosaic_jax.stages.host_rounds import ForTurns
from mosaic_jax.stages.prototype_federation import FederationState, PrototypeFederation
from mosaic_jax.stages.rounds import Metrics


class OnHost:
    """`PrototypeFederation` whose clients' models stay in host memory.

    One batch of clients is on the devices at a time; its results are read back while
    the next batch computes. Their images are gathered likewise, or every device holds
    all images.
    """

    def __init__(
        self, program: PrototypeFederation, in_host: FederatedDataset | None = None
    ) -> None:
        """Compile, on first use, the parts that run on the devices.

        Images are those of `in_host`, see `Context.in_host`; None: all are on devices.
        """
        self._program, self._turns_of = program, ForTurns(in_host)
        self._participants = programs.jit(program.participants)
        self._turns = programs.jit(program.turns, static_argnums=0)
        self._finish = programs.jit(program.finish)

    def run(
        self,
        data: FederatedDataset,
        key: jax.Array,
        state: FederationState,
        number: int,
    ) -> tuple[FederationState, np.ndarray, Metrics]:
        """Round `number`, as `PrototypeFederation.run`, changing models in place.

        Args:
          data: of all clients, on every device; without images where they are gathered.
          key: random key of all rounds.
          state: after the round before; leaves of `client` are NumPy arrays, which this
            call overwrites.
          number: of the round, over the study.

        Returns:
          As there, the losses [m] as NumPy array.
        """
        program = self._program
        prototypes = program.algorithm.prototypes(state.server)
        participants = [np.asarray(one) for one in self._participants(key, number)]
        losses, waiting = [], []

        def store(own: Tree, rows: np.ndarray, new: Tree, loss: Array) -> None:
            _put(own, rows, jax.device_get(new))
            losses.append(np.asarray(loss))

        for i, (own, everyone) in enumerate(
            zip(state.client, participants, strict=True)
        ):
            for rows in batches(program.axis, everyone):
                kept = program.axis.replicate(trees.take(own, rows))
                # While the batch before computes: its results are read below.
                axis, who = program.axis_of(len(rows)), program.members[i][rows]
                part = self._turns_of(axis, data, who)
                found = self._turns(i, part, key, prototypes, kept, number)
                waiting.append((own, rows, *found))
                if len(waiting) > 1:
                    store(*waiting.pop(0))
        store(*waiting.pop())
        sent = [
            trees.take((own.mean, own.count), rows)
            for own, rows in zip(state.client, participants, strict=True)
        ]
        loss = np.concatenate(losses)
        on_device, metrics = self._finish(
            state.replace(client=()), data, sent, loss, participants, key, number
        )
        return on_device.replace(client=state.client), loss, metrics


def batches(axis: parallel.ClientAxis, rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows` [m] in as many at a time as run at once."""
    size = axis.at_once * axis.num_devices
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _put(all_: Tree, rows: np.ndarray, new: Tree) -> None:
    """Write the entries `rows` of NumPy leaves [m, ...]."""

    def put(old: np.ndarray, new: np.ndarray) -> None:
        old[rows] = new

    jax.tree.map(put, all_, new)
