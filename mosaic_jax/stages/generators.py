"""Stage 2: each client trains a GAN on its own images and sends the generator."""

import functools
import logging

import jax
import jax.numpy as jnp

from mosaic_jax import gan, parallel, prng, training, trees
from mosaic_jax.data import augment
from mosaic_jax.settings import Settings, to_mapping
from mosaic_jax.stages.base import Context, Outcome, Stage
from mosaic_jax.types import Array, Generators, ModelState

_log = logging.getLogger(__name__)

# Added to each class's share, so that a class the client lacks is dear, not infinite.
LABEL_SMOOTHING = 1e-3
NUM_COLLAPSE_SAMPLES = 64


def stage(settings: Settings) -> Stage:
    """Stage 2; its inputs depend on when it runs and which classifier it uses."""
    config = settings.generators
    needs = []
    if config.classifier == "client":
        needs.append("client_models")
    if config.inversion_weight:
        needs.append("global_model")
    return Stage(
        name="generators",
        needs=tuple(needs),
        provides=("client_generators",),
        depends={
            "generators": to_mapping(config),
            "local": to_mapping(settings.local) if config.classifier == "fresh" else {},
        },
        run=_run,
    )


def num_steps(epochs: int, steps: int, size: Array, batch_size: int) -> Array:
    """[C] int32: steps of each client, `epochs` passes over its images or `steps`."""
    if epochs:
        return epochs * training.steps_per_epoch(size, batch_size)
    return jnp.full_like(size, steps)


def class_shares(label_count: Array, target: str) -> Array:
    """[C, K]: over which classes each client's samples should spread."""
    if target == "uniform":
        return jnp.full(label_count.shape, 1 / label_count.shape[1])
    share = label_count / jnp.sum(label_count, axis=1, keepdims=True) + LABEL_SMOOTHING
    return share / jnp.sum(share, axis=1, keepdims=True)


def deviation(model_gan: gan.Gan, generator: ModelState, key: Array) -> Array:
    """[] mean over pixels of the deviation over samples; near 0: collapsed."""
    z = jax.random.normal(key, (NUM_COLLAPSE_SAMPLES, model_gan.latent_dim))
    return jnp.mean(jnp.std(model_gan.sample(generator, z), axis=0))


def _run(
    context: Context,
    client_models: ModelState | None = None,
    global_model: ModelState | None = None,
) -> Outcome:
    config = context.settings.generators
    if client_models is None:
        client_models = _fresh_classifiers(context)
    if global_model is None:  # only read when the inversion loss is on
        global_model = trees.take(client_models, 0)
    model_gan = gan.build(
        context.settings.generators, context.data.info, context.classifier
    )
    state = _train(context, model_gan, client_models, global_model)
    generators = state.average if config.ema_decay else state.generator

    @jax.jit
    def deviations(generators: ModelState, key: Array) -> Array:
        return parallel.client_map(lambda g: deviation(model_gan, g, key), generators)

    spread = deviations(generators, prng.named(context.key, "collapse"))
    alive = spread >= config.collapse_below
    collapsed = [i for i, ok in enumerate(alive.tolist()) if not ok]
    if collapsed:
        _log.warning("generators of clients %s collapsed; they are left out", collapsed)
    return Outcome(
        artifacts={"client_generators": Generators(model=generators, alive=alive)},
        results={
            "deviation": spread.tolist(),
            "collapsed_clients": collapsed,
        },
        up={"generators": trees.num_bytes(generators)},
    )


def _train(context: Context, model_gan, client_models, global_model):
    config, data = context.settings.generators, context.data.clients
    steps = num_steps(config.epochs, config.steps, data.size, config.batch_size)
    shares = class_shares(data.label_count, config.diversity_target)
    inverts = data.size < config.inversion_below
    clients = jnp.arange(data.num_clients)

    def train_step(data, key, i, state, step, client_model, global_model):
        batch = training.client_batch(
            data,
            i,
            step,
            key=key,
            batch_size=config.batch_size,
            augmentation="none",
        )
        return model_gan.step(
            state,
            prng.at(prng.named(key, "step"), step, i),
            batch.image,
            batch.mask,
            client_model=client_model,
            class_share=shares[i],
            inverts=inverts[i],
            statistics=global_model,
        )

    @jax.jit
    def chunk(data, client_models, global_model, key, state, first, end):
        def one(i, state, client_model):
            # A client with fewer steps stops early instead of idling along.
            def body(step, carry):
                state, metrics = train_step(
                    data, key, i, carry[0], step, client_model, global_model
                )
                return state, jax.tree.map(jnp.add, carry[1], metrics)

            shape = jax.eval_shape(
                lambda s: train_step(data, key, i, s, 0, client_model, global_model)[1],
                state,
            )
            zero = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shape)
            last = jnp.minimum(end, steps[i])
            state, total = jax.lax.fori_loop(first, last, body, (state, zero))
            return state, total, jnp.maximum(last - first, 0)

        state, total, count = parallel.client_map(one, clients, state, client_models)
        done = jnp.maximum(jnp.sum(count), 1)
        return state, jax.tree.map(lambda m: jnp.sum(m) / done, total)

    @jax.jit
    def init(key):
        shape = context.data.info.image_shape
        return parallel.client_map(
            lambda i: model_gan.init(prng.at(key, i), shape), clients
        )

    return context.loop(
        "gan",
        functools.partial(chunk, data, client_models, global_model, context.key),
        init(prng.named(context.key, "networks")),
        int(steps.max()),
        every=context.settings.log.every_steps,
        samples_per_step=data.num_clients * config.batch_size,
    )


def _fresh_classifiers(context: Context) -> ModelState:
    """Train a new classifier per client on its own images."""
    config, local = context.settings.generators, context.settings.local
    data = context.data.clients
    steps = num_steps(config.classifier_epochs, 0, data.size, local.batch_size)
    clients = jnp.arange(data.num_clients)
    tx = training.sgd(local.learning_rate, local.weight_decay)
    key = prng.named(context.key, "fresh")

    @jax.jit
    def chunk(data, key, models, first, end):
        def one(i, model):
            def batch_at(step):
                return training.client_batch(
                    data,
                    i,
                    first + step,
                    key=key,
                    batch_size=local.batch_size,
                    augmentation=context.data.info.augmentation,
                )

            count = jnp.maximum(jnp.minimum(end, steps[i]) - first, 0)
            return training.local_training(
                context.classifier, tx, model, batch_at, count
            )

        models, loss = parallel.client_map(one, clients, models)
        return models, {"loss": jnp.sum(loss) / jnp.maximum(jnp.sum(loss > 0), 1)}

    shape = context.data.info.image_shape
    init = jax.jit(
        lambda key: parallel.client_map(
            lambda i: context.classifier.init(prng.at(key, i), shape), clients
        )
    )
    return context.loop(
        "classifier",
        functools.partial(chunk, data, key),
        init(key),
        int(steps.max()),
        every=context.settings.log.every_steps,
        samples_per_step=data.num_clients * local.batch_size,
    )


def sample_grid(
    model_gan: gan.Gan, generators: ModelState, key: Array, count: int
) -> Array:
    """`count` images per client from the same noise, uint8 [C, count, H, W, D]."""
    z = jax.random.normal(key, (count, model_gan.latent_dim))
    sample = jax.jit(
        lambda g: parallel.client_map(lambda one: model_gan.sample(one, z), g)
    )
    return augment.to_uint8(sample(generators))
