"""Stages of rounds that end in prototypes: all networks together, no global model.

They stand in the places of init, warmup and finetune, with their settings and names, so
that rounds, batches and learning rates are those of every other method.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from mosaic_jax.core import flops, prng, programs, trees
from mosaic_jax.core.schema import View
from mosaic_jax.core.steps import (
    ROUND,
    Metrics,
    OnHost,
    Repeated,
    Run,
    Step,
    Steps,
    Work,
)
from mosaic_jax.core.types import (
    Array,
    LabelledImages,
    ModelState,
    Tree,
)
from mosaic_jax.fl import workload
from mosaic_jax.fl.algorithms.prototypical import Prototypical
from mosaic_jax.fl.training import Local
from mosaic_jax.stages import federation, own_models, prototype_host, run_rounds
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage
from mosaic_jax.stages.prototype_federation import (
    ANSWERS,
    FederationState,
    PrototypeFederation,
    common_features,
    initial_state,
)
from mosaic_jax.stages.prototype_host import batches

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

STATE = "prototype_state"
# The name in tables of what each way to answer comes to.
MODELS = dict(zip(ANSWERS, ("personal", "nearest_prototype"), strict=True))
# Accuracies [C] by held-out set and by how a model answers.
Accuracies = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class PrototypeRounds(Stage):
    """Base of the stages of rounds that end in prototypes."""

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """Prototypes and the clients' models after the rounds before."""
        del study
        return (STATE,)

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The same, after further rounds."""
        del study
        return (STATE,)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the rounds."""
        del study
        return ("init", "local")

    def reads_images(self, study: "Settings") -> bool:
        """In rounds alone."""
        del study
        return False

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """The state after the rounds."""
        initial = functools.partial(_initial_state, blueprint)
        return {STATE: jax.eval_shape(initial, jax.eval_shape(prng.root, 0), {})}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all rounds, with their evaluations."""
        settings, shape = blueprint.settings, blueprint.data.info.image_shape
        _, rounds, local = self.part(settings)
        count = blueprint.data.clients.num_clients
        sizes = [len(blueprint.members(name)) for name in blueprint.networks]
        each = [one.flops(shape) for one in blueprint.networks.values()]
        forward = float(np.dot(sizes, each)) / count
        clients = settings.init.clients_per_round or count
        images = local.batch_size * workload.mean_steps(
            local, blueprint.data.clients.client.size
        )
        trained = flops.TRAINED * clients * images * forward
        learnt = _algorithm(blueprint).learn_flops(clients, *_shape(blueprint))
        # Every held-out image is judged by one client's model.
        evaluations = -(-rounds // settings.evaluation.every) + 1
        measured = evaluations * blueprint.num_held_out * forward
        return rounds * (trained + learnt) + measured

    def part(self, settings: View) -> tuple[int, int, Local]:
        """Number of the first round, of rounds, and the clients' SGD."""
        raise NotImplementedError

    def run(self, context: Context, **artifacts: Tree) -> Run:
        """Run the rounds, and measure the clients' models."""
        first, rounds, local = self.part(context.settings)
        program = _build(context, local)
        # That of all rounds of the study, whichever stage they belong to.
        key = federation.rounds_key(context.settings)
        if STATE in artifacts:
            state = artifacts[STATE]
        else:
            initial = programs.jit(functools.partial(_initial_state, context))
            state = initial(prng.root(context.settings.seed), context.start)
        work: Work = Repeated(_round(program), mean=False)
        if context.state_on_host:
            state = state.replace(client=jax.device_get(state.client))
            work = OnHost(_round_on_host(context, program))
        shares = _shares(context)
        count = program.clients_in_round
        sizes = context.data.clients.client.size
        images = workload.mean_steps(local, sizes) * local.batch_size
        steps = Steps(
            ROUND,
            work,
            (context.clients, context.held_out, shares, key, jnp.asarray(first)),
            state,
            rounds,
            every=context.settings.evaluation.every,
            samples_per_step=round(count * images),
            measure=_measure(context, program),
        )
        state = yield steps
        traffic = steps.done * program.round_bytes(context.data.clients.client)
        found = _results(context, self.name, program, state, shares)
        found["results"] |= steps.stopped
        return Outcome(
            artifacts={STATE: state},
            up={"prototypes": traffic.up},
            down={"prototypes": traffic.down},
            **found,
        )


