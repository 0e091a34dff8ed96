"""Stage 2: each client trains a GAN on its own images and sends the generator."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import flops, prng, programs, schema, trees, types
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import Array, ClientModels, GanState, ModelState, Tree
from mosaic_jax.fl import gan, training
from mosaic_jax.fl.accounting import Release
from mosaic_jax.nn import submodel
from mosaic_jax.nn.networks import MAX_WIDTH
from mosaic_jax.stages import federation, films, health, local, patience
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)

# Added to each class's share, so that a class that the client lacks has a finite cost.
LABEL_SMOOTHING = 1e-3


@dataclasses.dataclass(frozen=True)
class Generators(Stage):
    """Stage 2: one GAN per client, whose generator is sent to the server once."""

    name = "generators"

    epochs: int = schema.at_least(
        0, default=200, meaning="passes over each client's images; 0: use steps"
    )
    # 200 epochs of 72 images are 400 steps, too few for a GAN; the largest client of
    # the published split takes 31,400.
    min_steps: int = schema.at_least(
        0, default=2000, meaning="with epochs: least steps of a client"
    )
    max_steps: int = schema.at_least(
        0, default=0, meaning="with epochs: most steps of a client; 0: no bound"
    )
    steps: int = schema.at_least(
        0, default=0, meaning="steps of each client; 0: use epochs"
    )
    batch_size: int = schema.at_least(2, default=64, meaning="images in a step")
    learning_rate: float = schema.above(
        0, default=2e-4, meaning="of Adam(0.5, 0.999), for both networks"
    )
    latent_dim: int = schema.between(
        1, MAX_WIDTH, default=100, meaning="dimensions of the noise"
    )
    width: int = schema.between(
        1, MAX_WIDTH, default=64, meaning="channels of both networks: ngf and ndf"
    )
    discriminator: str = schema.one_of(
        ("network", "classifier"),
        default="network",
        meaning="what judges generated images: a network that learns to tell them from"
        " real ones, or the frozen classifier, by how sure it is",
    )
    augment: bool = schema.anything(
        default=False,
        meaning="the discriminator's real images are augmented as a classifier's",
    )
    entropy_weight: float = schema.at_least(
        0, default=0.0, meaning="> 0: favours images that the classifier is sure of"
    )
    diversity_weight: float = schema.at_least(
        0, default=5.0, meaning="spreads images over the client's classes"
    )
    inversion_weight: float = schema.at_least(
        0, default=0.01, meaning="match the global model's batch-norm moments"
    )
    inversion_below: int = schema.at_least(
        0, default=1000, meaning="inversion only for clients with fewer images (tau)"
    )
    translate: int = schema.at_least(
        0, default=0, meaning="pixels by which the discriminator's input is shifted"
    )
    ema_decay: float = schema.below_one(
        default=0.0, meaning="> 0: upload the running mean of the generator"
    )
    patience: int = schema.at_least(
        0,
        default=0,
        meaning="> 0: a client sends the generator whose images looked most like its"
        " own, and stops after so many looks without a nearer one",
    )
    look_every: int = schema.at_least(
        1, default=100, meaning="steps between looks, with patience"
    )
    collapse_below: float = schema.at_least(
        0, default=0.05, meaning="pixel deviation over samples, on a scale of 2"
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Steps or epochs, not both; inversion needs batch-norm statistics."""
        if (self.epochs == 0) == (self.steps == 0):
            yield (
                f"generators.steps = {self.steps}: must be 0 where"
                f" generators.epochs = {self.epochs} is not, and the other way round"
            )
        if 0 < self.max_steps < self.min_steps:
            yield (
                f"generators.max_steps = {self.max_steps}: must be 0, for no bound,"
                f" or >= generators.min_steps = {self.min_steps}"
            )
        if self.discriminator == "classifier":
            yield from self._problems_of_classifier()
        used = study.method == "mosaic" and self.inversion_weight > 0
        if study.model.norm != "batch" and used:
            yield (
                f"generators.inversion_weight = {self.inversion_weight}: must be 0 for"
                f" model.norm = {study.model.norm!r}, which has no statistics to match"
            )

    def _problems_of_classifier(self) -> Iterator[str]:
        """What a classifier that plays the discriminator needs, and does not see."""
        told = "generators.discriminator = 'classifier'"
        if self.entropy_weight == 0:
            yield (
                f"generators.entropy_weight = {self.entropy_weight}: must be > 0 for"
                f" {told}, which judges by it"
            )
        if self.translate:
            yield (
                f"generators.translate = {self.translate}: must be 0 for {told}, whose"
                " input is not shifted"
            )
        if self.augment:
            yield (
                f"generators.augment = {self.augment}: must be False for {told}, which"
                " is shown no real images"
            )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """Classifiers of the clients, and the model whose statistics are matched."""
        fresh, inverts = study.compat.fresh_classifier, self.inversion_weight > 0
        models = () if fresh else ("client_models",)
        return (*models, *(("global_model",) if inverts else ()))

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The generators that clients send."""
        del study
        return ("client_generators",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Also the local SGD, where classifiers are trained for the GANs."""
        local = ("local",) if study.compat.fresh_classifier else ()
        return ("compat", *local, *federation.reads_holdings(study))

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """Steps of the discriminator, and of fresh classifiers, shape the generator."""
        found = []
        if self.discriminator == "network":
            steps = num_steps(self, sizes)
            found.append(Release("generators", steps, self.batch_size))
        if study.compat.fresh_classifier:
            epochs, size = study.compat.classifier_epochs, study.local.batch_size
            steps = steps_of_epochs(epochs, sizes, size)
            found.append(Release("generators", steps, size))
        return tuple(found)

    def run(
        self,
        context: Context,
        client_models: ClientModels | None = None,
        global_model: ModelState | None = None,
    ) -> Run:
        """Train the GANs, film them, and mark the generators that collapsed."""
        return _train_generators(self, context, client_models, global_model)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Generators [C, ...], and which of them have not collapsed."""
        return {"client_generators": shapes(blueprint)}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of all planned GAN steps, and of training fresh classifiers."""
        data, settings = blueprint.data, blueprint.settings
        size, shape = data.clients.client.size, data.info.image_shape
        model_gan = gan.build(settings, data.info, blueprint.classifier)
        steps = num_steps(self, size)
        total = 0.0
        for inverts in (False, True):
            each = model_gan.step_flops(shape, inverts=inverts)
            of_these = (size < self.inversion_below) == inverts
            total += steps[of_these].sum() * self.batch_size * each
        if settings.compat.fresh_classifier:
            batch = settings.local.batch_size
            steps = steps_of_epochs(settings.compat.classifier_epochs, size, batch)
            forward = blueprint.classifier.flops(shape)
            total += steps.sum() * batch * flops.TRAINED * forward
        return float(total)


