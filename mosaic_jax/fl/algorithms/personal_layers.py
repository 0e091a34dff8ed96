"""What FedPer and FedRep share: some layers never leave their client."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.traverse_util

from mosaic_jax.core import errors, schema, trees
from mosaic_jax.core.types import Array, ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm, without_mean
from mosaic_jax.fl.client_program import Turn


def _are_names(value: tuple) -> bool:
    return len(value) > 0 and all(isinstance(name, str) and name for name in value)


@dataclasses.dataclass(frozen=True)
class PersonalLayers(Algorithm):
    """Layers named in `layers` stay with each client; the others are averaged.

    The server's own copy of these layers keeps its initial values, which all clients
    start from, so that its model answers by chance: the clients' own are what counts.
    """

    personal = True
    has_global_model = False

    layers: tuple = schema.field(
        ("fc",),
        "names of layers, at least one",
        _are_names,
        "that stay with their client, by their paths; fc: the last layer",
    )

    def problems(self, study: Any) -> Iterator[str]:
        """Whatever needs the clients' whole models, or a global one."""
        yield from without_mean(study, "whose clients send no last layer")

    def init_client(self, model: ModelState) -> Tree:
        """The client's layers, as in the initial model."""
        return self.split(model)[0]

    def download(self, model: ModelState) -> Tree:
        """All but the client's layers."""
        return self.split(model)[1]

    def receive(self, model: ModelState, client_state: Tree) -> ModelState:
        """The global model with the client's own layers."""
        return merged(self.download(model), client_state)

    def upload(self, turn: Turn, trained: ModelState, loss: Array) -> tuple[Tree, Tree]:
        """All but the client's layers, which it keeps."""
        del turn, loss
        own, rest = self.split(trained)
        return rest, own

    def reference(self, model: ModelState) -> Tree:
        """All but the client's layers, as they were sent."""
        return self.split(model)[1]

    def sent_model(self, upload: Tree, model: ModelState) -> ModelState:
        """With the server's own copy of the client's layers."""
        return merged(upload, self.split(model)[0])

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """The mean of what was sent; other layers stay as they are."""
        del share
        return server_state, merged(mean_upload, self.split(model)[0])

    def is_own(self, path: str) -> bool:
        """Whether the parameter or statistic at `path` stays with its client."""
        return path.startswith(tuple(f"{name}/" for name in self.layers))

    def split(self, model: ModelState) -> tuple[dict[str, Array], dict[str, Array]]:
        """Variables of the client's layers, and all others, by their paths.

        Raises:
          ConfigError: a name is of no layer, or no other layer is left.
        """
        own, rest, known = {}, {}, set()
        for path, leaf in trees.flatten(model.variables).items():
            # The first name says which collection of variables it is.
            inner = path.partition("/")[2]
            (own if self.is_own(inner) else rest)[path] = leaf
            known.add(inner)
        if not rest or not all(
            any(path.startswith(f"{name}/") for path in known) for name in self.layers
        ):
            raise errors.ConfigError(
                f"layers = {self.layers}: must be some, not all, of the network's:"
                f" {', '.join(sorted(model.params))}"
            )
        return own, rest


def merged(some: dict[str, Array], others: dict[str, Array]) -> ModelState:
    """The model of variables by path, in two parts."""
    found = flax.traverse_util.unflatten_dict(some | others, sep="/")
    return ModelState(found["params"], found.get("batch_stats", {}))
