"""Stage 2: each client trains a GAN on its own images and sends the generator."""

import logging
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import gan, models, parallel, prng, settings, training, trees
from mosaic_jax.data import augment
from mosaic_jax.loop import Run
from mosaic_jax.models import submodel
from mosaic_jax.stages import local, rounds
from mosaic_jax.stages.base import Context, Outcome, Stage
from mosaic_jax.types import Array, ClientModels, GanState, Generators, ModelState, Tree

_log = logging.getLogger(__name__)

# Added to each class's share, so that a class the client lacks is dear, not infinite.
LABEL_SMOOTHING = 1e-3
NUM_COLLAPSE_SAMPLES = 64
# What reports show: the same noise after these shares of a client's steps.
FILM_SHARES = (0.05, 0.2, 0.5, 1.0)
NUM_FILM_IMAGES = 8
NUM_FILM_CLIENTS = 20


@flax.struct.dataclass
class Filmed:
    """A client's GAN, and images of its generator at several moments.

    `film` is uint8 [T, n, H, W, D], black where a moment is still to come.
    """

    gan: GanState
    film: Array


def stage(study: settings.Settings) -> Stage:
    """Stage 2; its inputs depend on when it runs and which classifier it uses."""
    config = study.generators
    needs = []
    if config.classifier == "client":
        needs.append("client_models")
    if config.inversion_weight:
        needs.append("global_model")
    return Stage(
        name="generators",
        needs=tuple(needs),
        provides=("client_generators",),
        reads=(
            "generators",
            *(("local",) if config.classifier == "fresh" else ()),
            *rounds.holdings(study),
        ),
        run=_run,
    )


def num_steps(config: settings.Generators, size: np.ndarray) -> np.ndarray:
    """[C] int: GAN steps of each client, by its `size` [C] images.

    `config.epochs` passes over its images, at least `min_steps` and at most
    `max_steps`; or `config.steps`, the same for all.
    """
    if not config.epochs:
        return np.full_like(size, config.steps)
    steps = steps_of_epochs(config.epochs, size, config.batch_size)
    return np.clip(steps, config.min_steps, config.max_steps or None)


def steps_of_epochs(epochs: int, size: np.ndarray, batch_size: int) -> np.ndarray:
    """[C] int: minibatches of `epochs` passes over each client's `size` [C] images."""
    return epochs * np.asarray(training.steps_per_epoch(size, batch_size))


def class_shares(label_count: Array, target: str) -> Array:
    """[C, K]: over which classes each client's samples should spread."""
    if target == "uniform":
        return jnp.full(label_count.shape, 1 / label_count.shape[1])
    share = label_count / jnp.sum(label_count, axis=1, keepdims=True) + LABEL_SMOOTHING
    return share / jnp.sum(share, axis=1, keepdims=True)


def deviation(model_gan: gan.Gan, generator: ModelState, z: Array) -> Array:
    """[] mean over pixels of the deviation over the samples of z; near 0: collapsed."""
    return jnp.mean(jnp.std(model_gan.sample(generator, z), axis=0))


def _run(
    context: Context,
    client_models: ClientModels | None = None,
    global_model: ModelState | None = None,
) -> Run:
    config = context.settings.generators
    # Of a client that has not trained yet, the global model.
    classifiers = client_models and client_models.model
    if classifiers is None:
        classifiers = yield from _fresh_classifiers(context)
    if global_model is None:  # only read when the inversion loss is on
        global_model = trees.take(classifiers, 0)
    model_gan = gan.build(context.settings, context.data.info, context.classifier)
    sizes = context.data.clients.client.size
    steps = num_steps(config, sizes)
    filmed = yield from _train(context, model_gan, classifiers, global_model, steps)
    generators = _uploaded(filmed.gan, config)
    sent = trees.num_bytes(generators)
    if context.rates:
        share = _held(model_gan.generator, generators, context.rates)
        sent = submodel.num_bytes(generators, share)

    @jax.jit
    def deviations(generators: ModelState, key: Array) -> Array:
        z = jax.random.normal(key, (NUM_COLLAPSE_SAMPLES, model_gan.latent_dim))
        return parallel.expert_map(lambda g: deviation(model_gan, g, z), generators)

    spread = deviations(generators, prng.named(context.key, "collapse"))
    alive = spread >= config.collapse_below
    number = context.data.clients.client.number
    collapsed = number[~np.asarray(alive)].tolist()
    if collapsed:
        _log.warning("generators of clients %s collapsed; they are left out", collapsed)
    return Outcome(
        artifacts={"client_generators": Generators(model=generators, alive=alive)},
        results={
            "deviation": spread.tolist(),
            "collapsed_clients": collapsed,
            "padding_waste": _padding_waste(context, steps),
        },
        pictures=_pictures(context, filmed.film),
        up={"generators": sent},
    )


def _uploaded(state: GanState, config: settings.Generators) -> ModelState:
    return state.average if config.ema_decay else state.generator


