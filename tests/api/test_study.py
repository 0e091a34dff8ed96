"""Studies from Python: objects in, results out."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable

import flax.linen as nn
import numpy as np
import pytest
from flax import nnx

import mosaic_jax as mj
from mosaic_jax.api import result
from mosaic_jax.core import errors
from mosaic_jax.fl import parallel
from mosaic_jax.fl.algorithms.fedprox import FedProx
from mosaic_jax.server.feddf import FedDF
from tests import tiny


class Net(nn.Module):
    """Two layers that know nothing of the library."""

    width: int = 8
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        hidden = nn.Dense(self.width)(x.reshape(len(x), -1))
        return nn.Dense(10)(self.activation(hidden))


@dataclasses.dataclass(frozen=True)
class Mine(mj.Algorithm):
    """FedAvg, with a field."""

    factor: float = 2.0

    def weight(self, size):
        return size * self.factor


def images(count=240):
    """Grey squares whose brightness is their class, in [0, 1], and labels."""
    label = np.arange(count) % 10
    noise = np.random.RandomState(0).rand(count, 16, 16)
    return (label[:, None, None] + noise) / 10, label


def config(**changes):
    return tiny.config(method="federated", **{"init__rounds": 4} | changes)


def study(workdir, **given):
    objects = {"model": Net(), "algorithm": Mine(3.0)}
    return mj.Study(
        config(), workdir, data=mj.data.arrays(*images()), **objects | given
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of objects, run in a thread."""
    found = []
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    thread = threading.Thread(target=lambda: found.append(study(workdir).run()))
    thread.start()
    thread.join()
    (one,) = found
    return one


def test_what_a_result_has(finished):
    summary = finished.summary
    assert isinstance(summary, mj.Summary) and summary.dataset == "own:arrays"
    assert finished.settings["methods"]["Mine"]["factor"] == 3.0
    assert list(finished.models) == list(summary.test_accuracy) == ["init", "final"]
    history = finished.history
    assert history["step"].tolist() == [2, 4]
    assert history["test_accuracy"].iloc[-1] == pytest.approx(
        summary.test_accuracy["final"]
    )
    assert finished.report() == finished.workdir / "report.html"
    page = finished._repr_html_()
    assert f"{100 * summary.test_accuracy['final']:.2f} %" in page
    with pytest.raises(KeyError, match="did you mean 'final'"):
        finished.models["fianl"]


def test_predictions_are_those_of_the_study(finished):
    """For images as they are: uint8, floats, of another size, and in any batches."""
    model, test = finished.models["final"], mj.data.arrays(*images())
    label = model.predict(test.test_image)
    accuracy = np.mean(label == test.test_label)
    assert accuracy == pytest.approx(finished.summary.test_accuracy["final"])
    assert 0.1 < accuracy < 1.0
    logits = model.logits(test.test_image)
    for same in (
        model.logits(test.test_image / 255),
        model.logits(test.test_image[..., 0], batch_size=7),
    ):
        np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
    small = test.test_image[:, ::2, ::2]
    assert np.mean(model.predict(small) == label) > 0.7
    np.testing.assert_allclose(model.probabilities(small).sum(1), 1, rtol=1e-5)
    with pytest.raises(errors.DataError, match=r"images of float64, -1.0..1.0"):
        model.predict(test.test_image / 127.5 - 1)
    with pytest.raises(errors.DataError, match=r"3 channels: must be 1"):
        model.predict(np.repeat(test.test_image, 3, axis=-1))
    # The trap: a classifier takes signed images, and bytes are none.
    with pytest.raises(errors.DataError, match=r"images of uint8: must be floats"):
        model.classifier.logits(model.state, test.test_image)


def test_the_users_network_takes_the_variables(finished):
    variables = finished.models["final"].variables
    assert Net().apply(variables, np.zeros((2, 16, 16, 1))).shape == (2, 10)


def test_a_run_is_loaded_with_its_network(finished):
    found = mj.load(finished.workdir, model=Net())
    assert found.summary == finished.summary
    image = images()[0]
    expected = finished.models["final"].predict(image)
    np.testing.assert_array_equal(found.models["final"].predict(image), expected)
    for wrong, told in (
        (None, r"model = None: must be the network of .*test_study:Net\(\)'"),
        (nn.Dense(10), r"model = 'flax.linen.linear:Dense\(\)': must be the network"),
    ):
        with pytest.raises(errors.ConfigError, match=told):
            mj.load(finished.workdir, model=wrong).models["final"]
    # The last one's parameters have the same shapes.
    for other in (Net(9), Net(8, nn.tanh)):
        with pytest.raises(errors.DataError, match="had other code or fields"):
            mj.load(finished.workdir, model=other).models["final"]


