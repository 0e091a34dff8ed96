"""A classifier trained on all real images, in whose features the audit compares images.

It is no part of the method: nothing of it goes back into training.
"""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.core import flops, prng, programs, sharing
from mosaic_jax.core.steps import Metrics, Repeated, Run, Steps
from mosaic_jax.core.types import Array, ModelState, StudentState, Tree
from mosaic_jax.data import augment
from mosaic_jax.nn import losses
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, assess

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

BATCH_SIZE = 64
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Reference(Stage):
    """Trains the audit's classifier on the images of all clients."""

    name = "reference"
    tells_nothing = True  # to the server: it is no part of the study

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The classifier."""
        del study
        return ("reference_model",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """The number of training steps."""
        del study
        return ("audit.reference_steps",)

    def run(self, context: Context) -> Run:
        """Train the classifier and evaluate it."""
        return _train_reference(context)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """A model with the shapes of the global one."""
        return {"reference_model": blueprint.model}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all steps and of evaluating the classifier."""
        forward = blueprint.classifier.flops(blueprint.data.info.image_shape)
        images = blueprint.settings.audit.reference_steps * BATCH_SIZE
        return (flops.TRAINED * images + blueprint.num_held_out) * forward


def _train_reference(context: Context) -> Run:
    classifier, data = context.classifier, context.data.clients
    tx = optax.adam(LEARNING_RATE)
    init = programs.jit(classifier.init, static_argnums=1)
    model = init(prng.named(context.key, "model"), context.data.info.image_shape)
    held = np.sort(np.concatenate(context.data.parts))
    augmentation = context.data.info.augmentation

    def one(
        args: Tree, state: StudentState, step: Array
    ) -> tuple[StudentState, Metrics]:
        images, rows, key = args
        at = prng.at(prng.named(key, "step"), step)
        chosen = rows[jax.random.randint(at, (BATCH_SIZE,), 0, len(rows))]
        chosen = sharing.spread(chosen)
        image = augment.augment(
            augmentation,
            prng.named(at, "augment"),
            augment.to_signed(images.image[chosen]),
        )

        def objective(params: Tree) -> tuple[Array, Tree]:
            model = state.model.replace(params=params)
            logits, batch_stats = classifier.train_logits(model, image)
            return losses.cross_entropy(logits, images.label[chosen]), batch_stats

        (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
            state.model.params
        )
        update, opt_state = tx.update(gradient, state.opt_state, state.model.params)
        params = optax.apply_updates(state.model.params, update)
        new = StudentState(ModelState(params, batch_stats), opt_state)
        return new, {"loss": loss}

    state = yield Steps(
        "reference",
        Repeated(one),
        (context.axis.replicate(data.images), jnp.asarray(held), context.key),
        StudentState(model=model, opt_state=tx.init(model.params)),
        context.settings.audit.reference_steps,
        every=context.settings.log.every_steps,
        samples_per_step=BATCH_SIZE,
    )
    assessed = assess(context, classifier.logits, state.model)
    return Outcome(
        artifacts={"reference_model": state.model},
        results={"reference_accuracy": assessed["test_accuracy"]},
    )
