"""FedBN (Li et al., 2021): batch-norm stays with its client."""

import dataclasses

import flax.traverse_util

from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.types import ModelState, Tree


@dataclasses.dataclass(frozen=True)
class FedBN(Algorithm):
    """FedAvg whose clients keep scale, bias and running moments of batch-norm.

    A batch-norm layer is known by its running statistics, not by its name. The server
    still averages what clients send of it, so that there is a global model to measure;
    no client ever reads that average.
    """

    personal = True

    def init_client(self, model: ModelState) -> Tree:
        """Batch-norm of the initial model."""
        return {"params": _private(model), "batch_stats": model.batch_stats}

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The global model with the client's own batch-norm."""
        params = flax.traverse_util.flatten_dict(model.params, sep="/")
        return ModelState(
            params=flax.traverse_util.unflatten_dict(
                params | client_state["params"], sep="/"
            ),
            batch_stats=client_state["batch_stats"],
        )

    def upload(
        self, model: ModelState, local: ModelState, client_state: Tree
    ) -> tuple[Tree, Tree]:
        """The whole model; the state is its batch-norm."""
        del model, client_state
        return local, self.init_client(local)


def _private(model: ModelState) -> Tree:
    """Parameters of the layers that keep running statistics, by path."""
    stats = flax.traverse_util.flatten_dict(model.batch_stats, sep="/")
    layers = {path.rpartition("/")[0] for path in stats}
    params = flax.traverse_util.flatten_dict(model.params, sep="/")
    return {
        path: leaf for path, leaf in params.items() if path.rpartition("/")[0] in layers
    }
