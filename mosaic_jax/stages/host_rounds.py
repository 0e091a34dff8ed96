"""Rounds of studies whose clients' states or images do not fit on the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import programs, trees
from mosaic_jax.core.steps import DIVERGED_CLIENT
from mosaic_jax.core.types import Array, FederatedDataset, ServerState, Tree
from mosaic_jax.fl import parallel
from mosaic_jax.stages.rounds import Metrics, Rounds, first_diverged

# Fields of the state that stay in host memory, in the order in which clients return
# what they keep.
IN_HOST = ("client", "error", "client_model")


class HostRounds:
    """`Rounds` whose client states and models stay in host memory, as NumPy arrays.

    One batch of clients is on the devices at a time; its results are read back while
    the next batch computes. Their images are gathered likewise, or every device holds
    all images.
    """

    def __init__(self, rounds: Rounds, in_host: FederatedDataset | None = None) -> None:
        """Compile, on first use, the parts of `rounds` that run on the devices.

        Images are those of `in_host`, see `Context.in_host`; None: all are on devices.
        """
        self._rounds = rounds
        self._turnout = programs.jit(rounds.participation.turnout)
        self._finish = programs.jit(rounds.finish)

        # What it returns depends on `keeps`: a rehearsal tells programs apart by what
        # they are given.
        @functools.partial(programs.jit, static_argnames=("rate", "keeps"))
        def run_clients(data, key, sent, client_state, number, total, rate, keeps):
            del keeps
            axis, client = rounds.axis.of(data.num_clients), data.client
            return rounds.clients(
                axis, data, key, sent, client, client_state, number, total, rate
            )

        self._run_clients = run_clients
        self._turns_of = ForTurns(in_host)

    def run(
        self, data: FederatedDataset, key: jax.Array, state: ServerState, number: int
    ) -> tuple[ServerState, np.ndarray, Metrics]:
        """Round `number`, as `Rounds.run`, but changing the clients' states in place.

        Args:
          data: of all clients, on every device; without images where they are gathered.
          key: random key of all rounds.
          state: after the round before; the fields `IN_HOST` are NumPy arrays, which
            this call overwrites.
          number: of the round, over the study.

        Returns:
          As `Rounds.run`, the losses [m] as NumPy array.
        """
        axis = self._rounds.axis
        turnout = self._turnout(data.client, key, number)
        who = came = np.asarray(turnout.who)
        if turnout.arrived is not None:
            came = who[np.asarray(turnout.arrived)]
        size = axis.at_once * axis.num_devices
        batches = [
            (np.asarray(who)[first : first + size], group.rate)
            for group, who in zip(
                self._rounds.groups, turnout.participants, strict=True
            )
            for first in range(0, len(who), size)
        ]
        sent = self._rounds.sent(state)
        uploads, loss, teachers = [], [], []
        waiting: tuple[np.ndarray, Tree, Array] | None = None
        for rows, rate in batches:
            kept = trees.take((state.client, state.error), rows)
            client_state = axis.replicate(kept)
            # While the batch before computes: its results are read further below.
            part = self._turns_of(axis.of(len(rows)), data, rows)
            results, batch_loss, batch_teachers, upload = self._run_clients(
                part,
                key,
                sent,
                client_state,
                number,
                turnout.total,
                rate,
                keeps=self._rounds.keep_models,
            )
            teachers.append(batch_teachers)
            uploads.append(upload)
            if waiting is not None:
                loss.append(_store(state, came, *waiting))
                if not self._rounds.sending.needs_each:
                    uploads = [self._rounds.joined(uploads)]
            waiting = rows, results, batch_loss
        assert waiting is not None  # every group has clients in every round
        loss.append(_store(state, came, *waiting))
        teachers = trees.concatenate(teachers)
        in_host = {name: getattr(state, name) for name in IN_HOST}
        on_device, metrics = self._finish(
            state.replace(**dict.fromkeys(IN_HOST, ())),
            self._rounds.joined(uploads),
            teachers,
            key,
            number,
            turnout,
        )
        state = on_device.replace(**in_host)
        loss = np.concatenate(loss)
        last_round = jnp.asarray(state.last_round).at[came].set(number)
        state = state.replace(last_round=last_round)
        return state, loss, metrics | {DIVERGED_CLIENT: first_diverged(loss, who)}


class ForTurns:
    """Finds the data of those clients whose turn it is."""

    def __init__(self, in_host: FederatedDataset | None) -> None:
        """Images are gathered from `in_host`; None: all are on the devices."""
        self._in_host, self._take = in_host, programs.jit(trees.take)

    def __call__(
        self, axis: parallel.ClientAxis, data: FederatedDataset, rows: np.ndarray
    ) -> FederatedDataset:
        """The data of m clients, on the devices.

        Args:
          axis: the layout of these clients.
          data: of all clients, on the devices.
          rows: [m] int, which clients they are.
        """
        if self._in_host is None:
            return data.replace(client=self._take(data.client, rows))
        return axis.gather(self._in_host, rows)


def _store(
    state: ServerState, came: np.ndarray, rows: np.ndarray, results: Tree, loss: Array
) -> np.ndarray:
    """Write the results of clients `rows` into `state`; returns their losses.

    Of those only that are among `came`, whose uploads have arrived.
    """
    arrived = np.isin(rows, came)

    def put(old: np.ndarray, new: np.ndarray) -> None:
        old[rows[arrived]] = new[arrived]

    kept = tuple(getattr(state, name) for name in IN_HOST)
    jax.tree.map(put, kept, jax.device_get(results))
    return np.asarray(loss)
