"""Training of the global model on the server, once after the rounds or within them."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from mosaic_jax.core import prng, schema, trees
from mosaic_jax.core.steps import Metrics, Repeated, Run, Steps
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    Generators,
    ModelState,
    Teachers,
    Tree,
)
from mosaic_jax.fl import gan
from mosaic_jax.server import METHODS
from mosaic_jax.server.base import ServerTraining, Task
from mosaic_jax.stages import federation, health
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, assess

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Server(Stage):
    """Training of the global model on the server, without data.

    The stage trains once, after the rounds. With `when` = "every_round" the stages of
    rounds train instead, after every aggregation, and this one does not run.
    """

    name = "server"
    tells_nothing = True

    method: str = schema.component(
        ("none", *METHODS), default="none", meaning="how the server trains"
    )
    when: str = schema.one_of(
        ("every_round", "once"),
        default="every_round",
        meaning="once: after the rounds, from the clients' models",
    )
    batch_norm: str = schema.one_of(
        ("eval", "train"),
        default="eval",
        meaning="of the student; eval: the clients' statistics",
    )
    rounds: int = schema.at_least(
        1, default=200, meaning="with once: epochs of dense, rounds of other methods"
    )
    participants: str = schema.one_of(
        ("all", "latest"),
        default="all",
        meaning="with once: whose models teach, under partial participation",
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Mosaic has its own training on the server."""
        if study.method == "mosaic" and self.method != "none":
            yield (
                f"server.method = {self.method!r}: must be none for method = 'mosaic',"
                " which trains the global model itself"
            )

    def asks_for_generators(self) -> bool:
        """Whether clients train GANs and send the generators before the stage."""
        return METHODS.find(self.method).asks_for_generators

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The clients' models as teachers, the student, and what draws its images."""
        del study
        generators = ("client_generators",) if self.asks_for_generators() else ()
        return ("client_models", "global_model", *generators)

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The trained global model."""
        del study
        return ("student",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """The number of clients in a round, who may be the only teachers.

        Also the settings of the generators' networks, if the method asks for these.
        """
        del study
        generators = ("generators", "compat") if self.asks_for_generators() else ()
        return ("init.clients_per_round", *generators)

    def reads_images(self, study: "Settings") -> bool:
        """None: what it trains on are models and generators."""
        del study
        return False

    def run(
        self,
        context: Context,
        client_models: ClientModels,
        global_model: ModelState,
        client_generators: Generators | None = None,
    ) -> Run:
        """Train the student and evaluate it."""
        return _train_once(
            self, context, client_models, global_model, client_generators
        )

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """A model with the shapes of the global one."""
        return {"student": blueprint.model}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of the method and of evaluating the student."""
        teachers = blueprint.data.clients.num_clients
        if self.participants == "latest":
            teachers = blueprint.settings.init.clients_per_round or teachers
        task = _task_of(self, blueprint)
        total = blueprint.server.flops(task, teachers, self.rounds)
        forward = blueprint.classifier.flops(blueprint.data.info.image_shape)
        return total + blueprint.num_held_out * forward


def _task_of(config: Server, blueprint: Blueprint) -> Task:
    """The task of a method that trains once."""
    settings, model_gan = blueprint.settings, None
    if config.asks_for_generators():
        model_gan = gan.build(settings, blueprint.data.info, blueprint.classifier)
    return dataclasses.replace(blueprint.task, rounds=config.rounds, gan=model_gan)


def _train_once(
    config: Server,
    context: Context,
    client_models: ClientModels,
    global_model: ModelState,
    client_generators: Generators | None,
) -> Run:
    method, task = context.server, _task_of(config, context)
    # Clients that never trained do not teach.
    members = np.flatnonzero(
        federation.participants(client_models.last_round, config.participants)
    )
    client = context.clients.client
    teachers = Teachers(client_models.model, client.label_count, client.number)
    teachers = trees.take(teachers, members)
    if client_generators is not None:
        health.check_alive(
            client_generators, context.settings.generators.collapse_below
        )
        teachers = teachers.replace(generators=client_generators)

    model = yield from train(
        context,
        config.method,
        method,
        task,
        global_model,
        teachers,
        config.rounds,
        key=context.key,
        samples=method.batch_size,
    )
    assessed = assess(context, context.classifier.logits, model)
    return Outcome(
        artifacts={"student": model},
        models={"distilled": assessed, "final": assessed},
        results={"num_teachers": len(members)},
        up={"label_counts": federation.label_count_bytes(context.clients)},
    )


def train(
    context: Context,
    name: str,
    method: ServerTraining,
    task: Task,
    model: ModelState,
    teachers: Tree,
    rounds: int,
    *,
    key: jax.Array,
    samples: int,
    mean: bool = False,
) -> Run:
    """Run the rounds of a method of training on the server.

    Args:
      context: of the stage.
      name: of the loop.
      method: of training.
      task: the properties of the study that `method` depends on.
      model: the global model before the first round.
      teachers: what `method` trains on: `Teachers`, or its own type.
      rounds: number of rounds.
      key: random key of the rounds.
      samples: images that the student sees in a round, for the progress bar.
      mean: whether metrics are means over the rounds of a window; otherwise they are
        those of its last round.

    Returns:
      The trained model.
    """

    def step(args: Tree, state: Tree, number: Array) -> tuple[Tree, Metrics]:
        teachers, key = args
        training, model = state
        training, model, metrics = method.train(
            task, training, model, teachers, prng.at(key, number), number
        )
        return (training, model), metrics

    start = method.init(task, model, prng.named(context.key, "server"))
    _, model = yield Steps(
        name,
        Repeated(step, mean=mean),
        (teachers, key),
        (start, model),
        rounds,
        every=context.settings.log.every_steps,
        samples_per_step=samples,
    )
    return model
