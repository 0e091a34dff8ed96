"""Clipped gradients, noise and Poisson batches, and the steps that are made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.core.types import Batch, Client, GanState, ModelState
from mosaic_jax.fl import gan, privacy, training
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.nn import dcgan, losses
from tests import tiny

KEY = prng.root(0)
COUNT, CLASSES, FREE = 5, 4, 1e9


def private_classifier():
    return tiny.classifier(CLASSES, norm="group")


@functools.cache
def setting():
    """A classifier, its model, and a batch whose last two rows do not count."""
    network = private_classifier()
    model = tiny.varied(network, prng.named(KEY, "model"))
    image = jax.random.uniform(prng.named(KEY, "image"), (COUNT, 16, 16, 1), minval=-1)
    label = jnp.arange(COUNT, dtype=jnp.int32) % CLASSES
    return network, model, Batch(image, label, jnp.arange(COUNT) < COUNT - 2)


def of_image(model, batch):
    network = setting()[0]

    def objective(params):
        found = network.train_logits(model.replace(params=params), batch.image[None])[0]
        return losses.cross_entropy(found, batch.label[None])

    return jax.grad(objective)(model.params)


@jax.jit
def summed(model, batch, clip):
    slope = functools.partial(of_image, model)
    return privacy.clipped_sum(slope, batch, batch.mask, clip)


one_gradient = jax.jit(of_image)


def by_loop(model, batch, clip=FREE):
    """The clipped sum, image by image."""
    total = trees.zeros(model.params)
    for i in np.flatnonzero(batch.mask):
        found = one_gradient(model, trees.take(batch, int(i)))
        length = float(optax.tree.norm(found))
        scale = min(1.0, clip / length)
        total = jax.tree.map(lambda old, new, s=scale: old + s * new, total, found)
    return total


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def test_clipped_sums_equal_a_loop_over_images():
    _, model, batch = setting()
    free = by_loop(model, batch)
    tiny.close(summed(model, batch, FREE), free)
    clip = 0.3 * float(optax.tree.norm(free)) / 3
    tiny.close(summed(model, batch, clip), by_loop(model, batch, clip))


@pytest.mark.parametrize("at_once", [1, 3])
def test_clients_are_batched_over_images_in_pieces(at_once, monkeypatch):
    """Each client has its own kernels, and as many images as it draws."""
    monkeypatch.setattr(privacy, "_AT_ONCE_CPU", at_once)
    _, model, batch = setting()
    models = trees.stack([model, jax.tree.map(lambda leaf: 1.5 * leaf, model)])
    batches = trees.stack([batch, batch.replace(mask=jnp.arange(COUNT) < COUNT)])
    slopes = jax.jit(
        jax.vmap(
            lambda model, batch: privacy.clipped_sum(
                functools.partial(of_image, model), batch, batch.mask, 0.05
            )
        )
    )(models, batches)
    for i in range(2):
        wanted = by_loop(*trees.take((models, batches), i), 0.05)
        tiny.close(trees.take(slopes, i), wanted)


@pytest.mark.parametrize("clip", [0.01, 1.0, 30.0])
def test_one_image_moves_a_clipped_sum_by_the_clip_at_most(clip):
    _, model, batch = setting()
    # One with a gradient of any length, and one whose gradient is no number.
    image = batch.image.at[0].multiply(1e4).at[1].set(jnp.nan)
    batch = batch.replace(image=image, mask=jnp.ones(COUNT, bool))
    every = summed(model, batch, clip)
    moved = []
    for i in range(COUNT):
        rest = np.r_[np.delete(np.arange(COUNT), i), i]
        others = trees.take(batch, rest).replace(mask=jnp.arange(COUNT) < COUNT - 1)
        moved.append(distance(every, summed(model, others, clip)))
    assert max(moved) <= clip * (1 + 1e-4)
    assert max(moved) > 0.5 * clip or clip == 30.0
    assert moved[1] < 1e-5 * clip


def test_rows_that_do_not_count_may_be_anything():
    _, model, batch = setting()
    broken = batch.replace(image=batch.image.at[-2:].set(jnp.nan))
    jax.tree.map(
        np.testing.assert_array_equal,
        summed(model, broken, 0.1),
        summed(model, batch, 0.1),
    )


def client(size, noise=0.0, capacity=None, number=0):
    index = np.resize(100 + np.arange(size), capacity or size)
    return Client(
        number=jnp.int32(number),
        index=jnp.asarray(index),
        size=jnp.int32(size),
        label_count=jnp.full(CLASSES, size // CLASSES, jnp.int32),
        noise=jnp.float32(noise),
    )


def mechanism(clip=FREE, rows=((4, 24), (8, 40))):
    return Mechanism(clip, clip, rows)


def test_each_image_is_drawn_by_its_own_chance():
    size, batch_size, steps = 20, 4, 20000
    who = client(size, capacity=30)
    draw = jax.jit(jax.vmap(lambda key: mechanism().batch(who, key, batch_size)))
    position, mask = map(np.asarray, draw(jax.random.split(jax.random.key(1), steps)))
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # images come first
    drawn = np.zeros((steps, 30), int)
    for step in range(steps):
        np.add.at(drawn[step], position[step][mask[step]], 1)
    assert drawn.max() == 1 and not drawn[:, size:].any()
    chance = batch_size / size
    deviation = np.sqrt(chance * (1 - chance) / steps)
    assert abs(drawn[:, :size].mean(0) - chance).max() < 4.5 * deviation
    # Neither images nor steps know of each other: numbers are binomial.
    pairs = np.corrcoef(drawn[:, :size].T) - np.eye(size)
    assert abs(pairs).max() < 5 / np.sqrt(steps)
    lagged = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in drawn[:, :size].T]
    assert max(map(abs, lagged)) < 5 / np.sqrt(steps)
    variance = size * chance * (1 - chance)
    assert drawn.sum(1).var() == pytest.approx(variance, rel=0.06)


def one_batch(size, capacity):
    who, key = client(size, capacity=capacity), jax.random.clone(KEY)
    return mechanism().batch(who, key, 8)


def test_batches_do_not_depend_on_the_padding_and_small_clients_give_all():
    draws = [one_batch(20, n) for n in (20, 33)]
    for mask, (position, _) in zip((draws[0][1],) * 2, draws, strict=True):
        np.testing.assert_array_equal(position[mask], draws[0][0][mask])
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    position, mask = one_batch(7, 33)
    np.testing.assert_array_equal(position[mask], np.arange(7))


def test_private_minibatches_are_those_images():
    data = tiny.dataset([20, 9])
    who = trees.take(data.client, 0).replace(noise=jnp.float32(1.0))
    batch_at = training.client_batches(
        who,
        data.images,
        5,
        2,
        key=KEY,
        batch_size=8,
        augmentation="none",
        mechanism=mechanism(),
    )
    for j in range(2):
        batch = batch_at(j)
        key = prng.at(prng.named(KEY, "poisson"), 5 + j, 0)
        position, mask = mechanism().batch(who, jax.random.clone(key), 8)
        row = who.index[position]
        np.testing.assert_array_equal(batch.label, data.images.label[row])
        np.testing.assert_array_equal(batch.mask, mask)
        assert batch.image.shape == (40, 16, 16, 1)


def test_noise_has_its_deviation_and_is_drawn_once():
    tree = {"a": jnp.zeros((100, 100)), "b": jnp.zeros(10000)}
    found = privacy.noisy(tree, KEY, jnp.float32(3.0))
    for leaf in found.values():
        assert float(jnp.std(leaf)) == pytest.approx(3.0, rel=0.03)
        assert abs(float(jnp.mean(leaf))) < 0.12
    both = np.corrcoef(found["a"].ravel(), found["b"])[0, 1]
    assert abs(both) < 0.05
    same = privacy.noisy(tree, jax.random.clone(KEY), jnp.float32(0.0))
    jax.tree.map(np.testing.assert_array_equal, same, tree)


def test_a_mean_gradient_has_the_noise_of_the_client():
    """Sum and noise are divided by the expected number of images, not by the drawn."""
    images, mask = jnp.ones((24, 3)), jnp.arange(24) < 6

    def mean(noise, size):
        return mechanism(clip=2.0).mean_gradient(
            lambda x: {"w": jnp.broadcast_to(x[0], 40000) / 200},
            images,
            mask,
            client=client(size, noise),
            batch_size=4,
            key=jax.random.clone(KEY),
        )["w"]

    # Each gradient has norm 1.
    np.testing.assert_allclose(mean(0.0, 20), 6 / 4 / 200, rtol=1e-5)
    np.testing.assert_allclose(mean(0.0, 3), 6 / 3 / 200, rtol=1e-5)
    drawn = mean(1.5, 20) - 6 / 4 / 200
    assert float(jnp.std(drawn)) == pytest.approx(1.5 * 2.0 / 4, rel=0.02)


def test_a_step_without_noise_and_clip_is_the_step_of_all_images():
    network, model, batch = setting()
    tx = training.sgd(0.1, 1e-3)
    size = int(batch.mask.sum())

    def penalty(params):
        return trees.total(jax.tree.map(lambda w: jnp.sum(w**2) / 2, params))

    @jax.jit
    def both(model, batch):
        plain = training.sgd_step(
            network,
            tx,
            model,
            tx.init(model.params),
            batch,
            adjust_logits=lambda logits, features: 2 * logits,
            penalty=lambda params, features: penalty(params),
        )
        hidden = training.private_step(
            network,
            tx,
            model,
            tx.init(model.params),
            batch,
            mechanism=mechanism(),
            client=client(size),
            batch_size=8,
            key=KEY,
            adjust_logits=lambda logits, features, image: 2 * logits,
            penalty=penalty,
        )
        return plain[0], hidden[0]

    plain, hidden = both(model, batch)
    tiny.close(hidden, plain)
    assert distance(hidden.params, model.params) > 1e-3


def test_running_statistics_are_refused():
    network = tiny.classifier(CLASSES)
    model = tiny.varied(network, prng.named(KEY, "model"))
    tx = training.sgd(0.1, 0.0)
    with pytest.raises(
        errors.ConfigError, match="model.norm = 'batch': must be 'group'"
    ):
        training.private_step(
            network,
            tx,
            model,
            tx.init(model.params),
            setting()[2],
            mechanism=mechanism(),
            client=client(3),
            batch_size=8,
            key=KEY,
        )


@functools.cache
def gans(translate=0):
    """The same GAN, its discriminator with group-norm, plain and private."""
    plain = gan.Gan(
        generator=dcgan.Generator(16, 1, 2),
        discriminator=dcgan.Discriminator(16, 2, norm="group"),
        classifier=private_classifier(),
        tx=optax.adam(1e-2),
        latent_dim=5,
        translate=translate,
    )
    return plain, plain.private(mechanism(), 8)


def gan_images(count=8):
    """Images of which all but the last two count, and as many generated ones."""
    image, fake = (
        jax.random.uniform(prng.named(KEY, name), (count, 16, 16, 1), minval=-1)
        for name in ("real", "fake")
    )
    return image, jnp.arange(count) < count - 2, fake


def test_a_discriminator_without_noise_and_clip_learns_from_all_images():
    plain, hidden = gans()
    image, mask, fake = gan_images()

    @jax.jit
    def steps(noise):
        network = plain.discriminator.init(prng.named(KEY, "d"), image, train=False)
        model = ModelState(network["params"], {})
        opt_state = plain.tx.init(model.params)
        state = GanState((), model, (), (), opt_state)
        wanted = plain._discriminator_step(state, KEY, image, mask, fake)
        return wanted, hidden._private_discriminator_step(
            state, KEY, image, mask, fake, client(6, noise)
        )

    (_, wanted, _), (_, found) = steps(0.0)
    tiny.close(found, wanted)
    moment = steps(1e-9)[1][1][0].mu
    assert distance(moment, found[0].mu) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("translate", [0, 2])
def test_a_gan_without_noise_and_clip_is_the_gan_of_all_images(translate):
    image, mask, _ = gan_images()
    plain, hidden = gans(translate)
    state = jax.jit(plain.init, static_argnums=1)(prng.named(KEY, "gan"), (16, 16, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def run(model_gan, state):
        return model_gan.step(
            state,
            jax.random.clone(KEY),
            jnp.int32(0),
            image,
            mask,
            client_model=None,
            class_share=None,
            inverts=None,
            statistics=None,
            client=client(6),
        )

    wanted, told = run(plain, state)
    found, kept = run(hidden, state)
    # Adam makes a step of the sign of rounding where a gradient is next to nothing.
    for name in ("discriminator_opt", "generator_opt"):
        tiny.close(getattr(found, name), getattr(wanted, name), rtol=1e-4)
    # The loss on real images is told by no private client.
    assert set(told) - set(kept) == {"discriminator_loss"}


def test_only_the_discriminator_has_group_norm():
    judge = dcgan.Discriminator(16, 2)
    plain = dataclasses.replace(gans()[0], discriminator=judge)
    hidden = plain.private(mechanism(), 8)
    assert hidden.discriminator == gans()[0].discriminator != plain.discriminator
    assert hidden.generator == plain.generator


def test_class_means():
    feature = jax.random.normal(prng.named(KEY, "f"), (10, 6))
    label = jnp.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 0])  # the last two are padding
    who = client(8).replace(label_count=jnp.array([2, 3, 3, 0]))
    free = mechanism().class_means(
        feature, label, client=who, spaces=1, key=jax.random.clone(KEY)
    )
    for k, rows in enumerate((slice(0, 2), slice(2, 5), slice(5, 8))):
        np.testing.assert_allclose(free[k], feature[rows].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(free[3], np.zeros(6))

    def means(feature, size, noise=0.0, spaces=1):
        who_ = who.replace(size=jnp.int32(size), noise=jnp.float32(noise))
        found = mechanism(clip=0.5).class_means(
            feature, label, client=who_, spaces=spaces, key=jax.random.clone(KEY)
        )
        return found * jnp.maximum(who.label_count, 1)[:, None]

    # However long its features are.
    feature = feature.at[7].multiply(1e4)
    moved = float(jnp.linalg.norm(means(feature, 8) - means(feature, 7)))
    assert moved == pytest.approx(0.5, rel=1e-4)
    many = jax.vmap(
        lambda key: mechanism(clip=0.5).class_means(
            feature,
            label,
            client=who.replace(noise=jnp.float32(2.0)),
            spaces=9,
            key=key,
        )
    )(jax.random.split(jax.random.clone(KEY), 4000))
    deviation = np.asarray(jnp.std(many, axis=0)) * np.array([2, 3, 3, 1])[:, None]
    # Nine spaces move by 0.5 each, all together by 1.5.
    np.testing.assert_allclose(deviation, 2.0 * 1.5, rtol=0.06)
