"""Devices share the server's batches: the same results, each its part of the FLOPs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ahead_text
from mosaic_jax import server
from mosaic_jax.core import prng, programs, schema, sharing, trees
from mosaic_jax.core.types import Teachers
from mosaic_jax.fl import evaluation, parallel
from mosaic_jax.nn import conv
from mosaic_jax.run import runner
from tests import running, tiny
from tests.server import test_distillation, test_methods, test_refinement

DEVICES = 4
# Part of one device's FLOPs that each of four may have.
AT_MOST = 0.35
FIELDS = {
    "data__num_clients": 4,
    "experts__local_steps": 0,
    "audit__images": 8,
    "audit__reference_steps": 4,
    "refine__steps": 2,
    "refine__batch_size": 8,
}


def axis(num_devices=DEVICES):
    return parallel.build(np.ones(num_devices), num_devices=num_devices)


def alone_and_shared(function, *args):
    """Results and counts of `function(*args)` on one device, and on four."""
    found = []
    for devices in (axis(1), axis()):
        with devices.sharing():
            # A function of its own, whose trace nothing else finds.
            program = programs.jit(lambda *args: function(*args))
            compiled = program.lower(*devices.replicate(args)).compile()
        counts = ahead_text.read(compiled.as_text()).total()
        found.append((compiled(*devices.replicate(args)), counts))
    return found


def check(found, rtol=1e-5):
    """Each of the devices has all results, and did its part."""
    (expected, whole), (result, part) = found
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(result))
    tiny.close(jax.device_get(result), jax.device_get(expected), rtol)
    assert 0 < part.flops <= AT_MOST * whole.flops
    return part


def test_batches_that_devices_cannot_share_stay_whole():
    x = jnp.arange(24.0).reshape(12, 2)
    with axis().sharing():
        assert (sharing.num_devices(), sharing.multiple(9)) == (4, 12)
        run = jax.jit(lambda x: (sharing.spread(x), sharing.spread(x[:10])))
        shared, whole = run(x)
    assert shared.sharding.shard_shape((12, 2)) == (3, 2)
    assert whole.sharding.shard_shape((10, 2)) == (10, 2)
    np.testing.assert_array_equal(shared, x)
    with axis(1).sharing():
        assert (sharing.num_devices(), sharing.multiple(9)) == (1, 9)
        assert sharing.spread(x) is x and sharing.gather(x) is x


def test_a_clients_batch_is_the_work_of_one_device():
    seen, devices = [], axis()

    def one(x):
        seen.append(sharing.num_devices())
        return sharing.spread(x[None])[0] + 1

    with devices.sharing():
        found = jax.jit(lambda x: devices.map(one, x))(jnp.arange(4.0))
        assert sharing.num_devices() == DEVICES
    assert set(seen) == {1}
    np.testing.assert_array_equal(found, np.arange(1.0, 5.0))


def test_an_evaluation():
    network = tiny.classifier()
    model = tiny.varied(network, prng.root(3))
    # Neither the images nor a batch are a multiple of the devices.
    image = np.random.RandomState(0).randint(0, 256, (53, 16, 16, 1)).astype(np.uint8)

    def logits(model, image):
        return evaluation.predict(
            lambda x: network.logits(model, x), image, batch_size=10
        )

    part = check(alone_and_shared(logits, model, image))
    # Logits of padded batches, no images and no activations.
    assert (part.summed, part.exchanged) == (0, 4 * 4 * 5 * 12)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.slow
def test_experts(platform):
    """On accelerators those of one device run together, as grouped convolutions."""
    ensemble, teacher, *_ = test_refinement.setting()
    image = jax.random.uniform(jax.random.key(1), (8, 16, 16, 1))

    def logits(teacher, image):
        return ensemble.logits(teacher, sharing.spread(image))

    with programs.traced_for(platform):
        part = check(alone_and_shared(logits, teacher, image))
    assert (part.summed, part.exchanged) == (0, 4 * 8 * 4)


@pytest.mark.parametrize(
    "fields",
    [{}, pytest.param({"pool": 4, "augment": "translate"}, marks=pytest.mark.slow)],
)
def test_a_step_of_the_distillation(fields):
    """With batch-norm by the batch: its moments are those of all images."""
    # Such steps that the sign of a gradient near 0 is as good as the other.
    fields = {"learning_rate": 1e-6} | fields
    method, task, teachers, student = test_distillation.setting(**fields)
    task = dataclasses.replace(task, batch_norm="train")
    if method.config.pool:
        pool = jax.jit(method.fill)(test_distillation.blank(4), teachers, tiny.KEY, 0)
        pool = jax.jit(method.filled)(pool, teachers)
        teachers = dataclasses.replace(teachers, pool=pool)

    def train(state, model, teachers, key):
        return method.train(task, state, model, teachers, key, 0)

    state = method.init(task, student, tiny.KEY)
    part = check(alone_and_shared(train, state, student, teachers, tiny.KEY))
    assert part.summed >= trees.num_bytes(student.params)
    # Each device's part of the generated images, twice, and no activations.
    part_of_images = 4 * method.samples * 16 * 16 / DEVICES
    assert part.exchanged <= (0 if method.config.pool else 2 * part_of_images)


# Of methods that ask for generators: the distillation above draws images as they do.
@pytest.mark.parametrize(
    "name",
    [
        name if name == "fedgen" else pytest.param(name, marks=pytest.mark.slow)
        for name in server.METHODS
        if not server.METHODS[name].asks_for_generators
    ],
)
def test_a_round_of_a_method_on_the_server(name):
    fields = {
        "batch_size": 8, "latent_dim": 6, "width": 2, "pool": 3, "iterations": 2,
        "generator_steps": 2, "student_steps": 2, "steps": 2, "hidden": 8,
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(server.METHODS[name])}
    fields = {key: value for key, value in fields.items() if key in known}
    method, task = schema.check(server.METHODS[name], fields, name), test_methods.TASK
    keys = jax.random.split(jax.random.key(5), 3)
    student, *clients = (tiny.varied(task.classifier, key) for key in keys)
    teachers = Teachers(trees.stack(clients), test_methods.COUNTS, test_methods.NUMBERS)

    def train(state, model, teachers, key):
        return method.train(task, state, model, teachers, key, 1)

    state = method.init(task, student, tiny.KEY)
    # Adam divides by square roots of tiny gradients.
    check(alone_and_shared(train, state, student, teachers, tiny.KEY), rtol=1e-3)


def test_gradients_of_kernels_by_tiles_of_each_device(monkeypatch):
    monkeypatch.setattr(conv, "_TILE_BYTES", 20_000)  # two images
    x, kernel = (
        jax.random.normal(jax.random.key(0), (16, 8, 8, 4)),
        jnp.ones((3, 3, 4, 12)),
    )

    def gradient(x, kernel):
        y = functools.partial(conv.convolve, sharing.spread(x), stride=1, padding=1)
        return jax.grad(lambda kernel: jnp.sum(y(kernel) ** 2))(kernel)

    part = check(alone_and_shared(gradient, x, kernel))
    # The parts are added up once, not tile by tile.
    assert (part.summed, part.exchanged) == (kernel.nbytes, 0)


def blank(leaf):
    """An array like it, of 8 entries where their number is not known."""
    shape = tuple(8 if length == -1 else length for length in leaf.shape)
    return np.ones(shape, bool) if leaf.dtype == bool else np.zeros(shape, leaf.dtype)


def flops_of_stage(workdir, num_devices, stage, *wanted):
    """FLOPs on each device of some programs of a stage of Mosaic, by name."""
    config = tiny.study(**FIELDS, compute__devices=num_devices)
    work, told = runner.Experiment(config, workdir), {}
    artifacts = {
        name: jax.tree.map(blank, tree)
        for link in work.study.chain
        for name, tree in work.study.template(link).items()
    }

    def tell(program, args, named):
        told[program.__name__] = program, args
        return jax.tree.map(blank, program.trace(*args, **named).out_info)

    with work.placement.axis.sharing():
        with programs.recorded(tell):
            run, state = work.start(running.link_of(work, stage), artifacts), None
            try:
                while True:
                    steps = run.send(state)
                    args = steps.args, steps.state, 0, 1
                    told[steps.name] = jax.jit(steps.window), args
                    state = jax.tree.map(blank, steps.state)
            except StopIteration:
                pass
        texts = [told[name][0].lower(*told[name][1]).compile() for name in wanted]
    return [ahead_text.read(text.as_text()).total().flops for text in texts]


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("meta", ("head",)),
        ("audit", ("compare",)),
        pytest.param("distill", ("student", "see"), marks=pytest.mark.slow),
        pytest.param("refine", ("generator",), marks=pytest.mark.slow),
        pytest.param("experts", ("predict",), marks=pytest.mark.slow),
        pytest.param("reference", ("reference",), marks=pytest.mark.slow),
        pytest.param("generators", ("look",), marks=pytest.mark.slow),
    ],
)
def test_programs_of_stages(stage, wanted, tmp_path):
    alone, shared = (
        flops_of_stage(tmp_path, num_devices, stage, *wanted)
        for num_devices in (1, DEVICES)
    )
    for name, whole, part in zip(wanted, alone, shared, strict=True):
        assert 0 < part <= AT_MOST * whole, name


@pytest.mark.slow
def test_mosaic_on_four_devices_equals_one(tmp_path):
    # Steps so small that rounding stays what it is.
    fields = FIELDS | {
        "model__norm": "group",
        "model__width": 4,
        "local__learning_rate": 1e-3,
        "init__rounds": 1,
        "warmup__rounds": 1,
        "finetune__rounds": 1,
        "evaluation__every": 1,
        "generators__steps": 2,
        "generators__learning_rate": 1e-6,
        "distill__learning_rate": 1e-6,
        "refine__learning_rate": 1e-6,
        "finetune__learning_rate": 1e-3,
    }
    found = []
    for num_devices in (1, DEVICES):
        config = tiny.study(**fields, compute__devices=num_devices)
        work = runner.Experiment(config, tmp_path / str(num_devices))
        summary = work.run()
        found.append((running.artifacts(work), summary))
    (expected, one), (result, other) = found
    tiny.close(result, expected, 1e-4)
    assert other.test_accuracy == one.test_accuracy
