"""Stages of federated rounds: their program, settings, shapes and FLOPs."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import flops, prng, registry, trees
from mosaic_jax.core.schema import View
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    FederatedDataset,
    ModelState,
    ServerState,
    Tree,
)
from mosaic_jax.fl import workload
from mosaic_jax.fl.accounting import Release
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.algorithms.base import initial_state
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.anchors import Anchor
from mosaic_jax.fl.holdings import Holdings
from mosaic_jax.fl.parts import PartsOfNetwork
from mosaic_jax.fl.training import Local
from mosaic_jax.server.base import ServerTraining
from mosaic_jax.stages import chain
from mosaic_jax.stages.base import Blueprint, Context, Stage
from mosaic_jax.stages.rounds import Rounds

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


def state_shapes(blueprint: Blueprint) -> ServerState:
    """Shapes and types of the state between rounds, without the clients' models."""
    count, task = blueprint.data.clients.num_clients, blueprint.task

    def state(model: ModelState, key: jax.Array) -> ServerState:
        algorithm = blueprint.algorithm
        initial = initial_state(algorithm, model, count).replace(
            error=blueprint.sending.no_error(algorithm, model, count),
            clip=blueprint.sending.first_clip(),
        )
        if not blueprint.trains_every_round:
            return initial
        return initial.replace(training=blueprint.server.init(task, model, key))

    return jax.eval_shape(state, blueprint.model, jax.eval_shape(prng.root, 0))


def build(
    context: Context,
    local: Local,
    *,
    keep_models: bool = False,
    server: ServerTraining | None = None,
    anchor: Anchor | None = None,
) -> Rounds:
    """The rounds of a study.

    Args:
      context: of the stage.
      local: settings of the clients' SGD.
      keep_models: whether the clients' trained models are kept.
      server: training on the server after every aggregation; None: there is none.
      anchor: keeps clients near the model before these rounds; None: nothing does.

    Raises:
      ConfigError: a group of clients that hold parts of one size has no participant.
    """
    return Rounds(
        algorithm=context.algorithm,
        holdings=holdings_of(context),
        local=local,
        axis=context.axis,
        augmentation=context.data.info.augmentation,
        keep_models=keep_models,
        clients_per_round=context.settings.init.clients_per_round,
        server=server,
        task=context.task if server else None,
        anchor=anchor,
        sending=context.sending,
        mechanism=context.mechanism,
    )


def holdings_of(blueprint: Blueprint) -> Holdings:
    """Which part of the network each client holds."""
    return blueprint.algorithm.holdings(
        blueprint.classifier, blueprint.data.clients.num_clients, blueprint.rates
    )


def clients_in_round(blueprint: Blueprint) -> int:
    """Number of clients that take part in a round."""
    some = blueprint.settings.init.clients_per_round
    return some or blueprint.data.clients.num_clients


def reads_rounds(study: "Settings") -> tuple[str, ...]:
    """Settings that a stage reads by `build`, for its `Stage.reads`."""
    return ("init", "local", *reads_holdings(study), *reads_sending(study))


def reads_sending(study: "Settings") -> tuple[str, ...]:
    """Settings of what becomes of uploads, where it is anything at all."""
    used = {
        "aggregation": study.aggregation.rule != "mean",
        "attack": study.attack.name != "none",
        "compression": study.compression.name != "none",
    }
    return tuple(group for group, is_used in used.items() if is_used)


def reads_holdings(study: "Settings") -> tuple[str, ...]:
    """Settings that a stage reads by `holdings_of`, for its `Stage.reads`."""
    partial = is_partial(study)
    return ("init.method", *(("init.rounds", "budgets") if partial else ()))


def is_partial(study: "Settings") -> bool:
    """Whether clients hold parts of the network, according to their budgets."""
    return issubclass(ALGORITHMS.find(study.init.method), PartialTraining)


def recalibrates(study: "Settings") -> bool:
    """Whether clients are asked for batch-norm statistics, see `Rounds.usable`."""
    if not is_partial(study):
        return False
    algorithm = registry.build(ALGORITHMS, study.init.method, study.methods)
    return algorithm.batch_norm == "static"


def rounds_key(settings: "View | Settings") -> jax.Array:
    """The random key of all rounds of a study, whichever stage they belong to."""
    return prng.named(prng.root(settings.seed), "init")


def trained_masks(
    context: Context, model: ModelState, number: int | Array
) -> ModelState:
    """The mask of the parameters that each client trains in a round.

    Only for studies whose clients hold parts of the network.

    Args:
      context: of the stage.
      model: the global model.
      number: [] or [C] int32, number of the round, over the study; -1, of clients that
        never trained, is taken for the latest of the others.

    Returns:
      [C, ...]: 1 for a parameter that the client trains, else 0, see `submodel.Part`.
    """
    parts = holdings_of(context)
    assert isinstance(parts, PartsOfNetwork)
    client, number = context.clients.client, jnp.asarray(number)
    number = jnp.where(number < 0, jnp.max(number), number)
    return parts.masks(model, client, rounds_key(context.settings), number)


