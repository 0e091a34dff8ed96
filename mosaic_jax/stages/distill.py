"""Stage 7: the global model learns from the teacher on generated images."""

import jax
import jax.numpy as jnp
import optax

from mosaic_jax import gan, losses, parallel, prng, trees
from mosaic_jax.data import augment
from mosaic_jax.distillation import mosaic
from mosaic_jax.errors import MosaicError
from mosaic_jax.loop import Run, Steps, repeat
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
    Generators,
    LabelledImages,
    ModelState,
    StudentState,
    Teacher,
    Tree,
)

TRANSLATE_PIXELS = 2


def stage(settings: Settings) -> Stage:
    """Stage 7."""
    return Stage(
        name="distill",
        needs=(
            "global_model",
            "teacher",
            *each_network("client_generators", settings),
        ),
        provides=("student",),
        reads=("distill", "meta", "generators"),
        run=_run,
    )


def generate(
    model_gan: gan.Gan, generators: ModelState, key: Array, count: int, num_clients: int
) -> Array:
    """`count` signed images from each generator, [C * count, H, W, D]."""

    def one(generator: ModelState, i: Array) -> Array:
        z = jax.random.normal(prng.at(key, i), (count, model_gan.latent_dim))
        return model_gan.sample(generator, z)

    images = parallel.expert_map(one, generators, jnp.arange(num_clients))
    return images.reshape(-1, *images.shape[2:])


def _run(
    context: Context,
    global_model: ModelState,
    teacher: Teacher,
    **of_networks: Generators,
) -> Run:
    settings, data = context.settings, context.data
    config = settings.distill
    # One network's clients after the other's.
    client_generators = trees.concatenate(list(of_networks.values()))
    sizes = [context.of(name).clients.client.size for name in context.networks]
    if not bool(client_generators.alive.any()):
        raise MosaicError(
            "generators: all have collapsed: train them longer (generators.epochs or"
            " generators.steps) or lower generators.collapse_below ="
            f" {settings.generators.collapse_below}"
        )
    ensemble = mosaic.build(settings.meta, context.networks, data.clients.num_classes)
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, config.steps)
    tx = optax.adam(rate)
    weight = client_generators.alive.astype(jnp.float32)
    if config.weighting == "size":
        weight *= jnp.concatenate(sizes)
    model_gan = gan.build(settings, data.info, context.classifier)
    batch_at = _batches(context, model_gan)

    def chunk(args, state, first, end):
        teacher, generators, weight, held_out, key = args

        def body(step, state):
            step_key = prng.at(prng.named(key, "step"), step)
            image, sample_weight = batch_at(step_key, generators, weight, held_out)
            return _student_step(
                context, ensemble, tx, state, teacher, image, sample_weight
            )

        return repeat(body, state, first, end)

    state = yield Steps(
        "student",
        chunk,
        (teacher, client_generators.model, weight, context.held_out, context.key),
        StudentState(model=global_model, opt_state=tx.init(global_model.params)),
        config.steps,
        every=settings.log.every_steps,
        samples_per_step=data.clients.num_clients * config.samples_per_generator,
    )
    results = assess(context, context.classifier.logits, state.model)
    return Outcome(artifacts={"student": state.model}, results=results)


def _batches(context: Context, model_gan: gan.Gan):
    """`batch_at(key, generators, weight [C], held_out)` -> images, sample weights."""
    config, data = context.settings.distill, context.data
    num_clients, count = data.clients.num_clients, config.samples_per_generator

    def batch_at(
        key: Array,
        generators: ModelState,
        weight: Array,
        held_out: dict[str, LabelledImages],
    ) -> tuple[Array, Array]:
        sample_weight = jnp.repeat(weight, count)
        if config.source == "generated":
            z_key = prng.named(key, "z")
            image = generate(model_gan, generators, z_key, count, num_clients)
        else:
            # An upper bound, not the method: real images that no client holds.
            real = held_out["validation"].image
            shape = (num_clients * count,)
            rows = jax.random.randint(prng.named(key, "rows"), shape, 0, len(real))
            image = augment.to_signed(real[rows])
            sample_weight = jnp.ones_like(sample_weight)
        augment_key = prng.named(key, "augment")
        if config.augment == "data":
            image = augment.augment(data.info.augmentation, augment_key, image)
        elif config.augment == "translate":
            image = augment.translate(augment_key, image, pixels=TRANSLATE_PIXELS)
        return image, sample_weight

    return batch_at


def _student_step(
    context: Context,
    ensemble: mosaic.Ensemble,
    tx: optax.GradientTransformation,
    state: StudentState,
    teacher: Teacher,
    image: Array,
    weight: Array,
) -> tuple[StudentState, dict[str, Array]]:
    config, classifier = context.settings.distill, context.classifier
    target = ensemble.logits(teacher, image)
    confidence = jnp.max(jax.nn.softmax(target), axis=-1)
    weight = weight * (confidence >= config.min_confidence)
    # No sample may be sure enough: a batch of weight 0 then changes nothing.
    weight = weight / jnp.maximum(jnp.sum(weight), 1e-12)

    def objective(params: Tree):
        model = state.model.replace(params=params)
        if config.batch_norm == "train":
            logits, batch_stats = classifier.train_logits(model, image, weight > 0)
        else:
            logits, batch_stats = classifier.logits(model, image), model.batch_stats
        loss = losses.distillation(
            logits,
            target,
            temperature=config.temperature,
            alpha=config.alpha,
            beta=config.beta,
            divergence=config.divergence,
            weight=weight,
        )
        return loss, (batch_stats, logits)

    (loss, (batch_stats, logits)), gradient = jax.value_and_grad(
        objective, has_aux=True
    )(state.model.params)
    update, opt_state = tx.update(gradient, state.opt_state, state.model.params)
    params = optax.apply_updates(state.model.params, update)
    agreement = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    metrics = {
        "loss": loss,
        "agreement": jnp.sum(agreement * weight),
        "confidence": jnp.sum(confidence * weight),
    }
    return StudentState(ModelState(params, batch_stats), opt_state), metrics
