"""A client's GAN, whose generator a classifier shapes (Mosaic, stage 2).

Without a discriminator the classifier is all that judges: it is frozen and plays the
discriminator, as the teacher does in data-free distillation (DAFL: Chen et al., ICCV
2019).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import flops, prng, trees
from mosaic_jax.core.schema import View
from mosaic_jax.core.types import Array, Client, GanState, ModelState, Tree
from mosaic_jax.data import augment
from mosaic_jax.data.dataset import Info
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn import dcgan, losses, networks, submodel
from mosaic_jax.nn.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Gan:
    """The networks, optimiser and loss weights of a client GAN.

    Attributes:
      generator: noise [B, latent_dim] to images in [-1, 1].
      discriminator: images to logits [B]; None: the classifier alone judges what is
        generated, and no real image is looked at.
      classifier: of the losses that shape the generator.
      tx: optimiser of the generator and the discriminator.
      latent_dim: length of the noise.
      entropy_weight: of the classifier's mean entropy on generated images.
      diversity_weight: of `losses.diversity` of its predictions on them.
      inversion_weight: of `losses.statistics_distance` of its batch-norm layers.
      classifier_train_mode: whether the classifier normalises generated images by their
        own moments.
      normalised_range: whether the discriminator reads standardised images, and the
        generator's output is taken as standardised too, as in the published code;
        otherwise both are in [-1, 1].
      ema_decay: of the running mean of the generator that is uploaded; 0: no mean.
      translate: largest shift in pixels of the discriminator's input, so that it cannot
        memorise a small client's images (Zhao et al., 2020).
      batch_size: images that are generated in a step; 0: as many as it is shown. In
        private studies also the expected number that it is shown.
      mechanism: of a private study; None: it is not private.
    """

    generator: networks.Module
    discriminator: networks.Module | None
    classifier: Classifier
    tx: optax.GradientTransformation
    latent_dim: int
    entropy_weight: float = 0.0
    diversity_weight: float = 0.0
    inversion_weight: float = 0.0
    classifier_train_mode: bool = False
    normalised_range: bool = False
    ema_decay: float = 0.0
    translate: int = 0
    batch_size: int = 0
    mechanism: Mechanism | None = None

    def private(self, mechanism: Mechanism, batch_size: int) -> "Gan":
        """The GAN whose discriminator hides each real image by `mechanism`.

        It judges each by itself, by group-norm. The generator and its batch-norm see no
        real image.

        Args:
          mechanism: of the study.
          batch_size: images in a step, the real ones on average.
        """
        judge = self.discriminator
        return dataclasses.replace(
            self,
            discriminator=judge and judge.clone(norm="group"),
            batch_size=batch_size,
            mechanism=mechanism,
        )

    def init(self, key: Array, image_shape: tuple[int, int, int]) -> GanState:
        """Initial networks and optimiser states, for images (H, W, D)."""
        keys = jax.random.split(key)
        z = jnp.zeros((1, self.latent_dim))
        generator = _model(self.generator.init(keys[0], z, train=False))
        discriminator, discriminator_opt = (), ()
        if self.discriminator is not None:
            image = jnp.zeros((1, *image_shape))
            discriminator = _model(self.discriminator.init(keys[1], image, train=False))
            discriminator_opt = self.tx.init(discriminator.params)
        return GanState(
            generator=generator,
            discriminator=discriminator,
            average=generator if self.ema_decay else (),
            generator_opt=self.tx.init(generator.params),
            discriminator_opt=discriminator_opt,
        )

    def sample(self, generator: ModelState, z: Array) -> Array:
        """Signed images [B, H, W, D] of noise `z` [B, nz], by running statistics."""
        output: Any = self.generator.apply(generator.variables, z, train=False)
        return self.decode(output)

    def deviation(self, generator: ModelState, z: Array) -> Array:
        """How much the images of noise `z` [n, nz] differ; near 0: collapsed.

        Returns:
          [] float32, the mean over pixels, which are in [-1, 1], of the standard
          deviation over the n images.
        """
        return jnp.mean(jnp.std(self.sample(generator, z), axis=0))

    def decode(self, output: Array) -> Array:
        """The generator's output as signed images."""
        return self.classifier.denormalise(output) if self.normalised_range else output

    def encode(self, image: Array) -> Array:
        """Signed images in the range that the discriminator reads."""
        return self.classifier.normalise(image) if self.normalised_range else image

    def step(
        self,
        state: GanState,
        key: Array,
        number: Array,
        image: Array,
        mask: Array,
        *,
        client_model: ModelState,
        class_share: Array,
        inverts: Array,
        statistics: ModelState,
        client: Client | None = None,
    ) -> tuple[GanState, dict[str, Array]]:
        """One discriminator step, if there is one, then one generator step.

        Both see the same noise.

        Args:
          state: training state of this client's GAN.
          key: random key of this step and client.
          number: [] int, of this client's steps before this one.
          image: [B, H, W, D] training images in [-1, 1]; without a discriminator only
            their number counts.
          mask: [B] bool, False for entries that only pad the batch.
          client_model: the client's classifier f_i, not trained here.
          class_share: [K] float32, target frequencies of the classes, sums to 1.
          inverts: [] bool, whether the inversion loss counts (n_i < tau).
          statistics: the model whose running statistics the inversion loss matches.
          client: whose images they are; only private studies read it.

        Returns:
          The new state and scalar metrics, in private studies none of real images.
        """
        count = self.batch_size or len(image)
        z = jax.random.normal(prng.named(key, "z"), (count, self.latent_dim))
        fake, pull_back, updated = jax.vjp(
            lambda params: self._generate(state.generator, params, z),
            state.generator.params,
            has_aux=True,
        )
        generator = state.generator.replace(batch_stats=updated)
        discriminator, discriminator_opt, judged = (), (), {}
        if self.mechanism is not None and self.discriminator is not None:
            discriminator, discriminator_opt = self._private_discriminator_step(
                state, key, image, mask, fake, client
            )
        elif self.discriminator is not None:
            discriminator, discriminator_opt, judged = self._discriminator_step(
                state, key, image, mask, fake
            )

        def objective(fake):
            return self._generator_loss(
                discriminator,
                key,
                fake,
                client_model=client_model,
                class_share=class_share,
                inverts=inverts,
                statistics=statistics,
            )

        (_, metrics), on_fake = jax.value_and_grad(objective, has_aux=True)(fake)
        (gradient,) = pull_back(on_fake)
        update, generator_opt = self.tx.update(
            gradient, state.generator_opt, generator.params
        )
        params = optax.apply_updates(generator.params, update)
        generator = generator.replace(params=params)
        average = state.average
        if self.ema_decay:
            average = trees.running_mean(average, generator, self.ema_decay, number)
        state = GanState(
            generator, discriminator, average, generator_opt, discriminator_opt
        )
        return state, judged | metrics

    def flops(self, image_shape: tuple[int, int, int]) -> tuple[float, float]:
        """FLOPs of generating one image (H, W, D), and of the logit of it.

        The latter is 0 where there is no discriminator.
        """
        state = jax.eval_shape(lambda: self.init(jax.random.key(0), image_shape))
        z = jax.ShapeDtypeStruct((1, self.latent_dim), jnp.float32)
        generating = flops.count(self.sample, state.generator, z)
        network = self.discriminator
        if network is None:
            return generating, 0.0
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

        def judge(discriminator: ModelState, image: Array) -> Array:
            variables = discriminator.variables
            logits: Any = network.apply(variables, image, train=False)
            return logits

        return generating, flops.count(judge, state.discriminator, image)

    def step_flops(self, image_shape: tuple[int, int, int], *, inverts: bool) -> float:
        """FLOPs of `step` per image (H, W, D) of a client's batch; see `step`."""
        generator, discriminator = self.flops(image_shape)
        shaping = self.entropy_weight or self.diversity_weight
        judges = bool(shaping) + bool(inverts and self.inversion_weight)
        # Real and generated images train the discriminator; then the gradient for the
        # generator passes through the discriminator and the classifiers.
        return (
            flops.TRAINED * (generator + 2 * discriminator)
            + flops.THROUGH * discriminator
            + flops.THROUGH * judges * self.classifier.flops(image_shape)
        )

    def _generate(self, generator: ModelState, params: Tree, z: Array):
        variables = generator.replace(params=params).variables
        image, updated = self.generator.apply(
            variables, z, train=True, mutable=["batch_stats"]
        )
        return image, updated["batch_stats"]

    def _judge(self, model: ModelState, key: Array, image: Array, mask=None):
        return self._logits(model, self._shifted(key, image), mask)

    def _shifted(self, key: Array, image: Array) -> Array:
        """Images as the discriminator reads them, each moved by chance."""
        if not self.translate:
            return image
        black = self.encode(jnp.full(image.shape[-1], -1.0))
        return augment.translate(key, image, pixels=self.translate, black=black)

    def _logits(self, model: ModelState, image: Array, mask=None):
        assert self.discriminator is not None  # else there is no model of it
        logits, updated = self.discriminator.apply(
            model.variables, image, train=True, mask=mask, mutable=["batch_stats"]
        )
        return logits, model.replace(batch_stats=updated.get("batch_stats", {}))

    def _discriminator_step(self, state: GanState, key, image, mask, fake):
        real = self.encode(image)

        def objective(params):
            model = state.discriminator.replace(params=params)
            on_real, model = self._judge(model, prng.named(key, "real"), real, mask)
            on_fake, model = self._judge(model, prng.named(key, "fake"), fake)
            loss = losses.adversarial(on_real, True, mask)
            return loss + losses.adversarial(on_fake, False), model.batch_stats

        (loss, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
            state.discriminator.params
        )
        update, opt_state = self.tx.update(
            gradient, state.discriminator_opt, state.discriminator.params
        )
        params = optax.apply_updates(state.discriminator.params, update)
        metrics = {"discriminator_loss": loss}
        return ModelState(params, batch_stats), opt_state, metrics

    def _private_discriminator_step(
        self, state: GanState, key, image, mask, fake, client: Client | None
    ):
        """As `_discriminator_step`: of real images it sees the noisy mean gradient."""
        assert self.mechanism is not None and client is not None
        params = state.discriminator.params
        assert not state.discriminator.batch_stats  # it has group-norm

        def on_real(image: Array) -> Tree:
            def objective(params: Tree) -> Array:
                model = state.discriminator.replace(params=params)
                return losses.adversarial(self._logits(model, image[None])[0], True)

            return jax.grad(objective)(params)

        def on_fake(params: Tree) -> Array:
            model = state.discriminator.replace(params=params)
            judged, _ = self._judge(model, prng.named(key, "fake"), fake)
            return losses.adversarial(judged, False)

        gradient = self.mechanism.mean_gradient(
            on_real,
            self._shifted(prng.named(key, "real"), self.encode(image)),
            mask,
            client=client,
            batch_size=self.batch_size,
            key=prng.named(key, "privacy"),
        )
        gradient = trees.add(gradient, jax.grad(on_fake)(params))
        update, opt_state = self.tx.update(gradient, state.discriminator_opt, params)
        params = optax.apply_updates(params, update)
        return ModelState(params, {}), opt_state

    def _generator_loss(
        self,
        discriminator: Tree,
        key: Array,
        fake: Array,
        *,
        client_model: ModelState,
        class_share: Array,
        inverts: Array,
        statistics: ModelState,
    ) -> tuple[Array, dict[str, Array]]:
        loss, metrics = jnp.zeros(()), {}
        if self.discriminator is not None:
            judged, _ = self._judge(discriminator, prng.named(key, "generator"), fake)
            loss = metrics["generator_loss"] = losses.adversarial(judged, True)
        image = self.decode(fake)
        if self.entropy_weight or self.diversity_weight:
            if self.classifier_train_mode:
                logits, _ = self.classifier.train_logits(client_model, image)
            else:
                logits = self.classifier.logits(client_model, image)
            metrics["entropy"] = losses.entropy(logits)
            metrics["diversity"] = losses.diversity(logits, class_share)
            loss += self.entropy_weight * metrics["entropy"]
            loss += self.diversity_weight * metrics["diversity"]
        if self.inversion_weight:

            def distance(image: Array) -> Array:
                _, moments = self.classifier.logits_and_moments(statistics, image)
                return losses.statistics_distance(moments, statistics.batch_stats)

            # Where none of the clients that run together inverts, none computes it. The
            # gradient is computed within the branch, so that no branch has to hand on
            # what a later gradient would need.
            here = jax.lax.stop_gradient(image)
            found, gradient = jax.lax.cond(
                trees.any_entry(inverts),
                jax.value_and_grad(distance),
                lambda image: (jnp.zeros(()), jnp.zeros_like(image)),
                here,
            )
            found += jnp.vdot(gradient, image - here)
            metrics["inversion"] = jnp.where(inverts, found, 0)
            loss += self.inversion_weight * metrics["inversion"]
        return loss, metrics


