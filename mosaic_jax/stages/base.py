"""The contract of a stage: settings and artifacts in, artifacts and results out."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, schema, trees
from mosaic_jax.core.schema import View
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Tree,
)
from mosaic_jax.data import federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.fl import evaluation, parallel
from mosaic_jax.fl.accounting import Plan, Release
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.fl.sending import Sending
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.server.base import ServerTraining, Task
from mosaic_jax.stages.sections import Section

if TYPE_CHECKING:  # `Settings` is composed of the stages, so it lies above them
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a stage may know of a study before any array is on a device.

    Attributes:
      settings: the fields that the stage declares, and those that every stage may read.
      data: images and their split, in host memory.
      networks: classifiers of the study by name; the server's is the first.
      name: of the network that these clients have.
      algorithm: of the federated rounds; for stages that read "init.method".
      server: training on the server; for stages that read "server.method", in studies
        that have it.
      task: the properties of the study that `server` depends on.
      provides: names of the artifacts that the study needs from the stage.
      trains_every_round: whether `server` trains after every aggregation.
      sending: what becomes of uploads; of its parts those that the stage reads the
        settings of.
      privacy: the noise of a private study, see `Stage.releases`; None: it is not.
      start: arrays by path in place of random ones of the server's network, for stages
        that make it.
    """

    settings: View
    data: StudyData
    networks: dict[str, Classifier]
    name: str
    algorithm: Algorithm
    server: ServerTraining
    task: Task
    provides: tuple[str, ...] = ()
    trains_every_round: bool = False
    sending: Sending = Sending()
    privacy: Plan | None = None
    start: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def mechanism(self) -> Mechanism | None:
        """How clients of a private study hide their images; None: it is not private."""
        return self.privacy and self.privacy.mechanism

    @property
    def classifier(self) -> Classifier:
        """The network of these clients."""
        return self.networks[self.name]

    @property
    def rates(self) -> tuple[float, ...]:
        """Fraction of the channels that each client holds; () where all hold all."""
        # Refused where the stage does not declare the algorithm.
        self.algorithm.weight  # noqa: B018
        if not isinstance(self.algorithm, PartialTraining):
            return ()
        return self.settings.budgets.of_clients(self.data.clients.num_clients)

    @property
    def model(self) -> ModelState:
        """Shapes and types of the variables of these clients' network."""
        shape = self.data.info.image_shape
        return jax.eval_shape(lambda: self.classifier.init(prng.root(0), shape))

    @property
    def num_held_out(self) -> int:
        """Number of images that each model is evaluated on, over all held-out sets."""
        return sum(len(images.label) for images in self.data.held_out.values())

    def members(self, name: str) -> np.ndarray:
        """Numbers of the clients that have network `name`; networks go in turn."""
        names = list(self.networks)
        numbers = np.arange(self.data.clients.num_clients)
        return numbers[names.index(name) :: len(names)]

    @property
    def by_network(self) -> Client:
        """All clients in host memory, those of one network after those of the other.

        It is the order of artifacts that are made for each network and joined.
        """
        order = np.concatenate([self.members(name) for name in self.networks])
        return trees.take(self.data.clients.client, order)

    def for_network(self, name: str) -> "Blueprint":
        """The study restricted to the clients that have network `name`."""
        if len(self.networks) == 1:
            return self
        data = federated.of_clients(self.data, self.members(name))
        start = self.start if name == next(iter(self.networks)) else {}
        return dataclasses.replace(self, data=data, name=name, start=start)