@dataclasses.dataclass(frozen=True)
class FirstPrototypeRounds(PrototypeRounds):
    """Rounds from random models of the clients, in the place of init.

    Those with the server's network have what `model.start` says.
    """

    name = "init"
    makes_model = True

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """Nothing."""
        del study
        return ()

    def part(self, settings: View) -> tuple[int, int, Local]:
        """From round 0."""
        return 0, settings.init.rounds, settings.local

    def run(self, context: Context, **artifacts: Tree) -> Run:
        """Run the rounds; tell what all methods of a comparison have in common."""
        outcome = yield from super().run(context, **artifacts)
        # Those of the server's network, as where each network is a federation.
        first = context.for_network(context.name)
        initial = programs.jit(functools.partial(_initial_model, context, context.name))
        model = initial(prng.root(context.settings.seed), context.start)
        key = federation.rounds_key(context.settings)
        outcome.results.update(run_rounds.shared_digests(first, model, key))
        outcome.results["num_parameters"] = int(
            parameter_overview.count_parameters(model.params)
        )
        # Class means weigh by them; they are sent once.
        outcome.up["label_counts"] = context.data.label_count.size * 4
        return dataclasses.replace(outcome, sent_before=("label_counts",))


@dataclasses.dataclass(frozen=True)
class FurtherPrototypeRounds(PrototypeRounds):
    """Further rounds, in the place of warmup."""

    name = "warmup"

    def part(self, settings: View) -> tuple[int, int, Local]:
        """After those of init."""
        return settings.init.rounds, settings.warmup.rounds, settings.local


@dataclasses.dataclass(frozen=True)
class LastPrototypeRounds(PrototypeRounds):
    """The last rounds with their own learning rate, in the place of finetune."""

    name = "finetune"

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Also the number of rounds before."""
        return (*super().reads(study), "warmup")

    def part(self, settings: View) -> tuple[int, int, Local]:
        """After those of init and warmup."""
        last = settings.finetune
        local = dataclasses.replace(settings.local, learning_rate=last.learning_rate)
        return settings.init.rounds + settings.warmup.rounds, last.rounds, local


def stages_of(study: "Settings") -> list[PrototypeRounds]:
    """The stages of a study whose clients exchange prototypes, without those of 0."""
    found: list[PrototypeRounds] = [FirstPrototypeRounds()]
    if study.warmup.rounds:
        found.append(FurtherPrototypeRounds())
    if study.finetune.rounds:
        found.append(LastPrototypeRounds())
    return found


def _algorithm(blueprint: Blueprint) -> Prototypical:
    assert isinstance(blueprint.algorithm, Prototypical)
    return blueprint.algorithm


def _shape(blueprint: Blueprint) -> tuple[int, int]:
    """(K, F), of the prototypes."""
    info, networks = blueprint.data.info, blueprint.networks.values()
    return info.num_classes, common_features(networks, info.image_shape)


def _initial_model(
    blueprint: Blueprint, name: str, root: jax.Array, start: Mapping[str, Array]
) -> ModelState:
    """The model that clients with one network start from.

    It is that of a study in which each network is a federation of its own.

    Args:
      blueprint: of the stage.
      name: of the network.
      root: the study's key.
      start: arrays of the server's network in place of random ones.
    """
    first = name == next(iter(blueprint.networks))
    key = prng.named(prng.named(root, "init" if first else f"init@{name}"), "model")
    model = blueprint.networks[name].init(key, blueprint.data.info.image_shape)
    return trees.replaced(model, start if first else {})


def _initial_state(
    blueprint: Blueprint, root: jax.Array, start: Mapping[str, Array]
) -> FederationState:
    """The state before the first round; arguments as of `_initial_model`."""
    names = list(blueprint.networks)
    return initial_state(
        _algorithm(blueprint),
        [_initial_model(blueprint, name, root, start) for name in names],
        [len(blueprint.members(name)) for name in names],
        _shape(blueprint),
        prng.named(root, "init"),
    )


def _build(context: Context, local: Local) -> PrototypeFederation:
    """The program of all clients' rounds, by `local` SGD."""
    info = context.data.info
    return PrototypeFederation(
        algorithm=_algorithm(context),
        classifiers=tuple(context.networks.values()),
        members=tuple(context.members(name) for name in context.networks),
        local=local,
        axis=context.axis,
        augmentation=info.augmentation,
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        clients_per_round=context.settings.init.clients_per_round,
    )


