"""Training on the server: the student learns the clients' mean logits on noise."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema, sharing
from mosaic_jax.core.types import Array, ModelState, Teachers, Tree
from mosaic_jax.fl import training
from mosaic_jax.server import base


@dataclasses.dataclass(frozen=True)
class MeanLogits(base.ServerTraining):
    """One step of the student after every aggregation."""

    images: int = schema.at_least(1, default=32, meaning="random images in a step")
    learning_rate: float = schema.above(0, default=0.01, meaning="of SGD")

    def init(self, task: base.Task, model: ModelState, key: Array) -> Tree:
        """Nothing is kept."""
        del task, model, key
        return ()

    def train(
        self,
        task: base.Task,
        state: Tree,
        model: ModelState,
        teachers: Teachers,
        key: Array,
        number: Array,
    ) -> tuple[Tree, ModelState, dict[str, Array]]:
        """State, student and metrics after round `number`."""
        del number
        image = jax.random.uniform(key, (self.images, *task.image_shape), minval=-1)
        image = sharing.spread(image)  # over the devices, where there are several
        logits = base.client_logits(task, teachers.client_model, image)
        target = base.mean_over_teachers(logits, teachers)
        tx = training.sgd(self.learning_rate, weight_decay=0.0)
        model, _, loss = base.student_step(
            task,
            tx,
            model,
            tx.init(model.params),
            image,
            lambda logits: jnp.mean((logits - target) ** 2),
        )
        return state, model, {"student_loss": loss}
