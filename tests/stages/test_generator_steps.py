"""Collapse of generators, and how many steps each client trains its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, prng
from mosaic_jax.fl import gan
from mosaic_jax.nn import dcgan
from mosaic_jax.run import runner, study
from mosaic_jax.stages import generators, local
from tests import running, tiny
from tests.tiny import KEY

SIZE = np.array([64, 65, 3])


def test_constant_output_is_found_collapsed():
    model_gan = gan.Gan(
        generator=dcgan.Generator(16, 1, 2),
        discriminator=dcgan.Discriminator(16, 2),
        classifier=tiny.classifier(),
        tx=optax.sgd(1.0),
        latent_dim=5,
        ema_decay=0.5,
    )
    init = jax.jit(model_gan.init, static_argnums=1)
    generator = init(prng.named(KEY, "model_gan"), (16, 16, 1)).generator
    z = jax.random.normal(prng.named(KEY, "z"), (64, model_gan.latent_dim))
    spread = jax.jit(lambda g: model_gan.deviation(g, z))
    constant = jax.tree.map(jnp.zeros_like, generator)
    assert spread(constant) == 0
    assert spread(generator) > 0


def test_class_shares():
    count = jnp.array([[30, 10, 0, 0]])
    share = generators.class_targets(count, "labels")[0]
    np.testing.assert_allclose(share, [0.75, 0.25, 0, 0], atol=2e-3)
    assert share.min() > 0
    np.testing.assert_allclose(generators.class_targets(count, "uniform"), 0.25)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epochs": 2}, [2, 4, 2]),
        ({"epochs": 2, "min_steps": 3}, [3, 4, 3]),
        ({"epochs": 2, "max_steps": 3}, [2, 3, 2]),
        ({"epochs": 2, "min_steps": 3, "max_steps": 3}, [3, 3, 3]),
        # The bounds are on what epochs come to.
        ({"steps": 7, "min_steps": 9}, [7, 7, 7]),
    ],
)
def test_steps_of_unequal_clients(fields, expected):
    whole = {"epochs": 0, "steps": 0, "min_steps": 0, "max_steps": 0, "batch_size": 64}
    changes = {f"generators__{name}": value for name, value in (whole | fields).items()}
    steps = generators.num_steps(tiny.study(**changes).generators, SIZE)
    assert steps.tolist() == expected


def test_the_bound_is_what_a_study_runs_and_promises():
    def built(min_steps):
        fields = {"epochs": 1, "steps": 0, "min_steps": min_steps}
        changes = {f"generators__{name}": value for name, value in fields.items()}
        return study.build(tiny.study(**changes))

    few, many = built(0), built(1000)
    sizes = few.data.clients.client.size
    free = generators.num_steps(few.settings.generators, sizes).sum()
    assert free < 1000
    ratio = many.flops["generators"] / few.flops["generators"]
    assert ratio == pytest.approx(1000 * len(sizes) / free)


@pytest.mark.parametrize(
    ("augment", "of_data", "expected"),
    [
        (False, "crop_flip", "none"),
        (True, "crop_flip", "crop_flip"),
        (True, "none", "none"),
    ],
)
def test_real_images_are_augmented_as_a_classifiers(
    augment, of_data, expected, tmp_path, monkeypatch
):
    told = []

    def spied(context, name, step, state, *args, augmentation, **_):
        told.append((name, augmentation))
        yield from ()
        return state

    monkeypatch.setattr(local, "run_steps", spied)
    study = tiny.study(
        data__augmentation=of_data,
        generators__augment=augment,
        compat__fresh_classifier=True,
    )
    work = runner.Experiment(study, tmp_path)
    running.drive(work.start(running.link_of(work, "generators"), {}))
    # The fresh classifier's images are augmented in any case.
    assert told == [("classifier", of_data), ("gan", expected)]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"entropy_weight": 0.0}, "entropy_weight = 0.0: must be > 0 for"),
        ({"translate": 2}, "translate = 2: must be 0 for"),
        ({"augment": True}, "augment = True: must be False for"),
    ],
)
def test_what_a_classifier_cannot_judge_by_is_told(fields, told):
    good = {"discriminator": "classifier", "entropy_weight": 1.0}
    changes = {f"generators__{name}": v for name, v in (good | fields).items()}
    with pytest.raises(errors.ConfigError) as caught:
        tiny.study(**changes)
    line = str(caught.value)
    assert line.startswith(f"generators.{told} generators.discriminator = 'classifier'")
    assert "\n" not in line
