"""What a federated algorithm may change; every hook defaults to FedAvg.

A new algorithm is a frozen dataclass in a file of its own that overrides what it needs;
its fields are its hyper-parameters, set by `config.methods.NAME`. One whose clients do
something else than local SGD returns another `holdings`, with programs of its own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from mosaic_jax.core import schema, trees
from mosaic_jax.core.types import Array, ModelState, ServerState, Tree
from mosaic_jax.fl import holdings
from mosaic_jax.fl.local_sgd import Hooks
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Algorithm(Hooks, schema.Group):
    """Federated averaging (McMahan et al., 2017).

    The hooks of `Hooks` are about one client; the ones here are about all of them.
    """

    # Clients keep a model of their own, to be judged beside the global one.
    personal = False
    # The server's model answers by itself; False: only the clients' own models count.
    has_global_model = True
    # What goes to the server and back; "prototypes": see `Prototypical`.
    exchanges = "models"
    # What the server trains, in words for a table.
    server_work = "none"

    def weight(self, size: Array) -> Array:
        """Weights of clients with `size` images in every mean over clients."""
        return size

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """New server state and global model from `sum_i n_i upload_i / sum_i n_i`.

        Uploads are only ever summed, so that memory does not grow with the clients.
        An algorithm that weighs parameters one by one uploads the weighted parameters
        and the weights, and divides here.

        Args:
          server_state: of the round before.
          model: global, of the round before.
          mean_upload: weighted by `weight` over those who took part.
          share: part of the weight of all clients that took part and whose uploads
            have arrived, in (0, 1]; an array [] unless all of them always do.
        """
        del model, share
        return server_state, mean_upload

    def holdings(
        self, classifier: Classifier, num_clients: int, rates: tuple[float, ...]
    ) -> holdings.Holdings:
        """Which part of the network each client holds, and the program that it runs.

        Args:
          classifier: of the global model.
          num_clients: C.
          rates: [C] budgets in (0, 1]; read by algorithms that cut the network.
        """
        del rates
        return holdings.WholeNetwork(classifier, self, num_clients)


def without_mean(study: Any, because: str) -> Iterator[str]:
    """Problems of a study whose algorithm makes no mean of the clients' whole models.

    Args:
      study: its settings.
      because: what the algorithm's clients or rounds do instead.
    """
    method = f"init.method = {study.init.method!r}"
    if study.method == "mosaic":
        yield (
            f"{method}: must be another for method = 'mosaic', whose experts are means"
            " of the clients' models"
        )
    if study.server.method != "none":
        yield (
            f"server.method = {study.server.method!r}: must be 'none' for {method},"
            f" {because}"
        )


def initial_state(algorithm: Algorithm, model: ModelState, count: int) -> ServerState:
    """The state before the first round, without models of clients or server training.

    Args:
      algorithm: whose states of server and clients it has.
      model: the global model.
      count: C, number of clients.
    """
    return ServerState(
        model=model,
        server=algorithm.init_server(model),
        client=trees.broadcast(algorithm.init_client(model), count),
        last_round=jnp.full(count, -1, jnp.int32),
        client_model=(),
    )