class TrainedGan(types.Struct):
    """A client's GAN in training.

    `film` uint8 [T, n, H, W, D] has n images at each of T moments, black until the
    moment has come; `best` is what patience goes by, () without it.
    """

    gan: GanState
    film: Array
    best: Tree


def shapes(blueprint: Blueprint) -> types.Generators:
    """Shapes and types of the generators of a study's clients."""
    info, count = blueprint.data.info, blueprint.data.clients.num_clients
    model_gan = gan.build(blueprint.settings, info, blueprint.classifier)
    state = jax.eval_shape(lambda: model_gan.init(prng.root(0), info.image_shape))
    model = jax.eval_shape(lambda g: trees.broadcast(g, count), state.generator)
    return types.Generators(model, trees.shape((count,), bool))


def num_steps(config: Generators, size: Array) -> np.ndarray:
    """Number of GAN steps of each client, [C] int.

    `config.epochs` passes over its `size` [C] images, but at least `config.min_steps`
    and at most `config.max_steps`; or `config.steps`, the same for all clients.
    """
    if not config.epochs:
        return np.full_like(size, config.steps)
    steps = steps_of_epochs(config.epochs, size, config.batch_size)
    return np.clip(steps, config.min_steps, config.max_steps or None)


def steps_of_epochs(epochs: int, size: Array, batch_size: int) -> np.ndarray:
    """Number of minibatches in some passes over each client's images, [C] int.

    Args:
      epochs: number of passes.
      size: [C] int, images of each client.
      batch_size: images in a minibatch; the last one of a pass may be short.
    """
    return epochs * np.asarray(training.steps_per_epoch(size, batch_size))


