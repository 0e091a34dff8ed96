"""Audit: what the clients' generators give away and what they learned.

It measures and is no part of the method: it sees all real images, and nothing that it
finds goes back into training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax import audit, evaluation, gan, losses, prng, trees
from mosaic_jax.audit import Estimate
from mosaic_jax.data import augment
from mosaic_jax.loop import Run, Steps, repeat
from mosaic_jax.settings import Settings
from mosaic_jax.stages.base import Context, Outcome, Stage, assess, each_network
from mosaic_jax.types import Array, Generators, LabelledImages, ModelState, StudentState

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
# Of each client at most this many images are told from as many held-out ones.
MOST_MEMBERS = 1024
# Generated images in all whose features are compared with those of real ones.
MOST_FEATURES = 5000
NUM_PAIRS = 10
RANGE = {"fid": (0.0, np.inf), "kid": (-np.inf, np.inf)}
MEANING = {
    "auc": "chance that an attacker who holds a client's generator ranks one of the"
    " client's images above one that no client holds, by pixels; 0.5: nothing leaks",
    "feature_auc": "the same by features of a network trained on the real data",
    "closer_to_training": "share of generated images that are closer to a training"
    " image than to as many held-out ones; 0.5: no closer",
    "fid": "distance between generated and real test images, by Gaussians fitted to"
    " features of a network trained on the real data; 0: alike",
    "kid": "the same by a kernel, without bias of the number of images; 0: alike",
    "coverage": "share of the clients' images whose class their generator draws",
    "label_distance": "how far the classes drawn are from the client's own shares; 0:"
    " the same shares, 1: other classes",
}


def reference_stage() -> Stage:
    """A classifier trained on all clients' images, which no method may see."""
    return Stage(
        name="reference",
        needs=(),
        provides=("reference_model",),
        reads=("audit.reference_steps",),
        run=_run_reference,
    )


def audit_stage(settings: Settings) -> Stage:
    """Measure the generators."""
    return Stage(
        name="audit",
        needs=("reference_model", *each_network("client_generators", settings)),
        provides=(),
        reads=("audit.images", "generators"),
        run=_run,
    )


def _run_reference(context: Context) -> Run:
    classifier, data = context.classifier, context.data.clients
    tx = optax.adam(LEARNING_RATE)
    init = jax.jit(classifier.init, static_argnums=1)
    model = init(prng.named(context.key, "model"), context.data.info.image_shape)
    held = np.sort(np.concatenate(context.data.parts))
    augmentation = context.data.info.augmentation

    def chunk(args: Any, state: StudentState, first: Array, end: Array):
        images, rows, key = args

        def body(step: Array, state: StudentState) -> Any:
            at = prng.at(prng.named(key, "step"), step)
            chosen = rows[jax.random.randint(at, (BATCH_SIZE,), 0, len(rows))]
            image = augment.augment(
                augmentation,
                prng.named(at, "augment"),
                augment.to_signed(images.image[chosen]),
            )

            def objective(params: Any) -> tuple[Array, Any]:
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

        return repeat(body, state, first, end)

    state = yield Steps(
        "reference",
        chunk,
        (context.axis.replicate(data.images), jnp.asarray(held), context.key),
        StudentState(model=model, opt_state=tx.init(model.params)),
        context.settings.audit.reference_steps,
        every=context.settings.log.every_steps,
        samples_per_step=BATCH_SIZE,
    )
    results = assess(context, classifier.logits, state.model)
    return Outcome(
        artifacts={"reference_model": state.model},
        results={"reference_accuracy": results["test_accuracy"]},
    )


def _run(
    context: Context, reference_model: ModelState, **of_networks: Generators
) -> Run:
    yield from ()
    generators = trees.concatenate(list(of_networks.values()))
    numbers = np.concatenate(
        [context.of(name).data.clients.client.number for name in context.networks]
    )
    matched = {number: _matched(context, number) for number in numbers.tolist()}
    # Where no class of a client is held out there is nothing to compare with.
    places = [
        place
        for place, number in enumerate(numbers.tolist())
        if generators.alive[place] and len(matched[number][0])
    ]
    if not places:
        return Outcome(artifacts={})
    program = _program(context, max(len(inside) for inside, _ in matched.values()))
    measured = [
        _client(
            context,
            program,
            reference_model,
            trees.take(generators.model, place),
            int(numbers[place]),
            *matched[int(numbers[place])],
        )
        for place in places
    ]
    rows = [row for row, _, _, _ in measured]
    np_rng = np.random.RandomState(context.settings.seed)
    # Features of as many images as each client's share of all allows.
    wanted = _shares([row["images"] for row in rows], MOST_FEATURES)
    generated = np.concatenate(
        [
            feature[np_rng.permutation(len(feature))[:count]]
            for (_, feature, _, _), count in zip(measured, wanted, strict=True)
        ]
    )
    real = _features(context, reference_model, context.data.held_out["test"])
    estimates = {
        name: audit.weighted(
            [found[name] for _, _, found, _ in measured],
            [row["compared"] for row in rows],
        )
        for name in ("auc", "feature_auc", "closer_to_training")
    }
    estimates["fid"] = audit.fid_estimate(generated, real, np_rng)
    estimates["kid"] = audit.kid_estimate(generated, real, np_rng)
    sizes = np.array([row["images"] for row in rows], float)
    for name in ("coverage", "label_distance"):
        estimates[name] = _over_clients(np.array([r[name] for r in rows]), sizes)
    headline = {
        name: found.interval(*RANGE.get(name, (0.0, 1.0))) | {"meaning": MEANING[name]}
        for name, found in estimates.items()
    }
    pairs = sorted((pair for *_, pair in measured), key=lambda pair: pair["ratio"])
    worst = pairs[:NUM_PAIRS]
    return Outcome(
        artifacts={},
        results={"headline": headline, "clients": rows},
        pictures={name: np.stack([pair[name] for pair in worst]) for name in worst[0]},
    )


