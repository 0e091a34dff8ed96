"""Whole clients that are private: the noise, the clip, and what the server sees."""

import dataclasses

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import stats

from mosaic_jax.core import errors, prng, trees
from mosaic_jax.fl import accounting, algorithms, parallel
from mosaic_jax.fl.accounting import Release
from mosaic_jax.fl.client_privacy import ClientMechanism
from mosaic_jax.fl.privacy import Privacy
from mosaic_jax.fl.sending import Sending
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.mlp import MLP
from mosaic_jax.run import settings, study
from mosaic_jax.run.runner import Experiment
from mosaic_jax.stages.base import Stage
from mosaic_jax.stages.host_rounds import HostRounds
from tests import tiny

DELTA = 1e-5
NETWORK = Classifier(MLP(num_classes=4, width=4), (0.4,), (0.3,))
DATA = tiny.dataset([20, 20, 20])


def planned(epsilon=4.0, participants=20, rounds=30, **fields):
    config = Privacy(epsilon=epsilon, unit="client", delta=DELTA, **fields)
    return accounting.plan_of_clients(
        config, num_clients=20, participants=participants, rounds=rounds
    )


@pytest.mark.parametrize(("epsilon", "rounds"), [(1.0, 10), (4.0, 30), (8.0, 200)])
def test_all_clients_in_every_round_is_one_gaussian(epsilon, rounds):
    """T rounds are one mechanism with sqrt(T) less noise (Balle and Wang, 2018)."""
    found = planned(epsilon, rounds=rounds)
    s = found.of_clients.noise / np.sqrt(rounds)
    low, high = (stats.norm.cdf(sign / (2 * s) - epsilon * s) for sign in (1, -1))
    delta = low - np.exp(epsilon) * high
    assert 0.9 * DELTA < delta <= DELTA
    assert 0.99 * epsilon < found.epsilon[0] <= epsilon
    assert len(set(found.noise)) == 1 and found.by_payload == {"models": found.epsilon}
    # Who adds it to each update hides any two of them, which are twice as far apart.
    local = planned(epsilon, rounds=rounds, noised_by="client", participants=5)
    assert local.of_clients.noise == pytest.approx(2 * found.of_clients.noise)


@pytest.mark.slow
def test_some_clients_in_every_round_need_less():
    """By the accountant's own sampling without replacement, of clients replaced."""
    found = planned(participants=5)
    accountant = rdp.RdpAccountant(
        range(2, 200), dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    gaussian = dp_accounting.GaussianDpEvent(found.of_clients.noise / 2)
    drawn = dp_accounting.SampledWithoutReplacementDpEvent(20, 5, gaussian)
    accountant.compose(dp_accounting.SelfComposedDpEvent(drawn, 30))
    assert accountant.get_epsilon(DELTA) == pytest.approx(4.0, rel=0.01)
    assert found.of_clients.noise < 2 * planned().of_clients.noise
    # Of 19 of 20 the draw hides next to nothing, and its bound takes more than that.
    most = planned(participants=19)
    assert most.of_clients.noise == pytest.approx(2 * planned().of_clients.noise)
    assert most.epsilon[0] <= 4.0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"delta": 0.06},
            r"privacy.delta = 0.06: must be < 1 / 20, one in the clients",
        ),
        (
            {"clip_quantile": 0.5},
            r"privacy.clip_quantile = 0.5: must be 0 for 20 clients in a round",
        ),
    ],
)
def test_what_no_noise_can_do(fields, told):
    fields = {"delta": DELTA} | fields
    config = Privacy(epsilon=1.0, unit="client", **fields)
    with pytest.raises(errors.ConfigError, match=told):
        accounting.plan_of_clients(config, num_clients=20, participants=20, rounds=30)


def test_an_update_is_cut_to_the_clip():
    one = ClientMechanism(clip=2.0, noise=1.0, quantile=0.5, count_noise=9.0)
    sent = jax.jit(one.sent)
    for update, norm, short in (
        ((jnp.array([3.0]), jnp.array([[4.0]])), 2.0, -0.5),
        ((jnp.array([0.3]), jnp.array([[0.4]])), 0.5, 0.5),
        ((jnp.array([jnp.inf]), jnp.array([[4.0]])), 0.0, -0.5),
        ((jnp.array([jnp.nan]), jnp.array([[4.0]])), 0.0, -0.5),
    ):
        cut, told = sent(update, 2.0, prng.root(0))
        total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in cut))
        np.testing.assert_allclose([total, told], [norm, short], rtol=1e-6)
    # Where the clip stays, nothing else tells of the norm.
    silent = dataclasses.replace(one, quantile=0.0)
    assert silent.sent((jnp.array([9.0]),), 2.0, prng.root(0))[1] == 0


