"""Stage 4: one expert per class, a weighted average of the client models."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import flops, prng, programs, schema, trees, types
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    FederatedDataset,
    ModelState,
    Tree,
)
from mosaic_jax.fl import aggregation, evaluation, parallel
from mosaic_jax.fl.accounting import Release
from mosaic_jax.fl.client_program import Traffic
from mosaic_jax.nn import submodel
from mosaic_jax.stages import federation, local, sections
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Experts(Stage):
    """Stage 4: averages of the client models, one for each class."""

    name = "experts"

    local_steps: int = schema.at_least(
        0, default=0, meaning="extra local steps before the experts are formed"
    )
    # A client's model is that of the round it last took part in: "all" counts each,
    # however old, "latest" only those of the last round.
    participants: str = schema.one_of(
        ("all", "latest"),
        default="all",
        meaning="whose models count, under partial participation",
    )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The models to average, and the expert of classes that no client has."""
        del study
        return ("client_models", "global_model")

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The experts, one per class."""
        del study
        return ("experts",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Local training, and the rounds where clients hold parts of the network."""
        attacks = study.attack.name != "none"
        steps = ("local", *(["attack"] if attacks else [])) if self.local_steps else ()
        # The batch-norm of experts of parts of a network is recalibrated, as in rounds.
        moments = federation.reads_rounds(study) if federation.is_partial(study) else ()
        return (*steps, *moments, *federation.reads_holdings(study))

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """The extra steps; classes are weighted by label counts that were sent."""
        if not self.local_steps:
            return ()
        steps = np.full_like(sizes, self.local_steps)
        return (Release("specialised_models", steps, study.local.batch_size),)

    def reads_images(self, study: "Settings") -> bool:
        """For the extra steps, and where experts' batch-norm is recalibrated."""
        return bool(self.local_steps) or federation.recalibrates(study)

    def run(
        self, context: Context, client_models: ClientModels, global_model: ModelState
    ) -> Run:
        """Train the extra steps, average by class, evaluate each expert."""
        return _form_experts(self, context, client_models, global_model)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Experts [K, ...]."""
        count = blueprint.data.info.num_classes
        model = jax.eval_shape(lambda m: trees.broadcast(m, count), blueprint.model)
        return {"experts": types.Experts(model, trees.shape((count,), bool))}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of the extra steps, and of evaluating each expert."""
        total, shape = 0.0, blueprint.data.info.image_shape
        if self.local_steps:
            images = self.local_steps * blueprint.settings.local.batch_size
            each = federation.holdings_of(blueprint).forward_flops(shape)
            total = images * flops.TRAINED * each.sum()
        info = blueprint.data.info
        forward = blueprint.classifier.flops(shape)
        each = blueprint.num_held_out * forward + federation.query_flops(blueprint)
        return float(total + info.num_classes * each)


def _form_experts(
    config: Experts,
    context: Context,
    client_models: ClientModels,
    global_model: ModelState,
) -> Run:
    data = context.data.clients
    models, last_round = client_models.model, client_models.last_round
    up, down = {"label_counts": federation.label_count_bytes(data)}, {}
    mask = None
    if context.rates:
        mask = federation.trained_masks(context, global_model, last_round)
    counted = federation.participants(last_round, config.participants)
    if config.local_steps:
        steps = np.full(data.num_clients, config.local_steps)
        models = yield from local.train(
            context, "local", models, steps, key=context.key
        )
        models = _attacked(context, models, global_model)
        up["specialised_models"] = _model_bytes(models, mask)
        never = np.flatnonzero(np.asarray(last_round) < 0)
        if len(never):
            down["models"] = _model_bytes(*trees.take((models, mask), never))
        # All have trained now; those that took part in no round, from the global model.
        counted = np.ones_like(counted)
    label_count = data.client.label_count * counted[:, None]
    experts = programs.jit(aggregation.class_experts)(
        models,
        label_count,
        global_model,
        mask,
    )
    if context.rates and federation.holdings_of(context).recalibrates:
        experts, traffic = _recalibrated(context, experts, label_count)
        up["moments"], down["queried_models"] = traffic.up, traffic.down

    @programs.jit
    def predict(experts: types.Experts, image: Array) -> Array:
        def predict_expert(model: ModelState) -> Array:
            logits = evaluation.predict(
                lambda x: context.classifier.logits(model, x),
                image,
                batch_size=context.settings.evaluation.batch_size,
            )
            return jnp.argmax(logits, axis=-1)

        return parallel.expert_map(predict_expert, experts.model)

    test = context.data.held_out["test"]
    per_class = [
        evaluation.per_class_accuracy(
            np.asarray(row), np.asarray(test.label), data.num_classes
        ).tolist()
        for row in predict(experts, context.held_out["test"].image)
    ]
    absent = [k for k, held in enumerate(experts.present.tolist()) if not held]
    return Outcome(
        artifacts={"experts": experts},
        results={"expert_class_accuracy": per_class, "absent_classes": absent},
        section=_section(context, per_class),
        up=up,
        down=down,
    )


def _attacked(
    context: Context, models: ModelState, global_model: ModelState
) -> ModelState:
    """The clients' models [C, ...] as they are sent, by attackers too."""
    sending = context.sending
    if sending.attack is None:
        return models
    hostile = sending.attackers(
        federation.rounds_key(context.settings), context.clients.client.number
    )
    key = prng.named(context.key, "attack")
    return programs.jit(sending.attacked)(models, global_model, hostile, key)


def _section(context: Context, accuracy: list[list[float]]) -> sections.Section:
    """Heat map of `accuracy` [E][K] in [0, 1]; NaN for classes without images."""
    suffix = f"@{context.name}" if context.name != next(iter(context.networks)) else ""
    heat = sections.Heat(
        name=f"experts{suffix}",
        values=accuracy,
        xlabel="class of the image",
        ylabel="expert",
        label="test accuracy",
        caption="Share of each class's test images that each expert"
        f" ({context.name}) gets right.",
    )
    return sections.Section("Experts and teacher", (heat,))


def _model_bytes(models: ModelState, mask: ModelState | None) -> int:
    """Bytes of the clients' models [C, ...], or of the parameters in `mask` only."""
    if mask is None:
        return trees.num_bytes(models)
    return submodel.num_bytes(models, mask)


def _recalibrated(
    context: Context, experts: types.Experts, label_count: Array
) -> tuple[types.Experts, Traffic]:
    """The experts with batch-norm statistics from the clients, and the traffic of that.

    The clients' moments are weighted as their parameters are.
    """
    program = federation.build(context, context.settings.local)
    key = federation.rounds_key(context.settings)

    @programs.jit
    def recalibrate(
        data: FederatedDataset, experts: types.Experts, count: Array, key: jax.Array
    ) -> ModelState:
        def recalibrate_expert(args: Tree) -> ModelState:
            model, count, present = args
            weight = jnp.where(present, count, data.client.size)
            return program.recalibrate_batch_norm(data, key, model, weight)

        return jax.lax.map(
            recalibrate_expert, (experts.model, count.T, experts.present)
        )

    model = recalibrate(context.clients, experts, label_count, key)
    traffic = program.query_bytes(context.data.info.image_shape)
    return experts.replace(model=model), len(experts.present) * traffic
