"""What a stage is: settings and artifacts in, artifacts and results out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import evaluation, parallel, provenance, settings, trees
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.data import federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.distillation.base import ServerTraining, Task
from mosaic_jax.loop import Run
from mosaic_jax.provenance import View
from mosaic_jax.types import Array, FederatedDataset, LabelledImages, Tree


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage may read.

    Attributes:
      settings: those that the stage declared.
      data: in host memory.
      clients: the clients' data on the devices.
      held_out: `data.held_out` on the devices.
      axis: where clients run.
      networks: classifiers of the study by name; the server's first.
      name: of the network that the clients in this context have.
      algorithm: of its rounds, where the stage reads "init.method".
      server: training on the server, where the stage reads "server.method".
      task: what that must know of the study.
      state_on_host: what clients keep between rounds lives in host memory.
      key: the stage's own.
    """

    settings: View
    data: StudyData
    clients: FederatedDataset
    held_out: dict[str, LabelledImages]
    axis: parallel.ClientAxis
    networks: dict[str, Classifier]
    name: str
    algorithm: Algorithm
    server: ServerTraining | None
    task: Task
    state_on_host: bool
    key: Array

    @property
    def classifier(self) -> Classifier:
        """Of the clients in this context."""
        return self.networks[self.name]

    @property
    def rates(self) -> tuple[float, ...]:
        """What part of the network each client holds; empty: all of it."""
        if not self.algorithm.partial:
            return ()
        return self.settings.budgets.of_clients(self.data.clients.num_clients)

    def of(self, name: str) -> "Context":
        """The same study as the clients that have network `name` see it."""
        if len(self.networks) == 1:
            return self
        names = list(self.networks)
        numbers = np.arange(self.data.clients.num_clients)
        members = numbers[names.index(name) :: len(names)]
        client = trees.take(self.clients.client, members)
        return dataclasses.replace(
            self,
            data=federated.of_clients(self.data, members),
            clients=self.clients.replace(client=client),
            axis=self.axis.of(len(members)),
            name=name,
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage hands on.

    Attributes:
      artifacts: name to pytree.
      results: JSON-able findings for summary and report.
      pictures: uint8 and other plain arrays that reports show, by name.
      up: bytes that clients sent to the server, by payload.
      down: bytes that the server sent to clients, by payload.
    """

    artifacts: dict[str, Tree]
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    up: dict[str, int] = dataclasses.field(default_factory=dict)
    down: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One link of the chain.

    Attributes:
      name: of the stage; its random stream has the same name.
      needs: artifacts that `run` takes by keyword.
      provides: artifacts that it returns.
      reads: the settings that `run` may read, groups or fields by dotted name, besides
        those that every stage may (see `provenance`). With "init.method" goes the
        algorithm, with "server.method" what trains on the server. The result is
        remembered by all of these.
      run: `run(context, **artifacts)`, a generator: yields the `Steps` it wants run,
        is sent their final state, returns an `Outcome`.
    """

    name: str
    needs: tuple[str, ...]
    provides: tuple[str, ...]
    reads: tuple[str, ...]
    run: Callable[..., Run]

    def uses(self, name: str) -> bool:
        """Whether it declares the field `name`, alone or with its group."""
        return provenance.is_covered(name, self.reads)

    def given(self, name: str, component: Any) -> Any:
        """The component that the field `name` names, as this stage sees it."""
        return component if self.uses(name) else provenance.Undeclared(name)


def each_network(artifact: str, study: settings.Settings) -> tuple[str, ...]:
    """The names of an artifact that the clients of each network make, in order."""
    return (artifact, *(f"{artifact}@{name}" for name in study.model.others))


def for_clients_with(stage: Stage, name: str, *, suffix: bool) -> Stage:
    """`stage` for the clients that have network `name`.

    With `suffix`, its name, needs and artifacts end in "@" and `name`.
    """
    end = f"@{name}" if suffix else ""

    def run(context: Context, **artifacts: Tree) -> Run:
        given = {key.removesuffix(end): value for key, value in artifacts.items()}
        outcome = yield from stage.run(context.of(name), **given)
        made = {key + end: value for key, value in outcome.artifacts.items()}
        return dataclasses.replace(outcome, artifacts=made)

    return Stage(
        name=stage.name + end,
        needs=tuple(key + end for key in stage.needs),
        provides=tuple(key + end for key in stage.provides),
        reads=stage.reads,
        run=run,
    )


def accuracies(
    function: Callable[[Array], Array],
    held_out: dict[str, LabelledImages],
    batch_size: int,
) -> dict[str, Array]:
    """Accuracy of logits that `function` computes from signed images, per set."""
    return {
        f"{name}_accuracy": evaluation.accuracy(
            evaluation.predict(function, images.image, batch_size=batch_size),
            images.label,
        )
        for name, images in held_out.items()
    }


def assess(
    context: Context, function: Callable[[Tree, Array], Tree], state: Tree
) -> dict[str, Any]:
    """Accuracies, and the predicted classes of the test images, as plain numbers.

    Args:
      context: of the stage.
      function: logits [B, K], or a dict of such by name, of `state` and signed images
        [B, H, W, D].
      state: what `function` needs; an argument, so that it is no constant of the
        compiled program.

    Returns:
      "test_accuracy", ..., "predictions"; in a dict by name where `function` gives one.
    """
    held_out = context.held_out

    @jax.jit
    def predict(state: Tree, held_out: dict[str, LabelledImages]) -> dict[str, Tree]:
        size = context.settings.evaluation.batch_size
        return {
            name: jax.tree.map(
                lambda logits: jnp.argmax(logits, axis=-1),
                evaluation.predict(
                    lambda x: function(state, x), images.image, batch_size=size
                ),
            )
            for name, images in held_out.items()
        }

    def describe(predicted: dict[str, np.ndarray]) -> dict[str, Any]:
        result = {
            f"{name}_accuracy": float(np.mean(predicted[name] == images.label))
            for name, images in context.data.held_out.items()
        }
        return result | {"predictions": predicted["test"].tolist()}

    predicted = jax.device_get(predict(state, held_out))
    if not isinstance(predicted["test"], dict):
        return describe(predicted)
    return {
        model: describe({name: found[model] for name, found in predicted.items()})
        for model in predicted["test"]
    }
