"""FedBN (Li et al., 2021): clients keep their own batch-norm."""

import dataclasses

import flax.traverse_util

from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.client_program import Turn


@dataclasses.dataclass(frozen=True)
class FedBN(Algorithm):
    """FedAvg whose clients keep scale, bias and running moments of batch-norm.

    Batch-norm layers are recognised by their running statistics, not by their names.
    The server still averages them, so that there is a global model to evaluate; no
    client ever uses that average.
    """

    per_image = True
    personal = True

    def init_client(self, model: ModelState) -> Tree:
        """The batch-norm of the initial model."""
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

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """The whole local model; the client's state is its batch-norm."""
        del turn, loss
        return trained, self.init_client(trained)


def _private(model: ModelState) -> Tree:
    """Parameters of the layers that keep running statistics, by path."""
    stats = flax.traverse_util.flatten_dict(model.batch_stats, sep="/")
    layers = {path.rpartition("/")[0] for path in stats}
    params = flax.traverse_util.flatten_dict(model.params, sep="/")
    return {
        path: leaf for path, leaf in params.items() if path.rpartition("/")[0] in layers
    }