def test_the_noise_of_server_and_clients():
    """Its deviation, over the clip; on the mean of 4 updates, or on each."""
    wide = {"w": jnp.zeros(40_000)}
    one = ClientMechanism(clip=2.0, noise=3.0)
    read, clip = jax.jit(one.read)((wide, 0.0), wide, 2.0, 4.0, prng.root(0))
    assert (
        float(read["w"].std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.02) and clip == 2
    )
    local = dataclasses.replace(one, local=True)
    (update,), _ = jax.jit(local.sent)((wide["w"],), 2.0, prng.root(0))
    assert float(update.std()) == pytest.approx(3.0 * 2.0, rel=0.02)
    read, _ = local.read((wide, 0.0), wide, 2.0, 4.0, prng.root(0))
    assert read is wide
    # What both releases of a round tell together is what one with `noise` tells.
    both = dataclasses.replace(one, quantile=0.5, count_noise=2.0)
    shares = both.update_noise**-2 + (2 * both.count_noise) ** -2
    assert shares == pytest.approx(3.0**-2)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_follows_the_quantile(quantile):
    """Norms 1 to 100: it ends near the quantile, from far below and far above."""
    norm = jnp.arange(1.0, 101.0)
    one = ClientMechanism(
        clip=1.0, noise=1.0, quantile=quantile, rate=0.2, count_noise=5.0
    )

    def step(clip, key):
        short = jnp.where(norm <= clip, 0.5, -0.5).mean()
        _, clip = one.read(({}, short), {}, clip, 100.0, key)
        return clip, clip

    for first in (0.1, 1e4):
        _, clips = jax.lax.scan(
            step, jnp.float32(first), jax.random.split(prng.root(0), 300)
        )
        assert np.median(clips[-100:]) == pytest.approx(100 * quantile, rel=0.15)


def rounds(mechanism, data=DATA, algorithm=None, **fields):
    return tiny.run_rounds(
        algorithm or algorithms.FedAvg(),
        1,
        data=data,
        network=NETWORK,
        sending=Sending(num_clients=3, private=mechanism),
        **fields,
    )


def test_without_clip_and_noise_it_is_the_plain_mean():
    """Of clients with as many images each."""
    plain, _ = rounds(None)
    found, _ = rounds(ClientMechanism(clip=1e6, noise=0.0))
    tiny.close(found.model, plain.model)


def test_a_client_moves_the_model_by_its_share_of_the_clip_at_most():
    """All its images are others; without noise, of three clients."""
    clip = 1e-3
    mechanism = ClientMechanism(clip=clip, noise=0.0)
    first, _ = rounds(mechanism)
    image = DATA.images.image.at[DATA.client.index[1]].set(255)
    other, _ = rounds(mechanism, DATA.replace(images=DATA.images.replace(image=image)))
    moved = jax.tree.map(jnp.subtract, first.model.params, other.model.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(moved)))
    assert 0.1 * clip / 3 < norm <= 2 * clip / 3 * 1.001
    # Clients with more images count no more than others.
    unequal, _ = rounds(mechanism, tiny.dataset([40, 20, 1]))
    start = NETWORK.init(prng.named(prng.root(0), "model"), (16, 16, 1))
    step = jax.tree.map(jnp.subtract, unequal.model.params, start.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(step)))
    assert norm <= clip * 1.001


@dataclasses.dataclass(frozen=True)
class Watching(algorithms.FedAvg):
    """FedAvg whose server says what it was given."""

    def aggregate(self, server_state, model, mean_upload, share):
        assert jax.tree.map(jnp.shape, mean_upload) == jax.tree.map(jnp.shape, model)
        return super().aggregate(server_state, model, mean_upload, share)


def test_the_server_sees_sums_alone():
    """What is outside of the clients' batch has no axis of clients."""
    mechanism = ClientMechanism(clip=1.0, noise=0.5)
    rounds(mechanism, algorithm=Watching())
    axis = parallel.build(np.asarray(DATA.client.size), num_devices=1)
    program = tiny.rounds(
        axis, network=NETWORK, sending=Sending(private=mechanism), keep_models=False
    )
    assert not program.sending.needs_each
    model = jax.eval_shape(lambda: NETWORK.init(prng.root(0), (16, 16, 1)))
    _, _, teachers, upload = jax.eval_shape(
        lambda state, client: program.clients(
            axis,
            DATA,
            prng.root(0),
            program.sent(state),
            client,
            ((), ()),
            0,
            jnp.float32(3),
        ),
        jax.eval_shape(program.initial_state, model, prng.root(0)),
        DATA.client,
    )
    assert teachers == () and trees.num_bytes(upload) == trees.num_bytes(model) + 4