def test_the_same_study_is_not_run_again(finished, tmp_path, monkeypatch):
    again = study(finished.workdir)
    stages = "mosaic_jax.run.runner.run_stage"
    monkeypatch.setattr(stages, lambda *_: pytest.fail("a stage runs again"))
    assert again.run().summary.stages == finished.summary.stages
    other = study(tmp_path / "other", reuse_from=[finished.workdir])
    assert other.run().summary.stages == finished.summary.stages


def test_what_the_fingerprint_sees(tmp_path):
    def of(**changes):
        given = {"model": Net(), "algorithm": Mine(), "data": data} | changes
        return mj.Study(config(), tmp_path, **given).fingerprints()

    data = mj.data.arrays(*images())
    first = of()
    assert first == of(model=Net(8), algorithm=Mine, data=mj.data.arrays(*images()))
    for other in (
        {"model": Net(9)},
        {"algorithm": Mine(2.5)},
        {"data": mj.data.arrays(1 - images()[0], images()[1])},
    ):
        assert not set(first.values()) & set(of(**other).values()), other


def two_by_two(labels, num_clients, rng):
    """Two classes for each of three clients, none of whom knows the others'."""
    return [np.flatnonzero(labels // 2 == i) for i in range(num_clients)]


def test_partitions(tmp_path):
    given = {"model": Net(), "data": mj.data.arrays(*images())}
    made = mj.Study(config(data__client_test="own"), partition=two_by_two, **given)
    data = made._experiment.data
    assert (data.label_count > 0).sum(1).tolist() == [2, 2, 2]
    of_test = data.held_out["test"].label[data.test_index]
    assert [set(one) for one in of_test] == [{0, 1}, {2, 3}, {4, 5}]
    assert made.settings.data.split == "tests.api.test_study:two_by_two"
    named = mj.Study(config(), partition="quantity", **given)
    assert named.settings.data.split == "quantity"


def test_devices_are_made_before_they_are_counted(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(parallel, "make_devices", made.append)
    mj.Study(config(compute__devices=1), tmp_path, data=mj.data.arrays(*images()))
    assert made == [1]


def test_library_parts_by_class_and_instance(tmp_path):
    found = mj.Study(
        "digits_mosaic", tmp_path, algorithm=FedProx(mu=0.5), server=FedDF(steps=3)
    ).settings
    assert (found.method, found.init.method) == ("federated", "fedprox")
    assert (found.server.method, found.server.when) == ("feddf", FedDF.when)
    assert found.methods["fedprox"]["mu"] == 0.5
    assert found.methods["feddf"]["steps"] == 3
    found = mj.Study("digits_mosaic", tmp_path / "other", model="cnn").settings
    assert (found.method, found.model.name) == ("mosaic", "cnn")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"algorithm": Net},
            r"algorithm = .*Net.*: must be a name, a frozen dataclass",
        ),
        ({"algorithm": FedProx(mu=-1)}, r"methods.fedprox.mu = -1.0: must be >= 0"),
        ({"server": Mine}, r"server = .*Mine.*: must be a name, a frozen dataclass"),
        ({"model": Net}, r"model = .*Net.*: must be a name, an instance of a flax"),
        ({"model": nn.Dense(10)}, r"must end in a layer from features"),
        (
            {"model": nnx.Linear(3, 4, rngs=nnx.Rngs(0))},
            r"model = Linear: has its values already: must say how it is made, as nnx",
        ),
        ({"data": 3}, r"data = 3: must be a name or a function from a path"),
        ({"data": functools.partial(two_by_two)}, r"data = .*: has no name that"),
        ({"partition": functools.partial(two_by_two)}, r"partition = .*: has no name"),
        ({"partition": 3}, r"partition = 3: must be a name or a function of labels"),
        ({"data": "digitz"}, r"data.name = 'digitz': must be one of digits"),
    ],
)
def test_what_is_refused(given, told, tmp_path):
    with pytest.raises(errors.ConfigError, match=told):
        mj.Study(config(), tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("digits", r"config = 'digits': did you mean 'digits_mosaic'"),
        ("digits_mosaic:arch", r"arch: unknown variant; known: default, arch"),
        (3, r"config = 3: must be the name of a configuration, a ConfigDict or"),
        ({"seeds": 3}, r"seeds = 3: must be 1: make a Study of each seed"),
        ({"compare": "all"}, r"compare = 'all': must be ''"),
        ({"innit": {}}, r"innit: unknown field, did you mean 'init'"),
    ],
)
def test_configurations_that_are_refused(given, told):
    with pytest.raises(errors.ConfigError, match=told):
        mj.Study(given)


def test_groups_that_are_values_are_refused():
    with pytest.raises(errors.ConfigError, match="model = 'mlp': must be a dict"):
        mj.Study({"model": "mlp"}, model=Net())


