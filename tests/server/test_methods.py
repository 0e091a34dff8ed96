"""Data-free training on the server: losses by hand, modes, and whole steps in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import errors, prng, registry, schema, trees
from mosaic_jax.core.types import Teachers
from mosaic_jax.fl import algorithms
from mosaic_jax.nn import losses
from mosaic_jax.server import base
from tests import tiny
from tests.golden import server_steps
from tests.tiny import KEY, close

SMALL = {"batch_size": 8, "latent_dim": 6, "width": 2}
METHODS = {
    "dense": SMALL | {"generator_steps": 3, "pool": 3},
    "fedftg": SMALL | {"iterations": 2, "student_steps": 2},
    "dfrd": SMALL | {"iterations": 2, "generator_steps": 2, "student_steps": 2},
}
TASK = base.Task(tiny.classifier(), (16, 16, 1), 4, "none", "auto", "train", 3)
COUNTS = jnp.array([[6, 0, 2, 0], [2, 4, 2, 0]])
NUMBERS = jnp.arange(2)


def method(name, **fields):
    return schema.check(server.METHODS[name], METHODS[name] | fields, name)


def run(count=2, **fields):
    """State after `count` rounds of FedAvg."""
    data = tiny.dataset([10, 19, 8])
    return tiny.run_rounds(algorithms.FedAvg(), count, data=data, **fields)[0]


@pytest.fixture(scope="module")
def teachers():
    init = jax.vmap(lambda key: TASK.classifier.init(key, TASK.image_shape))
    return Teachers(init(jax.random.split(jax.random.key(5), 2)), COUNTS, NUMBERS)


@pytest.fixture(scope="module")
def student():
    return TASK.classifier.init(jax.random.key(9), TASK.image_shape)


def test_class_shares_by_hand():
    tau, share = base.class_shares(jnp.array([[2, 0, 6], [2, 4, 2]]))
    np.testing.assert_allclose(tau[0], [0.5, 0, 0.75])
    np.testing.assert_allclose(tau.sum(axis=0), 1)
    np.testing.assert_allclose(share, [0.25, 0.25, 0.5])
    tau, share = base.class_shares(jnp.zeros((2, 3)))
    assert not np.isnan(tau).any() and not np.isnan(share).any()


def test_labels_follow_the_shares():
    share = jnp.array([0.0, 0.25, 0.5, 0.25, 0.0])
    for seed in range(20):
        label = base.draw_labels(jax.random.key(seed), share, 16)
        np.testing.assert_array_equal(np.bincount(label, minlength=5), [0, 4, 8, 4, 0])
    # Shares finer than the batch hold in the mean.
    share = jnp.array([0.03, 0.07, 0.9])
    keys = jax.random.split(jax.random.key(0), 5000)
    label = jax.vmap(lambda key: base.draw_labels(key, share, 4))(keys)
    found = np.bincount(label.ravel(), minlength=3) / label.size
    np.testing.assert_allclose(found, share, atol=3 * (0.25 / label.size) ** 0.5)


@pytest.mark.parametrize("power", [1, 2])
def test_pairwise_diversity_by_hand(power):
    z = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    apart, same = jnp.array([0.0, 1.0])[:, None, None, None], jnp.ones((2, 1, 1, 1))
    found = losses.pairwise_diversity(apart, z, power=power)
    assert found == pytest.approx(np.exp(-1))
    assert losses.pairwise_diversity(same, z, power=power) == 1
    assert losses.pairwise_diversity(apart, jnp.ones((2, 2)), power=power) == 1


STUDENT, TEACHER = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([[1.0, 0.0]] * 2)


def test_dense_losses_by_hand():
    dense = method("dense")
    assert dense.boundary_loss(STUDENT, TEACHER) == pytest.approx(-0.231059, abs=1e-6)
    assert dense.boundary_loss(TEACHER, TEACHER) == 0
    assert dense.student_loss(STUDENT, TEACHER) == pytest.approx(0.249922, abs=1e-4)
    assert dense.student_loss(TEACHER, TEACHER) == 0
    moments = {"bn": {"mean": jnp.zeros(3), "var": jnp.zeros(3)}}
    running = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    assert losses.statistics_distance(moments, running) == pytest.approx(3**0.5)
    assert losses.statistics_distance(running, running) == 0


def test_fedftg_losses_by_hand():
    p_s, p_t = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.75, 0.25]]))
    published, paper = method("fedftg", published=True), method("fedftg")
    target = jnp.array([[0.75, 0.25]])
    assert published.student_loss(p_s, target) == pytest.approx(0.346574, abs=1e-6)
    assert paper.student_loss(p_s, target) == pytest.approx(2 * 0.346574, abs=1e-6)
    weight, label, diversity = jnp.array([0.5]), jnp.array([0]), jnp.array(0.3)
    loss = paper.generator_loss(p_s, p_t, label, weight, diversity, 3)
    expected = 0.5 * -0.143841 + 0.5 * -np.log(0.75) + 0.1
    assert loss == pytest.approx(expected, abs=1e-6)
    loss = published.generator_loss(p_s, p_t, label, weight, diversity, 3)
    apart = (np.log(0.75 / 0.5) + np.log(0.5 / 0.25)) / 2
    assert loss == pytest.approx(0.5 * -apart + 0.5 * -np.log(0.75) + 0.1, abs=1e-6)
    # Without gradient through the client but for the cross-entropy.
    gradient = jax.grad(
        lambda t: published.generator_loss(p_s, t, label, 0 * weight, diversity, 3)
    )(p_t)
    np.testing.assert_array_equal(gradient, 0)


def test_dfrd_generator_loss_by_hand():
    dfrd = method("dfrd")
    right, wrong = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    teacher = jnp.stack([right, right, wrong, wrong])
    student = jnp.stack([right, wrong, right, wrong])
    label = jnp.zeros(4, jnp.int32)
    loss = dfrd.generator_loss(student, teacher, label, jnp.array(0.25))
    kl = losses.kl(right[None], wrong[None])[0]
    expected = losses.cross_entropy(teacher, label) - kl + 0.25
    assert loss == pytest.approx(float(expected), rel=1e-6)
    # Nothing to gain anywhere: no transfer term, and a finite gradient.
    loss, gradient = jax.value_and_grad(dfrd.generator_loss)(
        teacher, teacher, label, jnp.array(0.0)
    )
    assert loss == pytest.approx(float(losses.cross_entropy(teacher, label)))
    assert np.isfinite(gradient).all()


def test_dfrd_student_loss_has_no_squared_temperature():
    loss = method("dfrd").student_loss(STUDENT, TEACHER)
    assert loss == pytest.approx(0.002498, abs=1e-6)
    value, gradient = jax.value_and_grad(method("dfrd").student_loss)(TEACHER, TEACHER)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


@pytest.mark.parametrize("name", ["fedftg", "dense", "dfrd"])
def test_student_gradient_against_finite_differences(name):
    loss = functools.partial(
        # A small temperature: T^2 enlarges the rounding of the difference.
        method(name, **{} if name == "fedftg" else {"temperature": 2.0}).student_loss,
        **{
            "target" if name == "fedftg" else "teacher": jax.nn.softmax(
                jnp.array([[0.3, -1.0, 0.7]])
            )
        },
    )
    logits = jnp.array([[0.5, 0.2, -0.4]])
    gradient = jax.grad(loss)(logits)
    for k in range(3):
        step = 1e-2 * jax.nn.one_hot(k, 3)[None]
        slope = (loss(logits + step) - loss(logits - step)) / 2e-2
        assert gradient[0, k] == pytest.approx(float(slope), abs=2e-4)


@functools.cache
def trained(name, number=0, **fields):
    """State before, state after, student after, metrics of one round on the server."""
    init = jax.vmap(lambda key: TASK.classifier.init(key, TASK.image_shape))
    teachers = Teachers(init(jax.random.split(jax.random.key(5), 2)), COUNTS, NUMBERS)
    student = TASK.classifier.init(jax.random.key(9), TASK.image_shape)
    server = method(name, **fields)
    state = server.init(TASK, student, KEY)
    after = jax.jit(functools.partial(server.train, TASK))(
        state, student, teachers, KEY, number
    )
    return student, state, *after


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_training_moves_generator_and_student_and_keeps_teachers(name):
    student, before, after, model, metrics = trained(name)
    assert trees.all_finite((after, model, metrics))
    assert not np.allclose(model.params["fc"]["kernel"], student.params["fc"]["kernel"])
    assert trees.digest(before) != trees.digest(after)
    assert set(metrics) == {"generator_loss", "student_loss"}


@pytest.mark.parametrize(
    "name", ["fedftg", pytest.param("dfrd", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_without_iterations_it_is_fedavg(name):
    fedavg = run().model
    server = method(name, iterations=0)
    state = run(server=server, task=TASK)
    close(state.model, fedavg)


def test_teachers_know_the_labels_that_a_round_used():
    """FedAvg rounds hand the server each client's own model and counts."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy(base.ServerTraining):
        def init(self, task, model, key):
            return ()

        def train(self, task, state, model, teachers, key, number):
            jax.debug.callback(lambda t: seen.append(t), teachers)
            return state, model, {}

    sizes = [10, 19, 8]
    state = run(1, server=Spy(), task=TASK, keep_models=True)
    jax.effects_barrier()
    (teachers,) = seen
    close(teachers.client_model, state.client_model)
    # 3 steps of 8 of each: 10 images are shown 8 + 2 + 8 times, 8 of them 24 times.
    np.testing.assert_allclose(teachers.label_count.sum(axis=1), [18, 8 + 8 + 3, 24])
    data = tiny.dataset(sizes)
    np.testing.assert_allclose(teachers.label_count[2], 3 * data.client.label_count[2])


