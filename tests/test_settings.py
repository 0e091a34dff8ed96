"""Bad settings: one line each, with field, value and what is allowed."""

import pytest

from mosaic_jax import algorithms, distillation, errors, settings
from mosaic_jax.experiment import Experiment
from tests import tiny


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fedporx", "did you mean 'fedprox'?"),
        ("dfdr", "did you mean 'dfrd'?"),
        ("", "known: fedavg, "),
    ],
)
def test_fields_of_an_unknown_method_are_told(name, hint, tmp_path):
    study = tiny.study()
    study.methods[name] = {"mu": 1.0}
    with pytest.raises(errors.ConfigError) as caught:
        Experiment(study, tmp_path)
    assert str(caught.value).startswith(f"methods.{name}: unknown method, {hint}")
    assert "\n" not in str(caught.value)


def test_fields_of_every_method_are_taken(tmp_path):
    study = tiny.study()
    known = {*algorithms.ALGORITHMS, *distillation.METHODS}
    assert study.methods.keys() < known
    study.methods.update({name: {} for name in known - study.methods.keys()})
    Experiment(study, tmp_path)
