"""Studies that start from a model: what counts, what is refused, what it comes to."""

import logging
import pathlib

import flax.traverse_util
import numpy as np
import pytest

import mosaic_jax as mj
from mosaic_jax.core import errors, prng, tensor_files, trees
from mosaic_jax.run import runner, study
from mosaic_jax.stages import prototype_rounds
from tests import golden, tiny

# 16 x 16 pixels, two layers of four units, ten classes.
PTH = pathlib.Path(golden.__file__).parent / "mlp.pth"
ARRAYS = {name: np.float32(array) for name, array in tensor_files.read(PTH).items()}
FIELDS = {"method": "federated", "model__name": "mlp", "model__width": 4}


def build(start, **changes):
    return study.build(tiny.study(**FIELDS | {"model__start": str(start)} | changes))


def fingerprints(start):
    return {link.name: found for link, found in build(start).plan()}


@pytest.fixture
def saved(tmp_path):
    """A file of given arrays."""

    def write(name="model.safetensors", without=(), **changes):
        arrays = {k: v for k, v in ARRAYS.items() if k not in without}
        changes = {name.replace("__", "."): v for name, v in changes.items()}
        tensor_files.write(tmp_path / name, arrays | changes)
        return tmp_path / name

    return write


def test_arrays_are_those_of_the_file():
    found = build(PTH).start
    assert len(found) == 6
    np.testing.assert_array_equal(
        found["params/hidden_0/kernel"], ARRAYS["hidden.0.weight"].T
    )
    np.testing.assert_array_equal(found["params/fc/bias"], ARRAYS["fc.bias"])
    assert {array.dtype for array in found.values()} == {np.dtype("float32")}


def test_the_content_counts_and_not_the_place(saved):
    first, moved = fingerprints(PTH), fingerprints(saved("elsewhere.safetensors"))
    assert moved == first
    bias = ARRAYS["fc.bias"].copy()
    bias[3] += 1e-3
    edited = fingerprints(saved(fc__bias=bias))
    random = fingerprints("")
    for name in first:
        assert len({one[name] for one in (first, edited, random)}) == 3, name


def test_names_of_this_library_do_as_well(saved, tmp_path):
    here = build(PTH).start
    tensor_files.write(tmp_path / "here.safetensors", here)
    found = build(tmp_path / "here.safetensors").start
    assert trees.digest(found) == trees.digest(here)


def refused(start, **changes):
    with pytest.raises(errors.ConfigError) as caught:
        build(start, **changes)
    told = f"model.start = {str(start)!r}: "
    lines = str(caught.value).splitlines()
    assert all(line.startswith(told) for line in lines)
    return [line.removeprefix(told) for line in lines]


def test_every_mismatch_is_a_line(saved):
    path = saved(
        without=["hidden.1.bias"],
        hidden__0__weight=np.zeros((4, 300), np.float32),
        extra=np.zeros(2, np.float32),
        fc__bias=np.full(10, np.nan, np.float32),
    )
    assert refused(path) == [
        "'hidden.0.weight' has the shape (4, 300): must be (4, 256)",
        "'hidden.1.bias' is missing",
        "'fc.bias' must have finite numbers",
        "'extra' is not in the network",
    ]
    lines = refused(path, model__name="cnn")
    assert len(lines) == 11
    assert lines[-1].endswith(" more")


def test_what_cannot_be_read_is_refused(tmp_path):
    assert refused("no.pth") == ["no.pth: no such file"]
    assert refused(tmp_path) == [f"{tmp_path}/summary.json: is missing"]
    (line,) = refused(PTH.with_name("more_than_tensors.pth"))
    assert "holds more than tensors" in line


def test_a_head_for_other_classes_starts_at_random(saved, caplog):
    path = saved(
        fc__weight=np.zeros((7, 4), np.float32), fc__bias=np.zeros(7, np.float32)
    )
    with caplog.at_level(logging.WARNING):
        found = build(path).start
    assert "'fc.weight', 'fc.bias' are of other classes than the 10" in caplog.text
    assert {name.split("/")[1] for name in found} == {"hidden_0", "hidden_1"}
    # A hidden layer of another width is no head.
    lines = refused(saved(hidden__1__bias=np.zeros(7, np.float32)))
    assert lines == ["'hidden.1.bias' has the shape (7,): must be (4,)"]


def test_only_the_servers_network_starts_from_it():
    fields = {"model__others": ("cnn",), "generators__inversion_weight": 0.0}
    found = study.build(
        tiny.study(model__name="mlp", model__width=4, model__start=str(PTH), **fields)
    )
    links = {link.name: link for link in found.chain}
    blueprint = found.blueprint(links["init"])
    assert blueprint.for_network("mlp").start
    assert not blueprint.for_network("cnn").start
    assert not found.blueprint(links["generators"]).start
    random = study.build(tiny.study(model__name="mlp", model__width=4, **fields))
    changed, same = (
        {link.name: fingerprint for link, fingerprint in one.plan()}
        for one in (found, random)
    )
    assert changed["init"] != same["init"]
    assert changed["init@cnn"] == same["init@cnn"]


def test_clients_that_exchange_prototypes_start_from_it():
    found = build(PTH, init__method="fedproto")
    blueprint = found.blueprint(found.chain[0])
    model = prototype_rounds._initial_model(
        blueprint, "mlp", prng.root(0), blueprint.start
    )
    np.testing.assert_array_equal(
        model.params["hidden_0"]["kernel"], ARRAYS["hidden.0.weight"].T
    )


def test_a_run_starts_from_another(tmp_path):
    brief = FIELDS | {"init__rounds": 1, "data__validation": 0.9}
    first = mj.Study(tiny.config(**brief), tmp_path / "first").run()
    start = {"model__start": f"{tmp_path}/first:init"}
    # So small a rate changes next to nothing.
    still = brief | start | {"local__learning_rate": 1e-12, "seed": 1}
    second = mj.Study(tiny.config(**still), tmp_path / "second").run()
    assert second.models["final"].variables.keys() == {"params", "batch_stats"}
    for name, array in flax.traverse_util.flatten_dict(
        first.models["init"].variables
    ).items():
        other = flax.traverse_util.flatten_dict(second.models["final"].variables)[name]
        np.testing.assert_allclose(other, array, rtol=1e-6)
    # What is written from Python is read again.
    first.models["final"].save(tmp_path / "model.safetensors")
    assert build(tmp_path / "model.safetensors").start.keys() == (
        trees.flatten(first.models["final"].variables).keys()
    )
    with pytest.raises(errors.ConfigError, match="has no model 'distilled'"):
        build(f"{tmp_path}/first:distilled")


def test_a_run_does_not_start_from_itself(tmp_path):
    for name in (tmp_path, f"{tmp_path}:init"):
        settings = tiny.study(**FIELDS | {"model__start": str(name)})
        with pytest.raises(errors.ConfigError, match="must be another run than"):
            runner.Experiment(settings, tmp_path)


def test_pixels_in_another_order_are_refused(saved):
    """A layer over all pixels of a colour image."""
    label = np.arange(40) % 10
    data = mj.data.arrays(np.zeros((40, 16, 16, 3), np.uint8), label)
    config = tiny.config(**FIELDS | {"model__start": str(PTH), "data__validation": 0.0})
    with pytest.raises(errors.ConfigError, match="colour images: PyTorch has their pi"):
        mj.Study(config, data=data, partition="iid")
