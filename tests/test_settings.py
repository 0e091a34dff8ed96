"""Bad settings: one line each, with field, value and what is allowed."""

import importlib
import pathlib

import pytest

from mosaic_jax import errors, settings
from tests import tiny

CONFIGS = [
    ("digits_mosaic", ""),
    ("digits_baselines", "fedavg"),
    ("fashion_mnist_mosaic", ""),
    ("fashion_mnist_mosaic", "small"),
    ("fashion_mnist_baselines", "fedavg"),
    ("cifar10_mosaic", ""),
    ("cifar10_mosaic", "published"),
    ("cifar10_baselines", "fedavg"),
    ("cifar100_mosaic", ""),
    ("own_mosaic", ""),
    ("mnist_mosaic", ""),
    ("mnist_baselines", "dfrd"),
    ("mnist_heterogeneous", "fedrolex"),
    ("svhn_mosaic", ""),
    ("svhn_baselines", "dfrd"),
    ("svhn_heterogeneous", "fedrolex"),
    ("cifar100_baselines", "dfrd"),
    ("cifar100_heterogeneous", "fedrolex"),
    ("tiny_imagenet_mosaic", ""),
    ("tiny_imagenet_baselines", "dfrd"),
    ("tiny_imagenet_heterogeneous", "fedrolex"),
    ("food101_mosaic", ""),
    ("food101_baselines", "dfrd"),
    ("food101_heterogeneous", "fedrolex"),
    ("digits_heterogeneous", ""),
    ("digits_architectures", ""),
    ("digits_heterogeneous", "fedavg@smallest"),
    ("fashion_mnist_heterogeneous", "heterofl:small"),
    ("cifar10_heterogeneous", "mosaic+fedrolex"),
]


def get(name, variant):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(variant) if variant else module.get_config()


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_every_config_is_valid(name, variant):
    result = settings.from_mapping(get(name, variant).to_dict())
    assert settings.to_mapping(result) == get(name, variant).to_dict()


def test_every_config_file_is_tested():
    folder = pathlib.Path(__file__).parents[1] / "configs"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert names == {name for name, _ in CONFIGS}


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_fedavg_has_as_many_rounds_as_mosaic(name):
    mosaic = settings.from_mapping(get(f"{name}_mosaic", "").to_dict())
    fedavg = settings.from_mapping(get(f"{name}_baselines", "fedavg").to_dict())
    assert mosaic.total_rounds == fedavg.total_rounds
    assert (mosaic.data, mosaic.model, mosaic.local, mosaic.seed) == (
        fedavg.data,
        fedavg.model,
        fedavg.local,
        fedavg.seed,
    )


@pytest.mark.parametrize(
    ("variant", "method", "algorithm", "rate"),
    [
        ("mosaic+fedrolex", "mosaic", "fedrolex", 1.0),
        ("heterofl", "federated", "heterofl", 1.0),
        ("fedavg@smallest", "federated", "fedavg", 0.25),
    ],
)
def test_methods_with_two_parts(variant, method, algorithm, rate):
    study = settings.from_mapping(get("digits_heterogeneous", variant).to_dict())
    assert (study.method, study.init.method, study.model.rate) == (
        method,
        algorithm,
        rate,
    )


def message(change):
    mapping = tiny.config().to_dict()
    change(mapping)
    with pytest.raises(errors.ConfigError) as caught:
        settings.from_mapping(mapping)
    return str(caught.value)


def put(group, **fields):
    return lambda mapping: mapping[group].update(fields)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            put("distill", temperature=-1.0),
            "distill.temperature = -1.0: must be > 0",
        ),
        (
            put("distill", tempreature=1.0),
            "distill.tempreature: unknown field, did you mean 'temperature'?",
        ),
        (put("local", steps="ten"), "local.steps = 'ten': must be int, not str"),
        (put("local", steps=True), "local.steps = True: must be int, not bool"),
        (
            put("meta", head="tree"),
            "meta.head = 'tree': must be one of transformer, linear, diagonal, mean",
        ),
        (put("data", alpha=float("nan")), "data.alpha = nan: must be finite"),
        (put("data", validation=1.0), "data.validation = 1.0: must be in [0, 1)"),
        (
            put("generators", steps=0),
            "generators.steps = 0: must be 0 where generators.epochs = 0 is not, and"
            " the other way round",
        ),
        (
            put("generators", min_steps=9, max_steps=8),
            "generators.max_steps = 8: must be 0, for no bound, or >="
            " generators.min_steps = 9",
        ),
        (lambda mapping: mapping.pop("meta"), "meta: missing"),
        (
            lambda mapping: mapping.update(meta=3),
            "meta = 3: must be a group of fields",
        ),
    ],
)
def test_messages(change, expected):
    assert message(change) == expected


def test_all_problems_come_at_once():
    def change(mapping):
        mapping["distill"]["steps"] = 0
        mapping["data"]["name"] = "mnis"

    assert len(message(change).splitlines()) == 2


def test_whole_numbers_are_floats_too():
    mapping = tiny.config().to_dict()
    mapping["data"]["alpha"] = 1
    assert settings.from_mapping(mapping).data.alpha == 1.0