def build(study: View, info: Info, classifier: Classifier) -> Gan:
    """The client GAN of a study.

    Args:
      study: a view of the settings with `generators`, `compat`, `model.dtype` and
        `compute.convolution`.
      info: properties of the data set.
      classifier: whose losses shape the generator.
    """
    config, compat = study.generators, study.compat
    size, kind = (
        dcgan.side_of(info.image_shape),
        (study.model.dtype, study.compute.convolution),
    )
    discriminator = None
    if config.discriminator == "network":
        discriminator = dcgan.Discriminator(size, config.width, *kind)
    return Gan(
        generator=dcgan.Generator(size, info.channels, config.width, *kind),
        discriminator=discriminator,
        classifier=classifier,
        tx=optax.adam(config.learning_rate, b1=0.5, b2=0.999),
        latent_dim=config.latent_dim,
        entropy_weight=config.entropy_weight,
        diversity_weight=config.diversity_weight,
        inversion_weight=config.inversion_weight,
        classifier_train_mode=compat.classifier_batch_norm == "train",
        normalised_range=compat.value_range == "normalised",
        ema_decay=config.ema_decay,
        translate=config.translate,
    )


def narrowed(model_gan: Gan, state: GanState, rates: Sequence[float]) -> GanState:
    """GANs cut to their first channels, by each client's rate; all else stays zero.

    Args:
      model_gan: the GAN.
      state: of the clients, leaves [C, ...].
      rates: [C], each client's fraction of the channels, in (0, 1].
    """

    def cut(module: networks.Module, model: ModelState) -> ModelState:
        return submodel.within(model, channel_mask(module, model, rates))

    generator, discriminator = model_gan.generator, state.discriminator
    if model_gan.discriminator is not None:
        discriminator = cut(model_gan.discriminator, discriminator)
    return state.replace(
        generator=cut(generator, state.generator),
        discriminator=discriminator,
        average=cut(generator, state.average) if state.average else (),
    )


def channel_mask(
    module: networks.Module, model: ModelState, rates: Sequence[float]
) -> ModelState:
    """Which parameters of a network clients hold: the first channels, by their rates.

    Args:
      module: the network.
      model: of the clients, leaves [C, ...].
      rates: [C], each client's fraction of the channels, in (0, 1].

    Returns:
      1 for a parameter that the client holds, else 0, as of `submodel.Part`.
    """
    masks = submodel.first_channels(module.widths, rates)
    return jax.vmap(lambda model, masks: submodel.held(model, module.spaces, masks))(
        model, masks
    )


def _model(variables: Tree) -> ModelState:
    return ModelState(variables["params"], variables.get("batch_stats", {}))