def class_targets(label_count: Array, target: str) -> Array:
    """Target frequencies of the classes among each client's samples.

    Args:
      label_count: [C, K] int, images of each class at each client.
      target: "labels", the client's own smoothed frequencies, or "uniform".

    Returns:
      [C, K] float32, rows sum to 1.
    """
    if target == "uniform":
        return jnp.full(label_count.shape, 1 / label_count.shape[1])
    share = label_count / jnp.sum(label_count, axis=1, keepdims=True) + LABEL_SMOOTHING
    return share / jnp.sum(share, axis=1, keepdims=True)


def _train_generators(
    config: Generators,
    context: Context,
    client_models: ClientModels | None,
    global_model: ModelState | None,
) -> Run:
    # That of a client that has not trained yet is the global model.
    classifiers = client_models and client_models.model
    if classifiers is None:
        classifiers = yield from _fresh_classifiers(context)
    trained = yield from train(
        context,
        "gan",
        classifiers,
        # Read by the inversion loss only, which is off where there is no global model.
        global_model or trees.take(classifiers, 0),
        pictures=lambda state: films.latest(state.film),
    )
    model_gan = gan.build(context.settings, context.data.info, context.classifier)
    steps = num_steps(config, context.data.clients.client.size)
    generators = uploaded(trained, config)
    done = np.asarray(trained.best.steps) if trained.best else steps
    sent = trees.num_bytes(generators)
    if context.rates:
        mask = gan.channel_mask(model_gan.generator, generators, context.rates)
        sent = submodel.num_bytes(generators, mask)

    found = health.of_generators(
        context, model_gan, generators, classifiers, config.collapse_below
    )
    collapsed = found.number[~found.alive].tolist()
    return Outcome(
        artifacts={
            "client_generators": types.Generators(generators, jnp.asarray(found.alive))
        },
        results={
            **{
                name: np.round(getattr(found, name), 5).tolist()
                for name in ("deviation", "contrast", "nearest", "moments")
            },
            "collapsed_clients": collapsed,
            "steps": done.tolist(),
            "padding_waste": _padding_waste(context, steps, done),
        },
        clients={"generator": found.status},
        section=films.section(context, collapsed),
        pictures=films.pictures(context, trained.film),
        up={"generators": sent},
    )


def uploaded(state: TrainedGan, config: Generators) -> ModelState:
    """The generators that clients send.

    Args:
      state: after the last step, leaves [C, ...].
      config: of the stage.
    """
    return state.best.model if config.patience else _latest(state.gan, config)


def _latest(state: GanState, config: Generators) -> ModelState:
    """The generator as it is after the last step, or its running mean."""
    return state.average if config.ema_decay else state.generator


def _padding_waste(context: Context, steps: np.ndarray, done: np.ndarray) -> float:
    """Processed samples per training sample, >= 1: short batches, idle lanes.

    Of planned `steps` [C] the clients trained for `done` [C], and idled after that:
    idle lanes count, though they cost nothing where all of a device idle.
    """
    config, sizes = context.settings.generators, context.data.clients.client.size
    plan = context.axis.plan(steps, context.settings.log.every_steps)
    processed = plan.processed * config.batch_size
    each = np.full_like(sizes, config.batch_size, float)
    if config.epochs:
        each = sizes / steps_of_epochs(1, sizes, config.batch_size)
    waste = processed / float(np.sum(done * each))
    _log.info("generators: %.3f samples processed for each that trains", waste)
    return waste