def _pictures(context: Context, film: Array) -> dict[str, np.ndarray]:
    """Of the first clients: `film`, and as many of their real images."""
    data = context.data.clients
    rows = data.client.index[:NUM_FILM_CLIENTS, :NUM_FILM_IMAGES]
    return {
        "share": np.array(FILM_SHARES),
        "client": np.asarray(data.client.number[:NUM_FILM_CLIENTS]),
        "film": np.asarray(film[:NUM_FILM_CLIENTS]),
        "real": np.asarray(data.images.image)[rows],
    }


def _padding_waste(context: Context, steps: np.ndarray) -> float:
    """Samples processed for each that was asked for: short batches and idle lanes."""
    config, sizes = context.settings.generators, context.data.clients.client.size
    plan = context.axis.plan(steps, context.settings.log.every_steps)
    processed = plan.processed * config.batch_size
    each = np.full_like(sizes, config.batch_size, float)
    if config.epochs:
        each = sizes / steps_of_epochs(1, sizes, config.batch_size)
    waste = processed / float(np.sum(steps * each))
    _log.info("generators: padding waste %.3f", waste)
    return waste


def _train(
    context: Context,
    model_gan: gan.Gan,
    classifiers: ModelState,
    global_model: ModelState,
    steps: np.ndarray,
) -> Run:
    config, data = context.settings.generators, context.clients
    networks = _init_each(context, "networks", model_gan.init)
    share = None
    if context.rates:
        networks = _narrow(model_gan, networks, context.rates)
        share = rounds.held_in(context, global_model, context.settings.init.rounds - 1)
    moments = np.ceil(steps[:, None] * np.array(FILM_SHARES)).astype(np.int32)
    film_shape = (len(steps), len(FILM_SHARES), NUM_FILM_IMAGES)
    each = (
        classifiers,
        class_shares(data.client.label_count, config.diversity_target),
        data.client.size < config.inversion_below,
        share,
        moments,
    )

    def film(
        state: GanState, number: Array, moments: Array, key: Array, film: Array
    ) -> Array:
        shape = (NUM_FILM_IMAGES, model_gan.latent_dim)
        z = jax.random.normal(prng.named(key, "film"), shape)

        def taken() -> Array:
            image = model_gan.sample(_uploaded(state, config), z)
            now = moments == number + 1
            return jnp.where(
                now[:, None, None, None, None], augment.to_uint8(image), film
            )

        return jax.lax.cond(jnp.any(moments == number + 1), taken, lambda: film)

    def step(state, number, batch, client, each, global_model, key):
        client_model, class_share, inverts, share, moments = each
        if share is not None:
            global_model = submodel.within(global_model, share)
        trained, metrics = model_gan.step(
            state.gan,
            prng.at(prng.named(key, "step"), number, client.number),
            batch.image,
            batch.mask,
            client_model=client_model,
            class_share=class_share,
            inverts=inverts,
            statistics=global_model,
        )
        taken = film(trained, number, moments, key, state.film)
        return Filmed(trained, taken), metrics

    blank = jnp.zeros((*film_shape, *context.data.info.image_shape), jnp.uint8)
    return local.run(
        context,
        "gan",
        step,
        Filmed(networks, blank),
        steps,
        key=context.key,
        batch_size=config.batch_size,
        augmentation="none",
        each=each,
        shared=global_model,
    )


def _narrow(model_gan: gan.Gan, networks: GanState, rates: Sequence[float]) -> GanState:
    """The networks [C, ...] with the first channels only, by each client's rate.

    What is zero stays zero: these are networks of the size that each client affords.
    """

    def cut(module: models.Module, model: ModelState) -> ModelState:
        return submodel.within(model, _held(module, model, rates))

    generator, discriminator = model_gan.generator, model_gan.discriminator
    return networks.replace(
        generator=cut(generator, networks.generator),
        discriminator=cut(discriminator, networks.discriminator),
        average=cut(generator, networks.average),
    )


def _held(
    module: models.Module, model: ModelState, rates: Sequence[float]
) -> ModelState:
    """1 where clients hold networks `model` [C, ...] of `module`, else 0."""
    masks = submodel.first_channels(module.widths, rates)
    return jax.vmap(lambda model, masks: submodel.held(model, module.spaces, masks))(
        model, masks
    )


def _fresh_classifiers(context: Context) -> Run:
    """Train a new classifier per client on its own images."""
    fresh = _init_each(context, "fresh", context.classifier.init)
    if context.rates:
        share = rounds.held_in(context, trees.take(fresh, 0), 0)
        fresh = submodel.within(fresh, share)
    epochs = context.settings.generators.classifier_epochs
    sizes = context.data.clients.client.size
    return local.train(
        context,
        "classifier",
        fresh,
        steps_of_epochs(epochs, sizes, context.settings.local.batch_size),
        key=prng.named(context.key, "fresh"),
    )


def _init_each(
    context: Context, name: str, init: Callable[[Array, tuple[int, int, int]], Tree]
) -> Tree:
    """Fresh networks [C, ...]."""
    key, shape = prng.named(context.key, name), context.data.info.image_shape

    @jax.jit
    def run(key: Array, number: Array) -> Tree:
        return context.axis.map(lambda i: init(prng.at(key, i), shape), number)

    return run(key, context.clients.client.number)