@pytest.mark.slow
def test_dense_pool_keeps_the_newest_batches():
    student, _, state, *_ = trained("dense")
    assert state.count == 1
    assert np.any(state.image[0] != 0) and not np.any(state.image[1:])
    teachers = Teachers(trees.broadcast(student, 2), COUNTS, NUMBERS)
    server = method("dense", pool=2)
    step = jax.jit(functools.partial(server.train, TASK))
    state, model = server.init(TASK, student, KEY), student
    pools = []
    for number in range(3):
        state, model, _ = step(state, model, teachers, prng.at(KEY, number), number)
        pools.append(np.asarray(state.image))
    np.testing.assert_array_equal(pools[1][0], pools[0][0])
    np.testing.assert_array_equal(pools[2][1], pools[1][1])
    assert np.any(pools[2][0] != pools[1][0])


def test_dense_statistics_loss_has_a_gradient():
    """The original's is always 0: its hooks find no batch-norm."""
    _, _, _, _, metrics = trained(
        "dense", class_weight=0.0, boundary_weight=0.0, statistics_weight=1.0
    )
    one = metrics["generator_loss"]
    first = trained(
        "dense",
        class_weight=0.0,
        boundary_weight=0.0,
        statistics_weight=1.0,
        generator_steps=1,
    )[-1]["generator_loss"]
    assert 0 < one < first


