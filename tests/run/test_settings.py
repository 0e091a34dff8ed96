"""Settings of a study: bad ones are one line each, and every name is listed once."""

import dataclasses

import pytest

from mosaic_jax import server
from mosaic_jax.core import errors, programs, registry, schema
from mosaic_jax.data import partition, shifts, sources
from mosaic_jax.fl import algorithms, attacks, compression, optimizers, robust
from mosaic_jax.nn import conv, gating, losses, meta, networks, norm
from mosaic_jax.run import settings, study
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
        (
            put("meta", head="tree"),
            "meta.head = 'tree': must be one of transformer, linear, diagonal, mean",
        ),
        (
            put("init", method="fedprx"),
            f"init.method = 'fedprx': must be one of {', '.join(algorithms.ALGORITHMS)}"
            ", or 'package.module:Class' of your own",
        ),
        (
            put("generators", steps=0, epochs=0),
            "generators.steps = 0: must be 0 where generators.epochs = 0 is not, and"
            " the other way round",
        ),
        (
            put("generators", min_steps=9, max_steps=8),
            "generators.max_steps = 8: must be 0, for no bound, or >="
            " generators.min_steps = 9",
        ),
        (
            put("data", split="file"),
            "data.split_file = '': must be a path for data.split = 'file', and ''"
            " otherwise",
        ),
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


def test_fields_left_out_have_their_defaults():
    found, default = settings.from_mapping({}), settings.Settings()
    assert found.model.dtype == "float32"  # "auto", on a CPU
    assert dataclasses.replace(found, model=default.model) == default
    assert dataclasses.replace(found.model, dtype="auto") == default.model


def test_activations_are_bfloat16_on_accelerators():
    def dtype(**model):
        return settings.from_mapping({"model": model}).model.dtype

    with programs.traced_for("gpu"):
        assert dtype() == "bfloat16"
        assert dtype(dtype="float32") == "float32"
        own = "tests.own_parts:Patches"
        assert dtype(name=own) == "float32"
    assert dtype(dtype="bfloat16") == "bfloat16"


def test_settings_that_are_read_again_are_the_same():
    assert settings.from_mapping(schema.to_mapping(tiny.study())) == tiny.study()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fedporx", "did you mean 'fedprox'?"),
        ("dfdr", "did you mean 'dfrd'?"),
        ("", "known: fedprox, "),
    ],
)
def test_fields_of_an_unknown_method_are_told(name, hint):
    given = dataclasses.replace(tiny.study(), methods={name: {"mu": 1.0}})
    with pytest.raises(errors.ConfigError) as caught:
        study.build(given)
    assert str(caught.value).startswith(f"methods.{name}: unknown method, {hint}")
    assert "\n" not in str(caught.value)


def test_fields_of_every_method_are_taken():
    given = {name: {} for name in settings.components()}
    assert {"fedprox", "partial", "dense"} <= given.keys()
    study.build(dataclasses.replace(tiny.study(), methods=given))
    assert settings.defaults()["methods"].keys() == given.keys()


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("data.name", sources.SOURCES),
        ("data.split", (*partition.MODES, "file")),
        ("data.shift", ("none", *shifts.SHIFTS)),
        ("model.name", networks.NETWORKS),
        ("model.norm", norm.NORMS),
        ("init.method", algorithms.ALGORITHMS),
        ("server.method", ("none", *server.METHODS)),
        ("aggregation.rule", robust.RULES),
        ("attack.name", ("none", *attacks.ATTACKS)),
        ("compression.name", ("none", *compression.COMPRESSORS)),
        ("meta.head", meta.HEADS),
        ("meta.gate", gating.GATES),
        ("local.optimizer", optimizers.OPTIMIZERS),
        ("local.schedule", optimizers.SCHEDULES),
        ("distill.divergence", losses.DIVERGENCES),
        ("compute.convolution", conv.LOWERINGS),
    ],
)
def test_names_come_from_the_registries(field, names):
    """What a field allows is what its registry has: nothing lists a name again."""
    group, _, name = field.partition(".")
    declared = next(
        one
        for one in schema.settings_of(type(getattr(settings.Settings(), group)))
        if one.name == name
    )
    phrase = schema.allowed_of(declared).phrase
    assert phrase.removesuffix(", or 'package.module:Class' of your own") == (
        f"one of {', '.join(names)}"
    )
    if isinstance(names, registry.Registry):
        assert names.field == field
