"""Attacks: what memorises is found, what knows nothing is not, claims are held."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax.core import errors, trees
from mosaic_jax.core.types import ClientModels, Generators, ModelState, Prototypes
from mosaic_jax.fl import gan as gan_module
from mosaic_jax.fl import membership
from mosaic_jax.run import runner, settings
from mosaic_jax.stages import (
    attacker,
    candidates,
    generators,
    leakage_section,
    shadows,
)
from mosaic_jax.stages.candidates import Candidates, Scores
from mosaic_jax.stages.leakage import Leakage
from tests import running, tiny

FIELDS = {
    "method": "federated",
    "model__name": "mlp",
    "leakage__images": 64,
    "leakage__canaries": 32,
    "data__validation": 0.4,
    "data__alpha": 100.0,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return runner.Experiment(tiny.study(**FIELDS), tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def context(study):
    return study.placement.context(running.link_of(study, "leakage"))


@pytest.fixture(scope="module")
def asked(context):
    images = candidates.every_image(context)
    return images, [candidates.of_client(context, images, i, 64) for i in range(3)]


def test_classes_give_nobody_away(context, asked):
    images, found = asked
    for number, one in enumerate(found):
        member, other = (
            np.bincount(one.label[~one.canary & (one.inside == inside)], minlength=10)
            for inside in (True, False)
        )
        np.testing.assert_array_equal(member, other)
        assert 0 < member.sum() <= 64
        np.testing.assert_array_equal(one.label, np.asarray(images.label)[one.row])
        part = context.data.parts[number]
        # Whoever is said to be inside is, and the rest is all else but canaries.
        np.testing.assert_array_equal(one.inside, np.isin(one.row, part))
        own = part[part < len(context.data.clients.images.label) - 96]
        asked_of = one.row[one.inside & ~one.canary]
        assert sorted([*one.rest, *asked_of]) == sorted(own)
        np.testing.assert_array_equal(
            one.inside[one.canary], context.data.canaries.inside[number]
        )


def test_others_look_like_the_clients_own_where_these_are_shifted(tmp_path):
    work = runner.Experiment(
        tiny.study(**FIELDS, data__shift="rotate", leakage__shadows=0), tmp_path
    )
    context = work.placement.context(running.link_of(work, "leakage"))
    images = candidates.every_image(context)
    one = candidates.of_client(context, images, 1, 64)
    others = one.row[~one.inside & ~one.canary] - len(context.data.clients.images.label)
    assert len(others) and np.isin(others, context.data.test_index[1]).all()


def a_client(np_rng, number=0, count=200, coins=64):
    inside = np.concatenate([np.arange(2 * count) < count, np_rng.rand(coins) < 0.5])
    return Candidates(
        client=number,
        row=np.arange(2 * count + coins),
        label=np.zeros(2 * count + coins, np.int32),
        inside=inside,
        canary=np.arange(len(inside)) >= 2 * count,
        rest=np.zeros(0, int),
    )


def test_a_memorising_model_is_found_and_a_constant_one_is_not():
    np_rng = np.random.RandomState(0)
    clients = [a_client(np_rng, number) for number in range(2)]
    sure = [Scores("models", "loss", one, one.inside + 0.0) for one in clients]
    blind = [Scores("models", "LiRA", one, np.zeros(len(one.row))) for one in clients]
    rows = candidates.judged([*sure, *blind], (), 1e-5)
    assert [row["client"] for row in rows] == [None, 0, 1, None, 0, 1]
    found, nothing = rows[0], rows[3]
    assert found["auc"]["value"] == 1 and found["tpr_at_fpr"]["1%"]["value"] == 1
    assert found["tpr_at_fpr"]["0.1%"] is None  # 400 others tell of no such rate
    assert found["members"] == found["others"] == 400 and found["canaries"] == 128
    # Not all guesses can be right, as not just half of the coins are heads.
    assert found["epsilon_lower"] > 0.7 * found["epsilon_reach"] > 2
    assert nothing["auc"]["value"] == 0.5
    assert nothing["tpr_at_fpr"]["1%"]["value"] == 0
    assert nothing["epsilon_lower"] == 0
    assert nothing["epsilon_reach"] == found["epsilon_reach"]
    assert all(row["epsilon_claimed"] is None for row in rows)


def test_a_claim_that_does_not_hold_is_told():
    np_rng = np.random.RandomState(0)
    clients = [a_client(np_rng, number) for number in range(2)]
    sure = [Scores("models", "loss", one, one.inside + 0.0) for one in clients]
    rows = candidates.judged(sure, (1.0, 0.5), 1e-5)
    assert [row["epsilon_claimed"] for row in rows] == [1.0, 1.0, 0.5]
    lines = list(leakage_section.broken(rows))
    assert len(lines) == 3 and "all clients: models by loss" in lines[0]
    assert "but 1 is claimed: the study is less private than it says" in lines[0]
    told = [
        block.text
        for block in leakage_section.section(rows, []).blocks[:5]
        if hasattr(block, "text")
    ]
    assert any(text.startswith("Warning: all clients") for text in told)
    assert not list(leakage_section.broken(candidates.judged(sure, (99.0, 99.0), 0.0)))


def test_all_bounds_of_a_study_hold_at_once():
    """Of many clients whose scores tell nothing, hardly ever is one warned of."""
    np_rng = np.random.RandomState(0)
    alone = together = 0
    for _ in range(20):
        clients = [a_client(np_rng, number, 4) for number in range(20)]
        scores = [
            Scores("models", "loss", one, np_rng.randn(len(one.inside)))
            for one in clients
        ]
        rows = candidates.judged(scores, (0.0,) * 20, 0.0)
        alone += any(row["epsilon_lower"] > 0 for row in rows)
        together += bool(list(leakage_section.broken(rows)))
        assert all(r["epsilon_lower_together"] <= r["epsilon_lower"] for r in rows)
    assert together <= 2 < alone


def overfitted(network, image, label):
    """A model that knows its images by heart."""

    @jax.jit
    def train(image, label):
        model = network.init(jax.random.key(0), image.shape[1:])

        def loss(params):
            logits = network.logits(model.replace(params=params), image)
            return -jnp.mean(membership.confidence(logits, label))

        def body(_, params):
            slope = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.05 * jnp.sign(g), params, slope)

        return model.replace(params=jax.lax.fori_loop(0, 60, body, model.params))

    return train(jnp.asarray(image, jnp.float32) / 127.5 - 1, jnp.asarray(label))


def planted(work, **artifacts):
    return running.drive(work.start(running.link_of(work, "leakage"), artifacts))


def test_what_is_overfitted_is_found_by_the_loss(context, asked, tmp_path, caplog):
    """Of labels at random: nothing else tells them. Shadows are not needed for it."""
    work = runner.Experiment(tiny.study(**FIELDS, leakage__shadows=0), tmp_path)
    images, found = asked
    network, models = context.classifier, []
    for one in found:
        # Canaries alone, so that each can be told from those left out.
        rows = one.row[one.canary & one.inside]
        models.append(
            overfitted(
                network,
                np.asarray(images.image)[np.resize(rows, 24)],
                np.asarray(images.label)[np.resize(rows, 24)],
            )
        )
    sent = ClientModels(trees.stack(models), np.zeros(3, np.int32))
    with caplog.at_level(logging.WARNING):
        outcome = planted(work, global_model=models[0], client_models=sent)
    row = outcome.results["leakage"][0]
    assert row["canaries"] == 96 and row["attack"] == "loss"
    assert row["epsilon_lower"] > 0.25 * row["epsilon_reach"] > 0
    assert "claimed" not in caplog.text
    assert outcome.section.title == "Attacks"


class Bank:
    """A "generator" that draws from a bank of images, its parameters."""

    latent_dim = 1

    def sample(self, generator, z):
        return generator.params["bank"][: len(z)]


@pytest.fixture
def banks(context, monkeypatch):
    """An attacker of two clients that send banks of all of their images, and these."""
    monkeypatch.setattr(gan_module, "build", lambda *_: Bank())
    images = candidates.every_image(context)
    asked = [candidates.of_client(context, images, i, 64) for i in range(2)]
    places = list(enumerate(asked))
    length = max(len(one.row) for one in asked)
    config = Leakage(generated=512)
    attack = attacker.Attacker(config, context, images, places, length, "")

    def of(held):
        rows = [np.asarray(images.image)[np.resize(rows, 512)] for rows in held]
        bank = jnp.asarray(np.stack(rows), jnp.float32) / 127.5 - 1
        return ModelState({"bank": bank}, {})

    return attack, of, of(context.data.parts[:2])


def test_a_generator_that_copies_is_found(banks):
    attack, _, bank = banks
    scores = attack.on_generators(Generators(bank, np.array([True, False])), ())
    assert [one.of.client for one in scores] == [0]  # the other one collapsed
    row = candidates.judged(scores, (), 1e-5)[0]
    assert row["auc"]["value"] > 0.97
    assert row["epsilon_lower"] > 0.4 * row["epsilon_reach"] > 0


def test_copies_are_told_from_what_shadows_draw_without_them(banks):
    attack, of, bank = banks
    shades = []
    for i, (_, one) in enumerate(attack.places):
        half = membership.halves(np.random.RandomState(i), 4, len(one.row))
        held = [np.concatenate([one.rest, one.row[own]]) for own in half]
        shades.append(shadows.Shade(half, of(held)))
    sent = Generators(bank, np.ones(2, bool))
    scores = attack.on_generators(sent, shades)
    assert [one.attack for one in scores] == ["nearest image", "LiRA"] * 2
    for (_, one), found in zip(attack.places, scores[1::2], strict=True):
        own, other = found.score[one.inside], found.score[~one.inside]
        assert own.min() > 0 > np.median(other)
        # All but test images that look very much like one of the client's.
        assert np.mean(other < 0) > 0.9
    wrong = [dataclasses.replace(one, inside=~one.inside) for one in shades]
    turned = attack.on_generators(sent, wrong)
    assert (turned[1].score[attack.places[0][1].inside] < 0).all()


def test_prototypes_of_one_image_are_found(context, asked):
    """A client whose prototypes are the logits of its very images."""
    images, found = asked
    one, network = found[0], context.classifier
    init = jax.jit(network.init, static_argnums=1)
    shape = context.data.info.image_shape
    models = trees.stack([init(jax.random.key(i), shape) for i in range(10)])
    rows = one.row[one.inside]

    @jax.jit
    def logits(models, image):
        signed = jnp.asarray(image, jnp.float32) / 127.5 - 1
        return jax.vmap(lambda model: network.logits(model, signed))(models)

    sent = Prototypes(
        logits=np.moveaxis(np.asarray(logits(models, images.image[rows])), 0, 1),
        gate_logits=np.zeros((len(rows), 10), np.float32),
        label=np.asarray(images.label)[rows],
        client=np.zeros(len(rows), np.int32),
    )
    shown = types.SimpleNamespace(
        evaluation=context.settings.evaluation,
        prototypes=types.SimpleNamespace(space="expert"),
    )
    attack = attacker.Attacker(
        Leakage(),
        dataclasses.replace(context, settings=shown),
        images,
        [(0, one)],
        len(one.row),
        "",
    )
    scores = attack.on_prototypes(sent, {"mlp": models}, None, None)
    (row, _) = candidates.judged(scores, (), 1e-5)
    assert row["auc"]["value"] > 0.99
    assert row["epsilon_lower"] > 0.4 * row["epsilon_reach"] > 0


def test_shadows_train_as_they_would_alone(context, asked):
    """Batched on the axis of clients, and each by itself on its own images."""
    images, found = asked
    init = jax.jit(context.classifier.init, static_argnums=1)
    start = init(jax.random.key(0), context.data.info.image_shape)

    def trained(at_once, clients):
        axis = dataclasses.replace(context.axis, at_once=at_once)
        shown = dataclasses.replace(context, axis=axis)
        them = shadows.of_clients(shown, images, clients, 2, "")
        return them.each(running.drive(them.models(start)))

    together, apart = trained(6, found), trained(1, found)
    tiny.close([one.model for one in together], [one.model for one in apart])
    (alone,) = trained(1, found[1:2])
    tiny.close(together[1].model, alone.model)
    for one, shade in zip(found, together, strict=True):
        assert shade.inside.shape == (2, len(one.row))
        assert (shade.inside[0] ^ shade.inside[1]).all()
    # They were trained on other images, and so are other models.
    leaves = jax.tree.leaves(trees.concatenate([one.model.params for one in together]))
    assert all(len(np.unique(np.asarray(x), axis=0)) == 6 for x in leaves)


def test_shadows_of_generators_train_as_clients_do(tmp_path):
    """A shadow that holds what a client holds, with its model, sends its generator."""
    fields = {"model__name": "mlp", "leakage__images": 8, "data__validation": 0.4}
    fields |= {"leakage__shadow_generators": True}
    fields |= {"generators__inversion_weight": 0.0, "generators__steps": 3}
    work = runner.Experiment(tiny.study(**fields), tmp_path)
    context = work.placement.context(running.link_of(work, "leakage"))
    clients, images = context.data.clients, candidates.every_image(context)
    nobody = np.zeros(0, int)
    asked = [
        Candidates(i, nobody, nobody, nobody, nobody, context.data.parts[i])
        for i in range(3)
    ]
    them = shadows.of_clients(context, images, asked, 2, "")
    numbers = np.asarray(them.context.data.clients.client.number)
    assert numbers.tolist() == [0, 1, 2, 3, 4, 5]  # of which streams are named
    init = jax.jit(context.classifier.init, static_argnums=1)
    model = init(jax.random.key(0), context.data.info.image_shape)
    several = trees.broadcast(model, 6)
    drawn = running.drive(them.generators(several, model))
    # The last shadow of the last client, as a client with its number.
    client = jax.tree.map(lambda x: x[2:], clients.client)
    data = clients.replace(client=client.replace(number=numbers[5:]), images=images)
    alone = context.axis.of(1)
    shown = dataclasses.replace(
        context,
        data=dataclasses.replace(context.data, clients=data),
        clients=alone.place(data, whole=True),
        axis=alone,
    )
    state = running.drive(
        generators.train(shown, "gan", trees.take(several, slice(1)), model)
    )
    sent = generators.uploaded(state, context.settings.generators)
    tiny.close(trees.take(drawn, slice(5, 6)), sent)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"leakage__canaries": 4},
            "leakage.canaries = 4: must be 0 for leakage.images = 0",
        ),
        (
            {"leakage__images": 4, "leakage__shadows": 3},
            "leakage.shadows = 3: must be 0, or even and >= 4",
        ),
        (
            {"leakage__images": 4, "leakage__shadows": 2},
            "leakage.shadows = 2: must be 0, or even and >= 4",
        ),
        (
            {"leakage__images": 4, "init__method": "fedproto"},
            "leakage.images = 4: must be 0 for init.method = 'fedproto'",
        ),
        (
            {"leakage__images": 4, "init__method": "fedper"},
            "leakage.images = 4: must be 0 for init.method = 'fedper'",
        ),
        (
            {"leakage__images": 4, "leakage__shadow_generators": True},
            "leakage.shadow_generators = True: must be False for method = 'federated'",
        ),
        (
            {"leakage__images": 4, "init__method": "heterofl"},
            "leakage.shadows = 8: must be 0 for init.method = 'heterofl'",
        ),
    ],
)
def test_what_cannot_be_attacked_is_refused(changes, told):
    mapping = tiny.config(method="federated", **changes).to_dict()
    with pytest.raises(errors.ConfigError) as caught:
        settings.from_mapping(mapping)
    assert str(caught.value).startswith(told)
