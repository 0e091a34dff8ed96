"""FedGen (Zhu et al., 2021): a generator of features that all clients learn from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, schema, sharing
from mosaic_jax.core.types import (
    Array,
    FedGenState,
    GeneratorState,
    ModelState,
    Teachers,
    Tree,
)
from mosaic_jax.fl.local_sgd import Seen
from mosaic_jax.nn import losses
from mosaic_jax.nn.feature_generator import FeatureGenerator
from mosaic_jax.server import base


@dataclasses.dataclass(frozen=True)
class FedGen(base.ServerTraining):
    """The server trains a generator of features; clients regularise their heads by it.

    After every aggregation the generator G minimises `mean(sum_i tau_iy CE(h_i(G(z,
    y)), y)) + diversity_weight L_div`, where h_i is the head of client i. From the next
    round on clients get G and the class shares p, and add to their loss, times
    `decay^round`,

    - `label_weight CE(h(G(z, y)), y)` for labels y drawn by p, and
    - `match_weight KL(softmax h(G(z, y)) || softmax f(x))` on their own images, with
      no gradient through the first.

    The model itself is the aggregated one.
    """

    teaches_clients = True

    steps: int = schema.at_least(0, default=50, meaning="of the generator in a round")
    batch_size: int = schema.at_least(2, default=32, meaning="of its features")
    latent_dim: int = schema.at_least(1, default=32, meaning="of the noise")
    hidden: int = schema.at_least(1, default=256, meaning="units of the generator")
    learning_rate: float = schema.above(0, default=3e-4, meaning="of Adam")
    weight_decay: float = schema.at_least(
        0, default=1e-2, meaning="L2 of the generator"
    )
    diversity_weight: float = schema.at_least(0, default=1.0, meaning="eta")
    label_weight: float = schema.at_least(
        0, default=10.0, meaning="alpha, of generated features in the clients' loss"
    )
    match_weight: float = schema.at_least(
        0, default=10.0, meaning="beta, of what the head says of them, as a target"
    )
    decay: float = schema.between(
        0, 1, default=0.98, meaning="of alpha, beta and the rate, from round to round"
    )

    def init(self, task: base.Task, model: ModelState, key: jax.Array) -> FedGenState:
        """An initial generator, which nobody uses yet."""
        del model
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        generator = base.generator_state(
            self._module(task), self._tx(jnp.zeros(())), key, z, label
        )
        return FedGenState(generator, jnp.zeros(task.num_classes))

    def train(
        self,
        task: base.Task,
        state: FedGenState,
        model: ModelState,
        teachers: Teachers,
        key: jax.Array,
        number: Array,
    ) -> tuple[FedGenState, ModelState, dict[str, Array]]:
        """Steps of the generator; the model stays."""
        module, tx = self._module(task), self._tx(number)
        tau, share = base.class_shares(teachers.label_count)

        def step(
            i: Array, carry: tuple[GeneratorState, Array]
        ) -> tuple[GeneratorState, Array]:
            generator, total = carry
            at = prng.at(key, i)
            label = base.draw_labels(prng.named(at, "label"), share, self.batch_size)
            shape = (self.batch_size, self.latent_dim)
            z = jax.random.normal(prng.named(at, "z"), shape)
            z, label = sharing.spread((z, label))

            def objective(params: Tree) -> tuple[Array, Tree]:
                variables = generator.model.replace(params=params).variables
                features, updated = module.apply(
                    variables, z, label, train=True, mutable=["batch_stats"]
                )
                logits = jax.vmap(lambda one: task.classifier.head(one, features))(
                    teachers.client_model
                )
                diversity = losses.pairwise_diversity(features, z, power=1)
                loss = self.generator_loss(logits, label, tau[:, label], diversity)
                return loss, updated["batch_stats"]

            generator, loss = base.generator_step(tx, generator, objective)
            return generator, total + loss

        start = (state.generator, jnp.zeros(()))
        generator, total = jax.lax.fori_loop(0, self.steps, step, start)
        metrics = {"generator_loss": total / max(self.steps, 1)}
        return FedGenState(generator, share), model, metrics

    def lesson(self, state: FedGenState) -> Tree:
        """The generator, and the class shares [K], 0 before it was trained."""
        return {"generator": state.generator.model, "share": state.share}

    def penalty(self, task: base.Task, params: Tree, seen: Seen) -> Array:
        """What a client adds to its loss.

        Args:
          task: properties of the study.
          params: of the client's model.
          seen: the minibatch and what the client was sent.

        Returns:
          [] float32, 0 before the generator was first trained.
        """
        turn, classifier = seen.turn, task.classifier
        model, share = turn.model.replace(params=params), turn.lesson["share"]
        generator, count = turn.lesson["generator"], len(seen.batch.label)

        def of_generated(label: Array, key: jax.Array) -> Array:
            z = jax.random.normal(key, (count, self.latent_dim))
            features: Any = self._module(task).apply(
                generator.variables, z, label, train=False
            )
            return classifier.head(model, features)

        label = base.draw_labels(prng.named(seen.key, "label"), share, count)
        drawn = of_generated(label, prng.named(seen.key, "drawn"))
        target = of_generated(seen.batch.label, prng.named(seen.key, "own"))
        found = self.client_loss(
            drawn,
            label,
            target,
            classifier.head(model, seen.features),
            seen.batch.mask,
        )
        scale = jnp.asarray(self.decay, jnp.float32) ** turn.number
        return jnp.where(jnp.sum(share) > 0, scale * found, 0.0)

    def flops(self, task: base.Task, num_teachers: int, rounds: int) -> float:
        """FLOPs of all rounds, as the base class describes.

        What clients add, some passes through heads and generator, is left out.
        """
        z, label = jnp.zeros((1, self.latent_dim)), jnp.zeros(1, jnp.int32)
        generator = base.generator_flops(self._module(task), z, label)
        model = jax.eval_shape(
            lambda: task.classifier.init(prng.root(0), task.image_shape)
        )
        width = task.classifier.num_features(task.image_shape)
        head = flops.count(task.classifier.head, model, jnp.zeros((1, width)))
        each = flops.TRAINED * generator + flops.THROUGH * num_teachers * head
        return rounds * self.steps * self.batch_size * each

    def generator_loss(
        self, logits: Array, label: Array, weight: Array, diversity: Array
    ) -> Array:
        """The generator's loss.

        Args:
          logits: [m, B, K] of the clients' heads.
          label: [B] int32, that the features were generated for.
          weight: tau_iy, [m, B].
          diversity: L_div, [].
        """
        each = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(label, weight.shape)
        )
        classified = jnp.mean(jnp.sum(weight * each, axis=0))
        return classified + self.diversity_weight * diversity

    def client_loss(
        self, drawn: Array, label: Array, target: Array, own: Array, mask: Array
    ) -> Array:
        """What is added to a client's loss, in the first round.

        Args:
          drawn: logits [B, K] of generated features.
          label: [B] int32, that they were generated for.
          target: logits [B, K] of features generated for the labels of the images.
          own: logits [B, K] of the images.
          mask: [B] bool, images that count.
        """
        apart = losses.kl(jax.lax.stop_gradient(target), own)
        told = self.label_weight * losses.cross_entropy(drawn, label)
        return told + self.match_weight * losses.masked_mean(apart, mask)

    def _tx(self, number: Array) -> optax.GradientTransformation:
        rate = self.learning_rate * jnp.asarray(self.decay, jnp.float32) ** number
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_adam(),
            optax.scale(-rate),
        )

    def _module(self, task: base.Task) -> FeatureGenerator:
        features = task.classifier.num_features(task.image_shape)
        return FeatureGenerator(features, task.num_classes, self.hidden)