@dataclasses.dataclass(frozen=True)
class Context(Blueprint):
    """What a stage may use while it runs: a `Blueprint`, and arrays on devices.

    Attributes:
      clients: `data.clients` on the devices; `images` are () where they stay in host
        memory.
      held_out: `data.held_out` on the devices.
      axis: the layout of the clients on the devices.
      state_on_host: whether the clients' states stay in host memory between rounds.
      key: random key of the stage.
    """

    _: dataclasses.KW_ONLY
    clients: FederatedDataset
    held_out: dict[str, LabelledImages]
    axis: parallel.ClientAxis
    state_on_host: bool
    key: jax.Array

    @property
    def in_host(self) -> FederatedDataset | None:
        """`data.clients`, where the devices do not hold the images; None: they do."""
        return None if jax.tree.leaves(self.clients.images) else self.data.clients

    def for_network(self, name: str) -> "Context":
        """The study restricted to the clients that have network `name`."""
        if len(self.networks) == 1:
            return self
        members = self.members(name)
        client = trees.take(self.clients.client, members)
        return dataclasses.replace(
            self,
            data=federated.of_clients(self.data, members),
            clients=self.clients.replace(client=client),
            axis=self.axis.of(len(members)),
            name=name,
            start=self.start if name == next(iter(self.networks)) else {},
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage returns.

    Attributes:
      artifacts: pytrees for later stages, by name.
      models: the result of `assess` for each model that the stage trained, by the
        model's name in tables; "final" is the study's result so far.
      results: further results that JSON can represent.
      headline: numbers for the summary by name, each with "mean", "low", "high" and
        "meaning"; those with a short name "card" are shown at the top of a report.
      clients: columns of the report's table of clients: {column: {client: text}}.
      section: the stage's section of the report.
      pictures: NumPy arrays that are saved beside the record, by name; uint8
        [..., H, W, D] are shown as images.
      up: bytes that clients sent to the server, by payload.
      down: bytes that the server sent to clients, by payload.
      sent_before: the payloads that were sent before the stage's first round; all
        others were sent evenly over its rounds, if it has any.
    """

    artifacts: dict[str, Tree]
    models: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    headline: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    clients: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    section: Section | None = None
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    up: dict[str, int] = dataclasses.field(default_factory=dict)
    down: dict[str, int] = dataclasses.field(default_factory=dict)
    sent_before: tuple[str, ...] = ()


class Stage(schema.Group):
    """A stage of a study: a frozen dataclass whose fields are its settings.

    A finished stage is found again by its settings and by all else that it declares
    here. A user's own stage names in `after` the stage that it follows, and is listed
    in `config.stages`.
    """

    name: ClassVar[str]
    after: ClassVar[str] = ""
    # It tells the server no more of the clients' images than what was sent before, or
    # only measures; see `releases`.
    tells_nothing: ClassVar[bool] = False
    # It makes the first model, which starts from `model.start`.
    makes_model: ClassVar[bool] = False

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """Names of the artifacts that `run` takes as keyword arguments."""
        del study
        return ()

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """Names of the artifacts that `run` returns."""
        del study
        return ()

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Dotted names of further settings, fields or groups, that the stage reads.

        Its own settings and those that every stage may read are not listed. A stage
        that lists "init.method" may use the algorithm, one that lists "server.method"
        the training on the server.
        """
        del study
        return ()

    def reads_images(self, study: "Settings") -> bool:
        """Whether the stage reads clients' images outside of federated rounds.

        Images that stay in host memory, or in files, are put on the devices in rounds,
        for the clients that take part; studies of such images refuse all other stages
        that read `context.clients.images` or `context.data.clients.images`.
        """
        del study
        return True

    def releases(
        self, study: "Settings", sizes: np.ndarray
    ) -> tuple[Release, ...] | None:
        """All that clients of a private study tell of their images in the stage.

        What it tells goes by `context.mechanism`. What is made of models, generators
        and label counts that were sent before tells nothing more.

        Args:
          study: the settings.
          sizes: [C] int, images of each client.

        Returns:
          Often none, (); None: it is not known, and private studies refuse the stage.
        """
        del study, sizes
        return () if self.tells_nothing else None

    @abc.abstractmethod
    def run(self, context: Context, **artifacts: Tree) -> Run:
        """Run the stage: a generator that returns an `Outcome`.

        It yields each loop as `Steps` and is sent the loop's final state.
        """
        raise NotImplementedError

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Shapes and types of the artifacts, by name; an axis of -1 has any length."""
        del blueprint
        return {}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of `run`, of all clients and the server; 0: not known.

        Evaluations are included. Counted as in `core.flops`.
        """
        del blueprint
        return 0.0


# What comes with a component that a stage reads: the server method's task holds it.
IMPLIED = {"server.method": "server.batch_norm"}


@dataclasses.dataclass(frozen=True)
class Link:
    """A stage at its place in a study's chain.

    Attributes:
      stage: the stage.
      network: name of the network whose clients the stage runs for; "": all clients.
      suffix: of the names of the stage and its artifacts in the study: "@NETWORK" for
        clients that have another network than the server, else "".
    """

    stage: Stage
    network: str = ""
    suffix: str = ""

    @property
    def name(self) -> str:
        """Name of the stage in the study, and of its random stream."""
        return self.stage.name + self.suffix

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """Names in the study of the artifacts that `run` takes."""
        return tuple(name + self.suffix for name in self.stage.needs(study))

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """Names in the study of the artifacts that `run` returns."""
        return tuple(name + self.suffix for name in self.stage.provides(study))

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings that the stage reads, besides those that every stage may read.

        A user's stage has its own settings as fields only, not as a group of `study`.
        """
        own = (self.stage.name,) if hasattr(study, self.stage.name) else ()
        reads = (*own, *self.stage.reads(study))
        return (*reads, *(IMPLIED[name] for name in reads if name in IMPLIED))

    def run(self, context: Context, artifacts: Mapping[str, Tree]) -> Run:
        """Run the stage, with artifacts under their names in the study."""
        context = context.for_network(self.network) if self.network else context
        outcome = yield from self.stage.run(
            context,
            **{
                name.removesuffix(self.suffix): tree for name, tree in artifacts.items()
            },
        )
        models = outcome.models
        if self.suffix:
            # The study's result is a model of the server's network.
            models = {k + self.suffix: v for k, v in models.items() if k != "final"}
        headline = {k + self.suffix: v for k, v in outcome.headline.items()}
        return dataclasses.replace(
            outcome,
            artifacts=self._renamed(outcome.artifacts),
            models=models,
            headline=headline,
        )

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Shapes and types of the artifacts, by their names in the study."""
        return self._renamed(self.stage.template(self._restricted(blueprint)))

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of `run`, evaluations included; 0: not known."""
        return self.stage.flops(self._restricted(blueprint))

    def _renamed(self, artifacts: Mapping[str, Tree]) -> dict[str, Tree]:
        """Artifacts of the stage under their names in the study."""
        return {name + self.suffix: tree for name, tree in artifacts.items()}

    def _restricted(self, blueprint: Blueprint) -> Blueprint:
        return blueprint.for_network(self.network) if self.network else blueprint


def each_network(artifact: str, study: "Settings | View") -> tuple[str, ...]:
    """Names of an artifact that is made once for each network, the server's first."""
    return (artifact, *(f"{artifact}@{name}" for name in study.model.others))


def accuracies(
    function: Callable[[Array], Array],
    held_out: dict[str, LabelledImages],
    batch_size: int,
) -> dict[str, Array]:
    """Accuracy on each held-out set; a pure function, for use within a program.

    Args:
      function: from signed images [B, H, W, D] to logits [B, K].
      held_out: images and labels by the name of the set.
      batch_size: B, images in a batch.

    Returns:
      "test_accuracy" and so on, [] float32 in [0, 1].
    """
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
    """Evaluate a model on the held-out sets, in a program of its own.

    Args:
      context: of the stage.
      function: from `state` and signed images [B, H, W, D] to logits [B, K], or to a
        dict of logits by model.
      state: what `function` depends on. It is an argument so that its arrays are no
        constants of the compiled program.

    Returns:
      "test_accuracy" and so on in [0, 1] for each held-out set, and "predictions", the
      predicted class of each test image; a dict of these by model where `function`
      returns a dict.
    """
    held_out = context.held_out

    @programs.jit
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
        model: describe({name: of_set[model] for name, of_set in predicted.items()})
        for model in predicted["test"]
    }