def test_configurations_with_changes():
    found = mj.configs.get(
        "digits_mosaic:architectures", seed=3, init={"rounds": 7}, methods={"My": {}}
    )
    before = mj.configs.get("digits_mosaic:architectures")
    assert (found.seed, found.init.rounds) == (3, 7)
    assert found.init.method == before.init.method and "cnn" in found.model.others
    found.init.rounds = 8
    assert before.init.rounds != 8 and "fedprox" in found.methods


def test_a_comparison(finished, tmp_path):
    both = mj.compare({"one": finished, "other": finished.workdir})
    accuracy = 100 * finished.summary.test_accuracy["final"]
    assert both.frame.loc["other"]["test accuracy, %"] == f"{accuracy:.1f}"
    assert f"| one | {accuracy:.1f} |" in repr(both)
    assert "<td>other</td>" in both._repr_html_()
    page = both.report(tmp_path / "pages" / "both.html")
    assert "2 studies compared" in page.read_text()
    with pytest.raises(errors.ConfigError, match="must have at least one"):
        mj.compare([])
    for alone in ("runs/first", tmp_path, finished):
        with pytest.raises(errors.ConfigError, match="must be a list of results"):
            mj.compare(alone)
    with pytest.raises(errors.DataError, match="summary.json"):
        mj.compare([tmp_path / "nowhere"])


def test_pandas_is_asked_for(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(errors.ConfigError, match="pip install pandas"):
        result.frame([], "result.history")


@pytest.mark.slow
def test_rectangles_of_a_column_of_writers(tmp_path):
    """Any size that the network takes; what a loaded model is given becomes that."""
    image, label = images()
    writer = np.random.RandomState(1).permutation(len(label)) % 7
    tall = np.repeat(image, 2, axis=1)
    given = mj.data.arrays(tall, label, groups=writer, size=(32, 16))
    study = mj.Study(
        config(init__rounds=2, data__validation=0.0, data__max_images=0),
        tmp_path,
        data=given,
        partition="by_column",
    )
    counts = study._experiment.data.label_count
    train = [
        np.bincount(given.train_label[given.train_group == w], minlength=10)
        for w in range(7)
    ]
    assert {tuple(row) for row in counts} <= {tuple(row) for row in train}
    result = study.run()
    loaded = mj.load(tmp_path)
    assert loaded.models["final"].info.image_shape == (32, 16, 1)
    expected = result.models["final"].predict(tall)
    np.testing.assert_array_equal(loaded.models["final"].predict(tall), expected)
    told = "images of 32 x 16 pixels: must be squares of 16, 32, 64 pixels, which gen"
    for server in ("fedftg", "feddf"):
        with pytest.raises(errors.ConfigError, match=told):
            mj.Study(config(), tmp_path / "no", data=given, server=server)
    with pytest.raises(errors.ConfigError, match=told):
        mj.Study(tiny.config(), tmp_path / "no", data=given)


class OfNnx(nnx.Module):
    """Two layers of the newer kind."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(256, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


class OfNnxToo(OfNnx):
    """One of the same shapes that does something else."""

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x.reshape(len(x), -1))))


def test_a_network_of_nnx(tmp_path):
    """It learns, is loaded again by its code, and other code is another study."""

    def of(network, *fields):
        return nnx.bridge.to_linen(network, *fields)

    def study(model):
        data = mj.data.arrays(*images())
        changes = {"init__rounds": 12, "local__learning_rate": 0.1}
        return mj.Study(config(**changes), tmp_path, model=model, data=data)

    first = study(of(OfNnx, 8))
    others = [of(OfNnx, 8), of(OfNnx, 9), of(OfNnxToo, 8)]
    same = [study(other).fingerprints() == first.fingerprints() for other in others]
    assert same == [True, False, False]
    result = first.run()
    assert result.summary.test_accuracy["final"] > 0.2
    image = images()[0]
    loaded = mj.load(tmp_path, model=of(OfNnx, 8)).models["final"]
    expected = result.models["final"].predict(image)
    np.testing.assert_array_equal(loaded.predict(image), expected)
    with pytest.raises(errors.DataError, match="had other code or fields"):
        mj.load(tmp_path, model=of(OfNnxToo, 8)).models["final"]


class Turns:
    """A partitioner as flwr-datasets has them: images are dealt in turn."""

    num_partitions = 3

    def load_partition(self, number):
        return self.dataset.select(range(number, len(self.dataset), 3))


def test_a_partitioner_of_flower(tmp_path):
    pytest.importorskip("datasets")
    study = mj.Study(
        config(data__num_clients=3),
        tmp_path,
        data=mj.data.arrays(*images()),
        partition=Turns(),
    )
    assert study.settings.data.split.endswith("test_study:Turns()")
    assert [part[:3].tolist() for part in study._experiment.data.parts] == [
        [0, 3, 6],
        [1, 4, 7],
        [2, 5, 8],
    ]
