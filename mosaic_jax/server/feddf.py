"""FedDF (Lin et al., 2020): the clients' mean logits teach their average."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema
from mosaic_jax.core.types import Array, ModelState, Teachers, Tree
from mosaic_jax.nn import losses
from mosaic_jax.server import base
from mosaic_jax.server.distillation import generate


@dataclasses.dataclass(frozen=True)
class FedDF(base.ServerTraining):
    """Ensemble distillation on images of the clients' generators.

    The student starts from the mean model and minimises `KL(softmax m || softmax s)`,
    where m are the clients' mean logits and s its own. The images are those that Mosaic
    distils on, so that the two differ in what teaches: here neither class experts nor a
    trained head. The paper has unlabelled images of another data set, or of a generator
    trained elsewhere.
    """

    when = "once"
    asks_for_generators = True

    steps: int = schema.at_least(1, default=50, meaning="of Adam in a round")
    samples_per_generator: int = schema.at_least(
        1, default=32, meaning="images of each client's generator in a step"
    )
    learning_rate: float = schema.above(
        0, default=1e-3, meaning="of Adam; falls to 0 by half a cosine over all rounds"
    )

    def init(self, task: base.Task, model: ModelState, key: jax.Array) -> Tree:
        """Adam's state."""
        del key
        return self._tx(task).init(model.params)

    def train(
        self,
        task: base.Task,
        state: Tree,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[Tree, ModelState, dict[str, Array]]:
        """One round: `steps` steps, each on new images."""
        del number
        tx, gan = self._tx(task), task.gan
        assert gan is not None  # of methods that ask for generators
        generators = teachers.generators
        # Images of collapsed generators do not count.
        counts = jnp.repeat(generators.alive, self.samples_per_generator)

        def step(i: Array, carry: Tree) -> Tree:
            model, opt_state, total = carry
            image = generate(
                gan,
                generators.model,
                prng.at(key, i),
                self.samples_per_generator,
                len(generators.alive),
            )
            logits = base.client_logits(task, teachers.client_model, image)
            teacher = base.mean_over_teachers(logits, teachers)
            model, opt_state, loss = base.student_step(
                task,
                tx,
                model,
                opt_state,
                image,
                lambda student: losses.masked_mean(losses.kl(teacher, student), counts),
                counts,
            )
            return model, opt_state, total + loss

        start = (model, state, jnp.zeros(()))
        model, state, total = jax.lax.fori_loop(0, self.steps, step, start)
        return state, model, {"student_loss": total / self.steps}

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes.

        Every teacher is taken to have sent a generator.
        """
        assert task.gan is not None
        generator, _ = task.gan.flops(task.image_shape)
        classifier = task.classifier.flops(task.image_shape)
        each = generator + (num_teachers + flops.TRAINED) * classifier
        images = num_teachers * self.samples_per_generator
        return rounds * self.steps * images * each

    def _tx(self, task: base.Task) -> optax.GradientTransformation:
        return optax.adam(base.annealed(self.learning_rate, task.rounds * self.steps))