def test_clients_in_host_memory_draw_the_same_noise():
    """Group by group, of clients that keep their states there."""
    mechanism = ClientMechanism(
        clip=0.1, noise=0.5, quantile=0.5, rate=0.2, count_noise=1.0
    )
    on_device, _ = rounds(mechanism)
    axis = parallel.build(np.asarray(DATA.client.size), num_devices=1, at_once=2)
    program = tiny.rounds(
        axis, network=NETWORK, sending=Sending(private=mechanism), keep_models=False
    )
    model = NETWORK.init(prng.named(prng.root(0), "model"), (16, 16, 1))
    state = program.initial_state(model, prng.root(0))
    data = axis.place(DATA, whole=True)
    found, _, _ = HostRounds(program).run(data, prng.root(0), state, 0)
    tiny.close(found.model, on_device.model)
    tiny.close(found.clip, on_device.clip)
    assert found.clip != 0.1


def test_the_clip_goes_on_from_stage_to_stage(tmp_path):
    """It is part of what the rounds of one stage hand on to those of the next."""
    fields = {
        "method": "federated",
        "model__name": "mlp",
        "data__num_clients": 60,
        "data__split": "iid",
        "init__rounds": 2,
        "warmup__rounds": 1,
        "privacy__epsilon": 50.0,
        "privacy__unit": "client",
        "privacy__clip_quantile": 0.9,
    }
    work = Experiment(tiny.study(**fields), tmp_path)
    work.run()
    clips = [
        float(one.artifacts(work.study.template(link))["round_state"]["clip"])
        for (link, _), one in zip(work.plan(), work.finished(), strict=True)
    ]
    assert len(set(clips)) == len(clips) == 2 and 1.0 not in clips
    # Three rounds move it by no more than three steps, all the same way.
    assert np.log(clips[1]) == pytest.approx(1.5 * np.log(clips[0]), rel=0.2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"method": "mosaic"},
            "method = 'mosaic': must be 'federated' for privacy.unit",
        ),
        (
            {"server__method": "dense"},
            "server.method = 'dense': must be 'none' for pri",
        ),
        (
            {"aggregation__rule": "median"},
            "aggregation.rule = 'median': must be 'mean'",
        ),
        (
            {"compression__name": "sign"},
            "compression.name = 'sign': must be 'none' for",
        ),
        (
            {"attack__name": "sign_flip"},
            "attack.name = 'sign_flip': must be 'none' for",
        ),
        ({"init__method": "fedrolex"}, "privacy.unit = 'client': must be 'image' for"),
        (
            {"privacy__unit": "image", "privacy__clip_quantile": 0.5},
            "privacy.clip_quantile = 0.5: must be 0 for privacy.unit = 'image'",
        ),
        (
            {"privacy__noised_by": "client", "privacy__clip_quantile": 0.5},
            "privacy.clip_quantile = 0.5: must be 0 for privacy.noised_by = 'client'",
        ),
    ],
)
def test_what_settings_refuse(changes, told):
    fields = {"method": "federated", "privacy__epsilon": 8.0, "privacy__unit": "client"}
    with pytest.raises(errors.ConfigError, match=told):
        tiny.study(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model__name": "resnet18"},
            "model.norm = 'batch': must be 'group' or 'layer'",
        ),
        (
            {"init__method": "fednova"},
            "init.method = 'fednova': must be another for pr",
        ),
    ],
)
def test_what_studies_refuse(changes, told):
    fields = {"method": "federated", "privacy__epsilon": 8.0, "privacy__unit": "client"}
    fields |= {"model__name": "mlp"}
    with pytest.raises(errors.ConfigError, match=told):
        study.build(tiny.study(**fields | changes))


def test_a_private_study_needs_no_noise_on_images():
    """Clients know their own label counts, and none is sent."""
    fields = {"method": "federated", "privacy__epsilon": 8.0, "privacy__unit": "client"}
    made = study.build(tiny.study(model__name="mlp", **fields))
    assert made.privacy.mechanism is None and made.data.clients.client.noise is None
    assert made.data.clients.client.label_count.sum() > 0
    assert made.sending.private == made.privacy.of_clients
    plain = settings.from_mapping(
        tiny.config(model__name="mlp", method="federated").to_dict()
    )
    assert study.build(plain).sending.private is None


@dataclasses.dataclass(frozen=True)
class Tells(Stage):
    """A stage that tells of images, whose noise is none of the rounds'."""

    name = "tells"
    after = "init"

    def run(self, context):
        yield from ()

    def releases(self, study, sizes):
        return (Release("histograms", np.ones_like(sizes)),)


def test_stages_that_tell_of_clients_are_refused():
    fields = {"method": "federated", "privacy__epsilon": 8.0, "privacy__unit": "client"}
    fields |= {"model__name": "mlp", "stages": (f"{__name__}:Tells",)}
    with pytest.raises(errors.ConfigError, match="stage 'tells': must tell nothing of"):
        study.build(tiny.study(**fields))
