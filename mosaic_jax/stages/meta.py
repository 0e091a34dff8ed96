"""Stage 6: train the head that fuses the experts, on prototypes and their labels."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.core import prng, programs, schema, sharing, trees
from mosaic_jax.core.steps import Metrics, Repeated, Run, Steps
from mosaic_jax.core.types import (
    Array,
    Experts,
    LabelledImages,
    MetaState,
    ModelState,
    Prototypes,
    Teacher,
    Tree,
)
from mosaic_jax.fl import evaluation
from mosaic_jax.nn import gating, losses, meta
from mosaic_jax.server import mosaic
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import (
    Blueprint,
    Context,
    Outcome,
    Stage,
    assess,
    each_network,
)

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

# Number of test images on which the teacher is explained.
NUM_EXPLAINED = 512
# Heads without training that are evaluated beside the teacher: name in tables to head.
UNTRAINED = {"experts_mean": "mean", "diagonal": "diagonal"}
_EXPLAINED = {
    "reliance": "How much of the teacher's score for an image's class comes through"
    " each expert (gradient times input, mean over test images of the class).",
    "gate_weight": "Mean weight that the gate gives each expert on test images of a"
    " class.",
    "attention": "Attention of the meta head's decoder from expert (row) to expert"
    " (column), mean over test images and heads.",
}


@dataclasses.dataclass(frozen=True)
class Meta(Stage):
    """Stage 6: the head that fuses the experts into one teacher."""

    name = "meta"
    tells_nothing = True

    head: str = schema.one_of(
        meta.HEADS,
        default="linear",
        meaning="transformer is the published one; diagonal and mean are untrained",
    )
    steps: int = schema.at_least(1, default=1000, meaning="steps of Adam")
    batch_size: int = schema.at_least(1, default=128, meaning="prototypes in a step")
    learning_rate: float = schema.above(0, default=1e-3, meaning="of Adam")
    ema_decay: float = schema.below_one(
        default=0.99, meaning="the teacher is the running mean of the head"
    )
    gate: str = schema.one_of(
        gating.GATES,
        default="none",
        meaning="global_topk: the global model's probabilities weight the experts",
    )
    gate_experts: int = schema.at_least(
        1, default=10, meaning="experts that the gate keeps per image"
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """The gate needs one global model for all clients."""
        if study.model.others and self.gate != "none":
            yield (
                f"meta.gate = {self.gate!r}: must be 'none' where clients have"
                f" different networks, model.others = {study.model.others}"
            )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The experts, the prototypes that train the head, and the gate's model."""
        return (*each_network("experts", study), "prototypes", "global_model")

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The experts and their trained head."""
        del study
        return ("teacher",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """The prototypes' space, which tells whether the gate's features are sent."""
        del study
        return ("prototypes.space", "compat.ema_debiased")

    def reads_images(self, study: "Settings") -> bool:
        """Test images alone, to explain the teacher."""
        del study
        return False

    def run(
        self,
        context: Context,
        prototypes: Prototypes,
        global_model: ModelState,
        **experts: Experts,
    ) -> Run:
        """Train the head, then evaluate and explain the teacher."""
        return _train_teacher(self, context, prototypes, global_model, experts)

    def ensemble(self, blueprint: Blueprint) -> mosaic.Ensemble:
        """The ensemble of a study's experts with this head and gate."""
        return mosaic.build(
            self.head,
            blueprint.networks,
            blueprint.data.info.num_classes,
            gate=self.gate,
            gate_experts=self.gate_experts,
        )

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Experts of each network, and the head's parameters."""
        classes, networks = blueprint.data.info.num_classes, blueprint.networks
        models = {name: blueprint.for_network(name).model for name in networks}
        experts = {
            name: Experts(
                jax.eval_shape(lambda m: trees.broadcast(m, classes), model),
                trees.shape((classes,), bool),
            )
            for name, model in models.items()
        }
        logits = trees.shape((2, classes * len(networks), classes), jnp.float32)
        params = jax.eval_shape(
            lambda logits: _fresh(self.ensemble(blueprint), prng.root(0), logits),
            logits,
        )
        gate = models[next(iter(networks))]
        return {"teacher": Teacher(experts, params, gate)}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of evaluating the teacher; training the head costs little."""
        return teacher_flops(blueprint) * blueprint.num_held_out


def teacher_flops(blueprint: Blueprint) -> float:
    """FLOPs of one image through the experts of all networks."""
    shape = blueprint.data.info.image_shape
    total = sum(network.flops(shape) for network in blueprint.networks.values())
    return blueprint.data.info.num_classes * total


def _fresh(ensemble: mosaic.Ensemble, key: jax.Array, logits: Array) -> Tree:
    """Initial parameters of the head for `logits` [B, E, K]; {} if it has none."""
    return ensemble.head.init(key, logits, train=False).get("params", {})


def _train_teacher(
    config: Meta,
    context: Context,
    prototypes: Prototypes,
    global_model: ModelState,
    artifacts: dict[str, Experts],
) -> Run:
    experts = dict(zip(context.networks, artifacts.values(), strict=True))
    ensemble = config.ensemble(context)
    params = {}
    if config.head not in meta.UNTRAINED:
        params = yield from _train_head(config, context, ensemble, prototypes)
    teacher = Teacher(experts=experts, meta_params=params, gate=global_model)
    heads = {"teacher": ensemble} | {
        name: dataclasses.replace(config, head=head).ensemble(context)
        for name, head in UNTRAINED.items()
    }

    def all_heads(teacher: Teacher, image: Array) -> dict[str, Array]:
        expert_logits = ensemble.gated_logits(teacher, image)
        return {
            name: head.fuse(teacher.meta_params, expert_logits)
            for name, head in heads.items()
        }

    models = assess(context, all_heads, teacher)
    for name in UNTRAINED:
        # Only the accuracies of these heads are of interest.
        del models[name]["predictions"]
    explained = _explain(context, ensemble, teacher)
    up = {}
    if config.gate != "none" and context.settings.prototypes.space != "global":
        features = context.classifier.num_features(context.data.info.image_shape)
        up["gate_features"] = 4 * features * len(prototypes.label)
    return Outcome(
        artifacts={"teacher": teacher},
        models=models,
        results=explained,
        section=_section(explained),
        up=up,
    )


def _section(explained: dict[str, list[list[float]]]) -> sections.Section:
    """Heat maps of the results of `_explain`."""
    heats = [
        sections.Heat(
            name=name,
            values=explained[name],
            xlabel="expert" if name == "attention" else "class of the image",
            ylabel="expert",
            label=name.replace("_", " "),
            caption=caption,
        )
        for name, caption in _EXPLAINED.items()
        if name in explained
    ]
    return sections.Section("Experts and teacher", heats)


def _explain(
    context: Context, ensemble: mosaic.Ensemble, teacher: Teacher
) -> dict[str, list[list[float]]]:
    """Which experts the teacher relies on, as means over test images of each class.

    Returns:
      "reliance" [E, K]: each expert's part of the logit of an image's own class, by
      gradient times input; with a gate also "gate_weight" [E, K]; with a transformer
      also "attention" [E, E] in its decoder.
    """
    num_classes = context.data.info.num_classes
    test = jax.tree.map(lambda leaf: leaf[:NUM_EXPLAINED], context.held_out["test"])
    size = context.settings.evaluation.batch_size

    @programs.jit
    def explain(teacher: Teacher, test: LabelledImages) -> dict[str, Array]:
        expert_logits = evaluation.predict(
            lambda x: ensemble.gated_logits(teacher, x), test.image, batch_size=size
        )
        own_class = jax.nn.one_hot(test.label, num_classes)

        def score(expert_logits: Array) -> Array:
            fused = ensemble.fuse(teacher.meta_params, expert_logits)
            return jnp.sum(fused * own_class)

        contribution = jnp.sum(expert_logits * jax.grad(score)(expert_logits), axis=-1)
        of_class = own_class / jnp.maximum(jnp.sum(own_class, axis=0, keepdims=True), 1)
        result: dict[str, Array] = {"reliance": contribution.T @ of_class}
        if ensemble.gate != "none":
            weight = evaluation.predict(
                lambda x: ensemble.gate_weight(teacher, x), test.image, batch_size=size
            )
            result["gate_weight"] = weight.T @ of_class
        attention = ensemble.attention(teacher.meta_params, expert_logits)
        return result if attention is None else result | {"attention": attention}

    result = jax.device_get(explain(teacher, test))
    return {name: np.round(value, 5).tolist() for name, value in result.items()}


def _train_head(
    config: Meta, context: Context, ensemble: mosaic.Ensemble, prototypes: Prototypes
) -> Run:
    debiased = context.settings.compat.ema_debiased
    tx = optax.adam(config.learning_rate)
    num_prototypes = len(prototypes.label)
    batch_size = min(config.batch_size, num_prototypes)
    params = _fresh(ensemble, prng.named(context.key, "head"), prototypes.logits[:2])

    def train_step(
        prototypes: Prototypes, key: jax.Array, step: Array, state: MetaState
    ) -> tuple[MetaState, Array]:
        key = prng.at(prng.named(key, "step"), step)
        rows = jax.random.permutation(key, num_prototypes)[:batch_size]
        batch = trees.take(prototypes, sharing.spread(rows))
        expert_logits = ensemble.gated(batch.logits, batch.gate_logits)

        def objective(params: Tree) -> Array:
            logits = ensemble.fuse(params, expert_logits, prng.named(key, "dropout"))
            return losses.cross_entropy(logits, batch.label)

        loss, gradient = jax.value_and_grad(objective)(state.params)
        update, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, update)
        if debiased:
            ema_params = trees.running_mean(
                state.ema_params, params, config.ema_decay, step
            )
        else:
            ema_params = optax.incremental_update(
                params, state.ema_params, 1 - config.ema_decay
            )
        return MetaState(params, ema_params, opt_state), loss

    def one(args: Tree, state: MetaState, step: Array) -> tuple[MetaState, Metrics]:
        prototypes, key = args
        state, loss = train_step(prototypes, key, step, state)
        return state, {"loss": loss}

    state = yield Steps(
        "head",
        Repeated(one),
        (context.axis.replicate(prototypes), context.key),
        MetaState(params=params, ema_params=params, opt_state=tx.init(params)),
        config.steps,
        every=context.settings.log.every_steps,
        samples_per_step=batch_size,
    )
    return state.ema_params