def _over_clients(values: np.ndarray, weight: np.ndarray) -> Estimate:
    """Weighted mean over clients, with the variance of one drawn anew."""
    share = weight / weight.sum()
    mean = float(values @ share)
    return Estimate(mean, float(share**2 @ (values - mean) ** 2))


def _shares(size: list[int], most: int) -> np.ndarray:
    """How many of each, in proportion to `size`, `most` or somewhat more in all."""
    return np.ceil(np.array(size) / sum(size) * most).astype(int)


def _matched(context: Context, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a client's images and of as many held-out ones of the same classes."""
    data, part = context.data, np.asarray(context.data.parts[number])
    inside, outside = audit.matched_rows(
        np.asarray(data.clients.images.label)[part],
        np.asarray(data.held_out["test"].label),
        MOST_MEMBERS,
        np.random.RandomState([context.settings.seed, number]),
    )
    return part[inside], outside


def _program(context: Context, length: int) -> Callable[..., dict[str, np.ndarray]]:
    """One client's generated images against two equal sets of up to `length` real ones.

    Called with the generator, the reference model, a key and both sets.
    """
    model_gan = gan.build(context.settings, context.data.info, context.classifier)
    classifier, count = context.classifier, context.settings.audit.images

    def flat(image: Array) -> Array:
        return image.reshape(len(image), -1)

    @jax.jit
    def run(
        generator: ModelState,
        reference: ModelState,
        key: Array,
        member: Array,
        other: Array,
        mask: Array,
    ) -> dict[str, Array]:
        z = jax.random.normal(key, (count, model_gan.latent_dim))
        # What is sent is what can be stored: 256 levels.
        image = augment.to_uint8(model_gan.sample(generator, z))
        spaces = {}
        shown = [augment.to_signed(x) for x in (image, member, other)]
        spaces["pixels"] = [flat(x) for x in shown]
        spaces["features"] = [classifier.features(reference, x) for x in shown]
        feature = spaces["features"][0]
        found = {
            "image": image,
            "feature": feature,
            "predicted": jnp.argmax(classifier.head(reference, feature), axis=-1),
        }
        every = jnp.ones(count, bool)
        for name, (fake, inside, outside) in spaces.items():
            found |= {
                f"{name}_member": audit.nearest(inside, fake, every)[0],
                f"{name}_other": audit.nearest(outside, fake, every)[0],
                f"{name}_to_member": audit.nearest(fake, inside, mask),
                f"{name}_to_other": audit.nearest(fake, outside, mask),
            }
        return found

    def padded(
        generator: ModelState,
        reference: ModelState,
        key: Array,
        member: np.ndarray,
        other: np.ndarray,
    ) -> dict[str, np.ndarray]:
        compared, shape = len(member), (length, *member.shape[1:])
        found = run(
            generator,
            reference,
            key,
            np.resize(member, shape),
            np.resize(other, shape),
            np.arange(length) < compared,
        )
        return jax.device_get(found)

    return padded


def _client(
    context: Context,
    program: Callable[..., dict[str, np.ndarray]],
    reference: ModelState,
    generator: ModelState,
    number: int,
    inside: np.ndarray,
    outside: np.ndarray,
) -> tuple[dict[str, Any], np.ndarray, dict[str, Estimate], dict[str, Any]]:
    """Findings of one client: row, features [n, F], estimates, its worst pair."""
    data, compared = context.data, len(inside)
    member = data.clients.images.image[inside]
    other = data.held_out["test"].image[outside]
    key = prng.at(context.key, number)
    found = program(generator, reference, key, member, other)
    count = data.label_count[number]
    estimates = {
        name: audit.auc(
            -found[f"{space}_member"][:compared], -found[f"{space}_other"][:compared]
        )
        for name, space in (("auc", "pixels"), ("feature_auc", "features"))
    }
    (inner, inner_row), (outer, outer_row) = (
        found["pixels_to_member"],
        found["pixels_to_other"],
    )
    estimates["closer_to_training"] = audit.share(inner < outer)
    worst = int(np.argmin(inner / np.maximum(outer, 1e-9)))
    row = {
        "client": number,
        "images": len(data.parts[number]),
        "compared": compared,
        **{name: estimate.value for name, estimate in estimates.items()},
        "coverage": audit.coverage(found["predicted"], count),
        "label_distance": audit.label_distance(found["predicted"], count),
    }
    pair = {
        "client": np.array(number),
        "ratio": float(inner[worst] / max(outer[worst], 1e-9)),
        "generated": found["image"][worst],
        "nearest_train": member[inner_row[worst]],
        "nearest_held_out": other[outer_row[worst]],
    }
    return row, found["feature"], estimates, pair


def _features(
    context: Context, reference: ModelState, images: LabelledImages
) -> np.ndarray:
    """[n, F] of real images, at most as many as generated ones are compared."""
    image = images.image[:MOST_FEATURES]
    size = context.settings.evaluation.batch_size
    run = jax.jit(
        lambda model, image: evaluation.predict(
            lambda x: context.classifier.features(model, x), image, batch_size=size
        )
    )
    return np.asarray(run(reference, image))