def query_flops(blueprint: Blueprint) -> float:
    """FLOPs of recalibrating one model's batch-norm on all clients; 0 if not done."""
    if not holdings_of(blueprint).recalibrates:
        return 0.0
    local, clients = blueprint.settings.local, blueprint.data.clients
    planned = dataclasses.replace(local, stragglers=0.0)
    images = clients.num_clients * local.batch_size
    images *= workload.mean_steps(planned, clients.client.size)
    return images * blueprint.classifier.flops(blueprint.data.info.image_shape)


def participants(last_round: Array, which: str) -> np.ndarray:
    """Which clients' models count, [C] bool.

    Args:
      last_round: [C] int32, the round that each client last took part in; -1: none.
      which: "all" clients that ever took part, or those of the "latest" round.
    """
    last_round = np.asarray(last_round)
    if which == "latest":
        return last_round == last_round.max()
    return last_round >= 0


def round_artifacts(study: "Settings") -> tuple[str, ...]:
    """Names of the artifacts that a stage of rounds provides for later stages."""
    wanted = any(
        "client_models" in link.stage.needs(study)
        for link in chain(study)
        if not isinstance(link.stage, FederatedStage)
    )
    kept = ("client_models",) if wanted else ()
    return ("global_model", "round_state", *kept)


def sends_label_counts(study: "Settings") -> bool:
    """Whether anything reads clients' label counts, so that private ones hide them.

    The loss of a client reads its own, which models tell of; the server is sent them by
    the stages `experts` and `server`, which bill them.
    """
    reads = ALGORITHMS.find(study.init.method).reads_label_counts
    return study.method == "mosaic" or study.server.method != "none" or reads


def label_count_bytes(clients: FederatedDataset) -> int:
    """Bytes of the clients' label counts, each sent once, as int32."""
    return clients.client.label_count.size * np.dtype(np.int32).itemsize


def round_state(state: ServerState) -> Tree:
    """The artifact "round_state": what later rounds need besides the global model."""
    # Clients' models are an artifact of their own, the anchor is each stage's.
    aside = {"model", "client_model", "anchor"}
    names = [field.name for field in dataclasses.fields(state)]
    return {name: getattr(state, name) for name in names if name not in aside}


@dataclasses.dataclass(frozen=True)
class FederatedStage(Stage):
    """Base of the stages that consist of federated rounds."""

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the rounds, and of training on the server within them."""
        server = ("server.method",) if study.trains_every_round else ()
        return (*reads_rounds(study), *server)

    def reads_images(self, study: "Settings") -> bool:
        """Where the model is recalibrated on them before it is measured."""
        return recalibrates(study)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Models and states after the rounds, whether or not a study keeps them all."""
        model, count = blueprint.model, blueprint.data.clients.num_clients
        state = state_shapes(blueprint)
        each = jax.eval_shape(lambda model: trees.broadcast(model, count), model)
        return {
            "global_model": model,
            "round_state": round_state(state),
            "client_models": ClientModels(each, state.last_round),
            "final_model": model,
        }

    def releases_of_rounds(
        self, study: "Settings", sizes: np.ndarray, rounds: int
    ) -> tuple[Release, ...]:
        """What rounds tell of images, as if every client took part in each.

        Args:
          study: the settings.
          sizes: [C] int, images of each client.
          rounds: how many there are.
        """
        planned = rounds * np.asarray(workload.planned_steps(study.local, sizes))
        steps = np.broadcast_to(planned, sizes.shape)
        return (Release("models", steps, study.local.batch_size),)

    def flops_of_rounds(self, blueprint: Blueprint, rounds: int) -> float:
        """FLOPs of `rounds` rounds, with their evaluations."""
        settings = blueprint.settings
        holdings = holdings_of(blueprint)
        each = holdings.forward_flops(blueprint.data.info.image_shape).mean()
        passes = flops.TRAINED + blueprint.algorithm.further_passes
        total = self.images_of_rounds(blueprint, rounds) * passes * each
        forward = blueprint.classifier.flops(blueprint.data.info.image_shape)
        evaluations = -(-rounds // settings.evaluation.every) + 1
        total += evaluations * (
            blueprint.num_held_out * forward + query_flops(blueprint)
        )
        if blueprint.trains_every_round:
            clients = clients_in_round(blueprint)
            total += blueprint.server.flops(blueprint.task, clients, rounds)
        return float(total)

    def images_of_rounds(self, blueprint: Blueprint, rounds: int) -> int:
        """Number of images that all clients train on in `rounds` rounds."""
        local, clients = blueprint.settings.local, blueprint.data.clients
        each = workload.mean_steps(local, clients.client.size) * local.batch_size
        return round(rounds * clients_in_round(blueprint) * each)