def _shares(context: Context) -> list[dict[str, np.ndarray]]:
    """Which held-out images each client's model is judged on, [m, n] int32 by set.

    Test images are dealt as for every method whose clients have models of their own,
    others likewise: an equal share, and at least one, for each client.
    """
    count, dealt = context.data.clients.num_clients, {}
    for name, images in context.data.held_out.items():
        total = len(images.label)
        each = max(total // count, 1)
        dealt[name] = np.arange(count * each).reshape(count, each) % total
    dealt["test"] = context.data.test_index
    return [
        {
            name: rows[context.members(network)].astype(np.int32)
            for name, rows in dealt.items()
        }
        for network in context.networks
    ]


def _of_each(
    context: Context,
    program: PrototypeFederation,
    accuracies: Callable[..., Accuracies],
    state: FederationState,
    shares: Sequence[Mapping[str, Array]],
    held_out: dict[str, LabelledImages],
) -> Accuracies:
    """Accuracies [C] of the clients' models, by held-out set and way to answer.

    Args:
      context: of the stage.
      program: of the rounds.
      accuracies: that of `program`, or a program made of it.
      state: after a round.
      shares: of `_shares`.
      held_out: images and labels by the name of the set.
    """
    prototypes = program.algorithm.prototypes(state.server)
    size, parts = context.settings.evaluation.batch_size, []
    for i, (own, rows) in enumerate(zip(state.client, shares, strict=True)):
        everyone = np.arange(len(program.members[i]))
        # As many at a time as train at once, where not all models are on the devices.
        some = batches(program.axis, everyone) if context.state_on_host else [everyone]
        for who in some:
            model, mine = trees.take((own.model, rows), who)
            parts.append(accuracies(i, model, prototypes, mine, held_out, size))
    order = np.argsort(np.concatenate(program.members))
    return trees.take(trees.concatenate(parts), order)


def _means(found: Accuracies, last_round: Array) -> dict[str, Array]:
    """Metrics: means over the clients that have trained, by set and way to answer."""
    trained = jnp.asarray(last_round) >= 0
    return {
        ("" if how == ANSWERS[0] else f"{how}_") + f"{name}_accuracy": jnp.sum(
            jnp.where(trained, each, 0)
        )
        / jnp.sum(trained)
        for name, of_set in found.items()
        for how, each in of_set.items()
    }


def _round(program: PrototypeFederation) -> Step:
    """A round as a step of a loop."""

    def step(
        args: Tree, state: FederationState, number: Array
    ) -> tuple[FederationState, Metrics]:
        data, _, _, key, offset = args
        state, loss, metrics = program.run(data, key, state, offset + number)
        return state, {"loss": jnp.mean(loss), **metrics}

    return step


def _round_on_host(context: Context, program: PrototypeFederation) -> Step:
    """`_round` for studies whose clients' models or images stay in host memory."""
    on_host = prototype_host.OnHost(program, context.in_host)

    def step(
        args: Tree, state: FederationState, number: int
    ) -> tuple[FederationState, Metrics]:
        data, _, _, key, offset = args
        state, loss, metrics = on_host.run(data, key, state, int(offset) + number)
        return state, {"loss": loss.mean(), **metrics}

    return step


def _measure(
    context: Context, program: PrototypeFederation
) -> Callable[[Tree, Tree], Metrics]:
    """Mean accuracies of the clients' models at the end of a window of rounds."""
    accuracies = program.accuracies
    if context.state_on_host:
        accuracies = _compiled_accuracies(program)

    def measure(args: Tree, state: FederationState) -> Metrics:
        _, held_out, shares, _, _ = args
        found = _of_each(context, program, accuracies, state, shares, held_out)
        return _means(found, state.last_round)

    return measure


def _compiled_accuracies(program: PrototypeFederation) -> Callable[..., Accuracies]:
    return programs.jit(program.accuracies, static_argnums=(0, 5))


def _results(
    context: Context,
    stage: str,
    program: PrototypeFederation,
    state: FederationState,
    shares: Sequence[Mapping[str, Array]],
) -> dict[str, Any]:
    """Fields of the `Outcome` that tell how good the clients' models are."""
    accuracies = _compiled_accuracies(program)
    found = jax.device_get(
        _of_each(context, program, accuracies, state, shares, context.held_out)
    )
    trained = np.asarray(state.last_round) >= 0
    models = {
        model: {
            f"{name}_accuracy": float(np.mean(of_set[how][trained]))
            for name, of_set in found.items()
        }
        for how, model in MODELS.items()
    }
    never = context.data.clients.client.number[~trained].tolist()
    own = found["test"][ANSWERS[0]].tolist()
    return {
        "models": models,
        "results": {"never_trained": never},
        "clients": own_models.report_columns(context, stage, own),
    }