@pytest.mark.slow
def test_dfrd_average():
    _, before, after, *_ = trained("dfrd", average_decay=0.25)
    expected = jax.tree.map(
        lambda old, new: 0.25 * old + 0.75 * new, before.average, after.generator.model
    )
    close(after.average, expected)
    _, before, after, *_ = trained("dfrd", average_decay=1.0)
    close(after.average, before.generator.model)


@pytest.mark.slow
def test_dfrd_learns_from_the_average_only_after_the_first_round():
    alone = trained("dfrd", average_share=0.0)[3]
    close(trained("dfrd")[3], alone)
    later = trained("dfrd", number=1)[3]
    assert not tiny.are_close(later, alone)


def constant(model, *logits):
    """`model` with the same logits for every image."""
    kernel = jnp.zeros_like(model.params["fc"]["kernel"])
    fc = {"kernel": kernel, "bias": jnp.array(logits)}
    return model.replace(params=model.params | {"fc": fc})


@pytest.mark.parametrize(
    "counts",
    [
        [[3, 1, 0, 4], [1, 0, 0, 2]],
        pytest.param([[3, 1, 0, 4]], marks=pytest.mark.slow),
    ],
)
def test_fedftg_teaches_the_softmax_of_its_clients(counts, student):
    """Shares of a class sum to 1: clients that agree are one teacher."""
    server = method(
        "fedftg",
        iterations=1,
        student_steps=1,
        student_learning_rate=0.5,
        weight_decay=0.0,
    )
    taught, told = np.array([1.0, -1.0, 0.5, 0.0]), np.array([0.0, 2.0, 0.0, -1.0])
    student = constant(student, *taught)
    clients = trees.broadcast(constant(student, *told), len(counts))
    _, model, metrics = server.train(
        TASK,
        server.init(TASK, student, KEY),
        student,
        Teachers(clients, jnp.array(counts), jnp.arange(len(counts))),
        KEY,
        0,
    )

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    loss = -np.sum(softmax(told) * np.log(softmax(taught)))
    np.testing.assert_allclose(metrics["student_loss"], loss, rtol=1e-5)
    # The gradient of cross-entropy with respect to logits.
    bias = taught - 0.5 * (softmax(taught) - softmax(told))
    np.testing.assert_allclose(model.params["fc"]["bias"], bias, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_order_of_clients_changes_nothing(name, teachers, student):
    server = method(name, student_learning_rate=0.1)
    clients = teachers.client_model
    fc = clients.params["fc"] | {"bias": jnp.array([[2.0, 0, 0, -2], [0, -2, 2, 0]])}
    clients = clients.replace(params=clients.params | {"fc": fc})
    train = jax.jit(functools.partial(server.train, TASK))
    start = server.init(TASK, student, KEY)

    def taught_by(*order):
        given = trees.take(Teachers(clients, COUNTS, jnp.arange(2)), jnp.array(order))
        return train(start, student, given, KEY, 0)[1:]

    found = taught_by(0, 1)
    close(taught_by(1, 0), found)
    # Both teach, and not the same.
    bias = [taught_by(i, i)[0].params["fc"]["bias"] for i in (0, 1)]
    for other in (student.params["fc"]["bias"], *bias):
        assert np.abs(other - found[0].params["fc"]["bias"]).max() > 1e-3


def test_wrong_method():
    message = "server.method = 'dfdr': unknown, did you mean 'dfrd'"
    with pytest.raises(errors.ConfigError, match=message):
        registry.build(server.METHODS, "dfdr", {})


@pytest.mark.parametrize("name", server_steps.FIELDS)
def test_a_round_on_the_server_equals_pytorch(name):
    """Parity with a derivation in PyTorch (tests/golden/server_steps.py)."""
    server = server_steps.method(name)
    student, teachers = server_steps.models()
    state, model, _ = jax.jit(functools.partial(server.train, server_steps.TASK))(
        server_steps.start(server), student, teachers, server_steps.KEY, 1
    )
    found = {"student": model}
    if name.startswith("fedftg"):
        found["generator"] = state.model
    elif name == "dfrd":
        found["generator"] = state.generator.model
    with np.load(server_steps.PATH, allow_pickle=False) as golden:
        expected = {
            place.partition("/")[2]: golden[place]
            for place in golden
            if place.startswith(f"{name}/")
        }
    flat = {
        f"{part}/{path}": leaf
        for part, model in found.items()
        for path, leaf in trees.flatten(model).items()
    }
    assert flat.keys() == expected.keys()
    for place, leaf in flat.items():
        np.testing.assert_allclose(
            leaf, expected[place], rtol=2e-4, atol=2e-6, err_msg=place
        )
    moved = trees.flatten(student)["params/fc/kernel"]
    assert not np.allclose(flat["student/params/fc/kernel"], moved, atol=1e-3)