def train(
    context: Context,
    name: str,
    classifiers: ModelState,
    global_model: ModelState,
    *,
    pictures: Callable[[TrainedGan], dict[str, Any]] | None = None,
) -> Run:
    """Train a GAN of each client, with the settings `generators`.

    Args:
      context: of the stage.
      name: of the loop.
      classifiers: of the clients, leaves [C, ...].
      global_model: whose moments the inversion loss matches.
      pictures: see `Steps`.

    Returns:
      `TrainedGan`, leaves [C, ...].
    """
    config, data = context.settings.generators, context.clients
    steps = num_steps(config, context.data.clients.client.size)
    model_gan = gan.build(context.settings, context.data.info, context.classifier)
    info = context.data.info
    if context.mechanism is not None:
        model_gan = model_gan.private(context.mechanism, config.batch_size)
    networks = _init_each(context, "networks", model_gan.init)
    mask = None
    if context.rates:
        networks = gan.narrowed(model_gan, networks, context.rates)
        latest = context.settings.init.rounds - 1
        mask = federation.trained_masks(context, global_model, latest)
    moments = np.ceil(steps[:, None] * np.array(films.SHARES)).astype(np.int32)
    film_shape = (len(steps), len(films.SHARES), films.NUM_IMAGES)
    own = patience.of_own_images(context, classifiers) if config.patience else ()
    each = (
        classifiers,
        class_targets(
            data.client.label_count, context.settings.compat.diversity_target
        ),
        data.client.size < config.inversion_below,
        mask,
        moments,
        own,
    )

    def images(generator: ModelState, key: Array, use: str, count: int) -> Array:
        z = jax.random.normal(prng.named(key, use), (count, model_gan.latent_dim))
        return model_gan.sample(generator, z)

    def step(state, number, batch, client, each, global_model, key):
        client_model, class_share, inverts, mask, moments, own = each
        if mask is not None:
            global_model = submodel.within(global_model, mask)

        def train(state: GanState) -> tuple[GanState, dict[str, Array]]:
            return model_gan.step(
                state,
                prng.at(prng.named(key, "step"), number, client.number),
                number,
                batch.image,
                batch.mask,
                client_model=client_model,
                class_share=class_share,
                inverts=inverts,
                statistics=global_model,
                client=client,
            )

        def look(trained: GanState, best: patience.Best) -> patience.Best:
            generator = _latest(trained, config)
            image = images(generator, key, "look", patience.NUM_IMAGES)
            feature = context.classifier.features(client_model, image)
            found = patience.distance(patience.moments(feature), own)
            return patience.look(best, generator, found)

        if config.patience:
            due = ((number + 1) % config.look_every == 0) | (number + 1 == moments[-1])
            trained, best, metrics = patience.step(
                train, look, state.gan, state.best, due, config.patience
            )
        else:
            (trained, metrics), best = train(state.gan), state.best
        film = films.add(
            state.film,
            moments,
            number,
            lambda: images(_latest(trained, config), key, "film", films.NUM_IMAGES),
        )
        return TrainedGan(trained, film, best), metrics

    best = ()
    if config.patience:
        best = jax.vmap(patience.start)(_latest(networks, config))

    blank = jnp.zeros((*film_shape, *info.image_shape), jnp.uint8)
    return local.run_steps(
        context,
        name,
        step,
        TrainedGan(networks, blank, best),
        steps,
        key=context.key,
        batch_size=config.batch_size,
        augmentation=info.augmentation if config.augment else "none",
        each=each,
        shared=global_model,
        pictures=pictures,
    )


def _fresh_classifiers(context: Context) -> Run:
    """Train a new classifier for each client on its own images."""
    fresh = _init_each(context, "fresh", context.classifier.init)
    if context.rates:
        mask = federation.trained_masks(context, trees.take(fresh, 0), 0)
        fresh = submodel.within(fresh, mask)
    epochs = context.settings.compat.classifier_epochs
    sizes = context.data.clients.client.size
    return local.train(
        context,
        "classifier",
        fresh,
        steps_of_epochs(epochs, sizes, context.settings.local.batch_size),
        key=prng.named(context.key, "fresh"),
    )


def _init_each(
    context: Context,
    name: str,
    init: Callable[[jax.Array, tuple[int, int, int]], Tree],
) -> Tree:
    """Initial networks of all clients, [C, ...]; `name` names their random stream."""
    key, shape = prng.named(context.key, name), context.data.info.image_shape

    # `init` is an argument, so that programs of other networks are told apart.
    def init_all(init: Callable[..., Tree], key: jax.Array, number: Array) -> Tree:
        return context.axis.map(lambda i: init(prng.at(key, i), shape), number)

    program = programs.jit(init_all, static_argnums=0)
    return program(init, key, context.clients.client.number)
