"""What clients of private studies tell, by every algorithm and every stage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import stages
from mosaic_jax.core import errors, prng, schema, trees
from mosaic_jax.fl import algorithms, parallel, privacy
from mosaic_jax.fl.algorithms import FedAvg, FedProx, Moon, Scaffold
from mosaic_jax.fl.privacy import Mechanism
from mosaic_jax.fl.training import Local
from mosaic_jax.run import private
from mosaic_jax.run import study as studies
from mosaic_jax.stages.base import Stage
from tests import tiny

KEY = prng.root(0)
# The batch is larger than any client: each step is on all of its images.
SIZES, BATCH, FREE = [6, 4], 8, 1e9
SGD = Local(steps=2, batch_size=BATCH, learning_rate=0.1, weight_decay=1e-3)
# What a private study of Mosaic needs besides an epsilon.
NEEDED = {
    "model__norm": "group",
    "generators__inversion_weight": 0.0,
    "prototypes__clusters": 1,
}
PRIVATE = NEEDED | {"privacy__epsilon": 8.0}


def says_so(kind):
    return bool(vars(kind).get("per_image", False))


PER_IMAGE = [name for name, kind in algorithms.ALGORITHMS.items() if says_so(kind)]
OTHERS = [name for name in algorithms.ALGORITHMS if name not in PER_IMAGE]


def data(noise=0.0):
    found = tiny.dataset(SIZES)
    noise = jnp.full(len(SIZES), noise, jnp.float32)
    return found.replace(client=found.client.replace(noise=noise))


@functools.cache
def network():
    classifier = tiny.classifier(norm="group")
    return classifier, tiny.varied(classifier, prng.named(KEY, "model"))


def rounds(name, mechanism=None):
    axis = parallel.build(np.array(SIZES), num_devices=1)
    classifier, _ = network()
    algorithm = algorithms.ALGORITHMS[name]()
    return tiny.rounds(axis, algorithm, classifier, local=SGD, mechanism=mechanism)


def after(name, mechanism=None, noise=0.0, count=2):
    """State after some rounds, and the losses of the last."""
    program = rounds(name, mechanism)
    step, state = jax.jit(program.run), program.initial_state(network()[1], KEY)
    for number in range(count):
        state, loss, _ = step(data(noise), KEY, state, number)
    return state, loss


def free(clip=FREE):
    return Mechanism(clip, clip, ((BATCH, 16),))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name not in ("fedprox", "fedrs"))
        )
        for name in PER_IMAGE
    ],
)
def test_rounds_without_noise_and_clip_are_the_plain_ones(name):
    """Also what clients keep; only their losses stay with them."""
    plain, told = after(name)
    hidden, kept = after(name, free())
    tiny.close(hidden, plain)
    assert np.asarray(told).all() and not np.asarray(kept).any()


def test_clients_draw_noise_of_their_own_in_each_step():
    plain, _ = after("fedavg", free(), count=1)
    noise = 0.5 / FREE  # so that noise has deviation 0.5 in the sums
    noisy, _ = after("fedavg", free(), noise, count=1)
    moved = jax.tree.map(
        lambda a, b: np.asarray(a - b).reshape(len(SIZES), -1),
        noisy.client_model.params,
        plain.client_model.params,
    )
    moved = np.concatenate(jax.tree.leaves(moved), axis=1)
    for i, size in enumerate(SIZES):
        # Two steps, each of an independent draw.
        wanted = SGD.learning_rate * np.sqrt(2) * 0.5 / size
        assert moved[i].std() == pytest.approx(wanted, rel=0.3)
    assert abs(np.corrcoef(moved)[0, 1]) < 0.5


@dataclasses.dataclass(frozen=True)
class SeesImages(FedAvg):
    """Says nothing itself, and adds what is told of images to the loss."""

    def penalty(self, params, seen):
        return jnp.mean(seen.batch.image) * trees.total(jax.tree.map(jnp.sum, params))


def test_penalties_see_no_image():
    axis = parallel.build(np.array(SIZES), num_devices=1)
    program = tiny.rounds(axis, SeesImages(), network()[0], local=SGD, mechanism=free())
    state = program.initial_state(network()[1], KEY)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        jax.eval_shape(program.run, data(), KEY, state, jnp.int32(0))


def refused(**changes):
    """The lines that a study of these settings is refused by; never its data."""
    with pytest.raises(errors.ConfigError) as caught:
        studies.build(tiny.study(**{**PRIVATE, **changes}))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", OTHERS)
def test_algorithms_that_do_not_say_so_are_refused(name):
    # Group-norm is refused by others, for their own reasons.
    (line,) = refused(method="federated", init__method=name, model__norm="batch")
    assert line.startswith(f"init.method = '{name}': must be")
    assert "privacy.epsilon = 8.0" in line


def test_nobody_inherits_it():
    assert says_so(FedProx) and not says_so(SeesImages)
    name = f"{__name__}:SeesImages"
    assert refused(method="federated", init__method=name)[0].startswith("init.method")
    assert not says_so(Moon)


def test_scaffold_is_private_by_its_second_option_alone():
    assert Scaffold().per_image and not Scaffold(option="I").per_image
    (line,) = refused(
        method="federated",
        init__method="scaffold",
        methods={"scaffold": {"option": "I"}},
    )
    assert "init.method = 'scaffold'" in line


WRONG = [
    ({"model__norm": "batch"}, "model.norm = 'batch': must be 'group'"),
    ({"generators__patience": 3}, "generators.patience = 3: must be 0"),
    ({"prototypes__clusters": 3}, "prototypes.clusters = 3: must be 1"),
    (
        {
            "prototypes__gathered": "every_round",
            "prototypes__space": "global",
            "warmup__rounds": 2,
        },
        "prototypes.gathered = 'every_round': must be 'once'",
    ),
    ({"finetune__anchor": "distilled"}, "finetune.anchor = 'distilled': must be"),
    (
        {"method": "federated", "server__method": "dense"},
        "server.when = 'every_round': must be 'once'",
    ),
    ({"privacy__delta": 0.1}, "privacy.delta = 0.1: must be < 1 /"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG)
def test_what_is_not_accounted_for_is_refused(changes, expected):
    (line,) = refused(**changes)
    assert line.startswith(expected)
    # Without an epsilon nothing is wrong with it.
    if "privacy__delta" not in changes:
        fine = {**NEEDED, **changes}
        studies.build(tiny.study(**fine))


@dataclasses.dataclass(frozen=True)
class Silent(Stage):
    """Does not say what it tells."""

    name = "silent"
    after = "init"

    def run(self, context):
        yield from ()


@dataclasses.dataclass(frozen=True)
class FromLibrary(stages.Reference):
    """What its base says need not hold for it."""

    name = "derived"
    after = "init"


@pytest.mark.parametrize("kind", [Silent, FromLibrary])
def test_own_stages_say_what_they_tell(kind):
    path = f"{__name__}:{kind.__name__}"
    (line,) = refused(method="federated", stages=(path,))
    assert line.startswith(f"stage '{kind.name}': must say by `releases`")


@functools.cache
def mosaic():
    return studies.build(tiny.study(**PRIVATE, compat__fresh_classifier=True))


def test_every_stage_says_what_it_tells():
    study, sizes = mosaic().settings, np.array([100, 20])
    found = {
        link.stage.name: link.stage.releases(study, sizes) for link in mosaic().chain
    }
    told = {
        name: [(one.payload, one.count.tolist(), one.batch_size) for one in releases]
        for name, releases in found.items()
    }
    local, each = study.local, study.generators
    steps = study.init.rounds * local.steps
    epochs = study.compat.classifier_epochs
    fresh = [epochs * -(-size // local.batch_size) for size in (100, 20)]
    assert told == {
        "init": [
            ("models", [steps] * 2, local.batch_size),
            ("label_counts", [1, 1], None),
        ],
        "generators": [
            ("generators", [each.steps] * 2, each.batch_size),
            ("generators", fresh, local.batch_size),
        ],
        "experts": [
            ("specialised_models", [study.experts.local_steps] * 2, local.batch_size)
        ],
        "prototypes": [("prototypes", [1, 1], None)],
        "finetune": [
            ("models", [study.finetune.rounds * local.steps] * 2, local.batch_size)
        ],
        "meta": [],
        "distill": [],
    }


def test_label_counts_are_told_with_noise_and_only_where_they_are_read():
    study = mosaic()
    client, true = study.data.clients.client, study.data.label_count
    away = client.label_count - true
    assert (client.label_count >= 0).all() and client.label_count.any(1).all()
    noise = np.array(study.privacy.noise)
    # Counts that the noise does not make negative.
    safe = true > 3 * noise[:, None]
    assert away[safe].any() and abs(away[safe]).max() < 5 * noise.max()
    np.testing.assert_allclose(client.noise, noise, rtol=1e-6)
    # Nothing of the kind is added twice, nor where nobody reads them.
    again = private.hidden(study.data, study.privacy, study.settings.seed)
    np.testing.assert_array_equal(again.clients.client.label_count, client.label_count)
    silent = dataclasses.replace(study.privacy, by_payload={})
    none = private.hidden(study.data, silent, 0).clients.client.label_count
    assert not none.any()


def test_the_noise_is_part_of_every_fingerprint_of_private_studies_alone():
    study = mosaic()
    noisier = dataclasses.replace(study.privacy, noise=(9.0,) * 3)
    other = dataclasses.replace(study, privacy=noisier)
    assert all(a[1] != b[1] for a, b in zip(study.plan(), other.plan(), strict=True))
    plain, clipped = (
        studies.build(tiny.study(**NEEDED, **fields)).plan()
        for fields in ({}, {"privacy__clip": 3.0, "privacy__delta": 1e-6})
    )
    assert [one[1] for one in plain] == [one[1] for one in clipped]


def test_defaults_are_not_private():
    assert schema.defaults(privacy.Privacy)["epsilon"] == 0
    assert studies.build(tiny.study()).privacy is None
