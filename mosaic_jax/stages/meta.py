"""Stage 6: train the head that fuses the experts, on prototypes and their labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import evaluation, losses, prng, trees
from mosaic_jax.distillation import mosaic
from mosaic_jax.loop import Run, Steps, repeat
from mosaic_jax.models import meta
from mosaic_jax.settings import Settings
from mosaic_jax.stages.base import (
    Context,
    Outcome,
    Stage,
    assess,
    each_network,
)
from mosaic_jax.types import (
    Array,
    Experts,
    LabelledImages,
    MetaState,
    ModelState,
    Prototypes,
    Teacher,
)

# Test images by which the teacher is explained.
NUM_EXPLAINED = 512


def stage(settings: Settings) -> Stage:
    """Stage 6."""
    return Stage(
        name="meta",
        needs=(*each_network("experts", settings), "prototypes", "global_model"),
        provides=("teacher",),
        # By the space, a gate's features are those that clients have sent already.
        reads=("meta", "prototypes.space"),
        run=_run,
    )


def _run(
    context: Context,
    prototypes: Prototypes,
    global_model: ModelState,
    **of_networks: Experts,
) -> Run:
    num_classes = context.data.clients.num_classes
    config, networks = context.settings.meta, context.networks
    experts = dict(zip(networks, of_networks.values(), strict=True))
    ensemble = mosaic.build(config, networks, num_classes)
    params = {}
    if config.head not in meta.UNTRAINED:
        params = yield from _train(context, ensemble, prototypes)
    teacher = Teacher(experts=experts, meta_params=params, gate=global_model)
    heads = {"teacher": ensemble} | {
        name: mosaic.build(
            dataclasses.replace(config, head=name), networks, num_classes
        )
        for name in meta.UNTRAINED
    }

    def all_heads(teacher: Teacher, image: Array) -> dict[str, Array]:
        expert_logits = ensemble.gated_logits(teacher, image)
        return {
            name: head.fuse(teacher.meta_params, expert_logits)
            for name, head in heads.items()
        }

    results = assess(context, all_heads, teacher)
    results |= _explain(context, ensemble, teacher)
    up = {}
    if config.gate != "none" and context.settings.prototypes.space != "global":
        features = context.classifier.num_features(context.data.info.image_shape)
        up["gate_features"] = 4 * features * len(prototypes.label)
    return Outcome(artifacts={"teacher": teacher}, results=results, up=up)


def _explain(
    context: Context, ensemble: mosaic.Ensemble, teacher: Teacher
) -> dict[str, list[list[float]]]:
    """Which experts the teacher listens to, as means over test images of a class.

    Returns:
      "reliance" [E, K]: of the logit of an image's own class, what comes through each
      expert (gradient times input); "gate_weight" [E, K], where there is a gate;
      "attention" [E, E], of the head's decoder, where it has one.
    """
    num_classes = context.data.info.num_classes
    test = jax.tree.map(lambda leaf: leaf[:NUM_EXPLAINED], context.held_out["test"])
    size = context.settings.evaluation.batch_size

    @jax.jit
    def run(teacher: Teacher, test: LabelledImages) -> dict[str, Array]:
        expert_logits = evaluation.predict(
            lambda x: ensemble.gated_logits(teacher, x), test.image, batch_size=size
        )
        own_class = jax.nn.one_hot(test.label, num_classes)

        def score(expert_logits: Array) -> Array:
            fused = ensemble.fuse(teacher.meta_params, expert_logits)
            return jnp.sum(fused * own_class)

        through = jnp.sum(expert_logits * jax.grad(score)(expert_logits), axis=-1)
        of_class = own_class / jnp.maximum(jnp.sum(own_class, axis=0, keepdims=True), 1)
        found = {"reliance": through.T @ of_class}
        if ensemble.gate != "none":
            weight = evaluation.predict(
                lambda x: ensemble.gate_weight(teacher, x), test.image, batch_size=size
            )
            found["gate_weight"] = weight.T @ of_class
        attention = ensemble.attention(teacher.meta_params, expert_logits)
        return found if attention is None else found | {"attention": attention}

    found = jax.device_get(run(teacher, test))
    return {name: np.round(value, 5).tolist() for name, value in found.items()}


def _train(context: Context, ensemble: mosaic.Ensemble, prototypes: Prototypes) -> Run:
    config = context.settings.meta
    tx = optax.adam(config.learning_rate)
    num_prototypes = len(prototypes.label)
    batch_size = min(config.batch_size, num_prototypes)
    variables = ensemble.head.init(
        prng.named(context.key, "head"), prototypes.logits[:2], train=False
    )
    params = variables["params"]

    def train_step(prototypes: Prototypes, key: Array, step: Array, state: MetaState):
        key = prng.at(prng.named(key, "step"), step)
        rows = jax.random.permutation(key, num_prototypes)[:batch_size]
        batch = trees.take(prototypes, rows)
        expert_logits = ensemble.gated(batch.logits, batch.gate_logits)

        def objective(params):
            logits = ensemble.fuse(params, expert_logits, prng.named(key, "dropout"))
            return losses.cross_entropy(logits, batch.label)

        loss, gradient = jax.value_and_grad(objective)(state.params)
        update, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        ema_params = optax.incremental_update(
            params, state.ema_params, 1 - config.ema_decay
        )
        return MetaState(params, ema_params, opt_state), loss

    def chunk(args, state, first, end):
        def body(step, state):
            state, loss = train_step(*args, step, state)
            return state, {"loss": loss}

        return repeat(body, state, first, end)

    start = jax.tree.map(jnp.zeros_like, params) if config.ema_debiased else params
    state = yield Steps(
        "head",
        chunk,
        (context.axis.replicate(prototypes), context.key),
        MetaState(params=params, ema_params=start, opt_state=tx.init(params)),
        config.steps,
        every=context.settings.log.every_steps,
        samples_per_step=batch_size,
    )
    if not config.ema_debiased:
        return state.ema_params
    weight = 1 - config.ema_decay**config.steps
    return jax.tree.map(lambda x: x / weight, state.ema_params)
