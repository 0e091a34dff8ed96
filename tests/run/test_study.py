"""What settings name becomes objects; a user's own parts work as the library's."""

import dataclasses
import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.run import settings, study
from mosaic_jax.run.runner import Experiment
from tests import own_parts, running, tiny

OWN, WRONG = "tests.own_parts", "tests.wrong_parts"
SOURCE = pathlib.Path(own_parts.__file__)
# Every method is short enough to run in a test that is not about its numbers.
SHORT = {
    "data__num_clients": 2,
    "init__rounds": 1,
    "warmup__rounds": 0,
    "finetune__rounds": 1,
    "evaluation__every": 1,
    "generators__steps": 2,
    "experts__local_steps": 0,
    "meta__steps": 2,
    "distill__steps": 2,
}


def tiny_study(methods=None, **changes):
    """The tiny study's settings, with fields of `methods` by group."""
    mapping = tiny.config(**changes).to_dict()
    mapping["methods"] |= methods or {}
    return settings.from_mapping(mapping)


def built(methods=None, **changes):
    return study.build(tiny_study(methods, **changes))


def fingerprints(methods=None, **changes):
    plan = built(methods, **changes).plan()
    return {link.name: fingerprint for link, fingerprint in plan}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"warmup__rounds": 2, "audit__images": 4},
            "init generators warmup experts prototypes meta distill finetune reference"
            " audit",
        ),
        (
            {"warmup__rounds": 0, "finetune__rounds": 0},
            "init generators experts prototypes meta distill",
        ),
        (
            {"warmup__rounds": 0, "compat__generators_first": True}
            | {"compat__fresh_classifier": True, "generators__inversion_weight": 0.0},
            "generators init experts prototypes meta distill finetune",
        ),
        (
            {"warmup__rounds": 2, "model__others": ("resnet18",)},
            "init init@resnet18 generators generators@resnet18 warmup warmup@resnet18"
            " experts experts@resnet18 prototypes meta distill finetune",
        ),
        ({"method": "federated", "warmup__rounds": 2}, "init warmup"),
        (
            {"method": "federated", "warmup__rounds": 0, "finetune__rounds": 2},
            "init finetune",
        ),
        (
            {"method": "federated", "warmup__rounds": 0, "server__method": "fedftg"},
            "init",
        ),
        (
            {"method": "federated", "warmup__rounds": 2, "server__method": "dense"}
            | {"server__when": "once", "finetune__rounds": 1},
            "init warmup server finetune",
        ),
        (
            {"method": "federated", "warmup__rounds": 2, "server__method": "feddf"}
            | {"server__when": "once"},
            "init generators warmup server",
        ),
    ],
)
def test_chains(changes, expected):
    found = built(**changes)
    assert [link.name for link in found.chain] == expected.split()
    assert list(found.flops) == expected.split()


def test_what_needs_an_artifact_that_nobody_provides():
    with pytest.raises(errors.ConfigError) as error:
        built(stages=(f"{OWN}:TooEarly",)).plan()
    assert str(error.value).startswith(
        "stage 'too_early' needs 'student': must be provided by a stage before it"
    )


# --- a user's own stage


def test_own_stages_stand_where_they_say():
    paths = (f"{OWN}:Halfway", f"{OWN}:AfterHalfway")
    found = built(stages=paths, warmup__rounds=0)
    names = [link.name for link in found.chain]
    assert names[-4:] == ["distill", "halfway", "after_halfway", "finetune"]
    plan = [link.name for link, _ in found.plan()]
    assert plan == names


def test_fields_of_an_own_stage_are_checked():
    with pytest.raises(errors.ConfigError) as error:
        built({"Halfway": {"weight": 2.0}}, stages=(f"{OWN}:Halfway",))
    assert str(error.value) == "methods.Halfway.weight = 2.0: must be in [0, 1]"
    with pytest.raises(errors.ConfigError, match="methods.Halfway: unknown method"):
        built({"Halfway": {"weight": 0.5}})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            f"{OWN}:NotThere",
            "stage 'lost': after = 'distil': must be a stage of the study, did you mean"
            " 'distill'?",
        ),
        (
            f"{OWN}:AfterHalfway",
            "stage 'after_halfway': after = 'halfway': must be a stage of the study,"
            " known: init, generators,",
        ),
        (f"{OWN}:NamedLikeAGroup", "name = 'local': must be one of its own"),
        (f"{OWN}:NamedLikeAnother", "stage 'reference': another stage of the study"),
        (f"{OWN}:Undecorated", "Undecorated': must be a frozen dataclass that"),
        (f"{OWN}:Doubled", "that inherits mosaic_jax.stages.base:Stage"),
        (f"{WRONG}:Nameless", "name = '': must be one of its own"),
        (f"{OWN}:Nothing", "cannot be imported: AttributeError"),
        ("no_such_module:Stage", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_wrong_own_stages_are_one_line(path, expected):
    with pytest.raises(errors.ConfigError) as error:
        built(stages=(path,), audit__images=4)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "name", "expected"),
    [
        (
            "aggregation__rule",
            "All",
            "combine must return arrays of the shapes and types of a single upload",
        ),
        (
            "compression__name",
            "Half",
            "decode fails on an upload's shapes: TypeError: ",
        ),
    ],
)
def test_own_parts_that_change_uploads_are_tried_on_their_shapes(field, name, expected):
    fields = {"method": "federated", field: f"{WRONG}:{name}"}
    fields["aggregation__attackers"] = 0
    with pytest.raises(errors.ConfigError) as error:
        built(**fields)
    told = f"{field.replace('__', '.')} = '{WRONG}:{name}': {expected}"
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_of_an_own_stage_count_from_there_on():
    stages = (f"{OWN}:Halfway", f"{OWN}:AfterHalfway")
    without = fingerprints(warmup__rounds=0)
    plain = fingerprints(stages=stages, warmup__rounds=0)
    other = fingerprints({"Halfway": {"weight": 0.1}}, stages=stages, warmup__rounds=0)
    changed = {name for name in plain if plain[name] != other[name]}
    assert changed == {"halfway", "after_halfway"}
    assert without.items() <= plain.items()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """`edited(old, new)`: the parts as a module `their_parts`, with a change."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(old="", new=""):
        text = SOURCE.read_text()
        assert old in text
        (tmp_path / "their_parts.py").write_text(text.replace(old, new))
        sys.modules.pop("their_parts", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("their_parts", None)


CODE = {
    "stages": ("Halfway", "(1 - self.weight) * one +", "(2 - self.weight) * one +"),
    "model__name": ("Patches", "nn.relu(self.first", "nn.tanh(self.first"),
    "init__method": ("Doubled", "self.factor * size", "self.factor * size + 1"),
    "server__method": ("Shrink", "self.by * leaf", "leaf / 2 * self.by"),
    "data__name": ("stripes", "0, 100", "0, 90"),
    "distill__divergence": ("square", "** 2, axis", "** 4, axis"),
}
FIRST = {
    "stages": "halfway",
    "server__method": "server",
    "distill__divergence": "distill",
}


@pytest.mark.parametrize("field", CODE)
def test_code_of_own_parts_counts_from_the_first_stage_that_sees_it(field, edited):
    name, old, new = CODE[field]
    changes = {field: f"their_parts:{name}", "generators__inversion_weight": 0.0}
    changes |= {"meta__gate_experts": 1, "warmup__rounds": 0}
    if field == "stages":
        changes[field] = (changes[field],)
    if field == "server__method":
        changes |= {"method": "federated", "server__when": "once"}
    edited()
    first = fingerprints(**changes)
    edited('"""Parts of a study', '"""Some parts of a study')
    assert fingerprints(**changes) == first
    edited(old, new)
    other = fingerprints(**changes)
    names = list(first)
    begin = names.index(FIRST.get(field, names[0]))
    assert [first[n] == other[n] for n in names[:begin]] == [True] * begin
    seen = [n for n in names[begin:] if first[n] == other[n]]
    # What follows a user's stage without needing it is not concerned.
    assert seen == (["finetune"] if field == "stages" else [])


# --- a user's own network, data, algorithm and method on the server


@pytest.mark.slow
def test_a_study_of_own_parts_runs(tmp_path):
    given = tiny_study(
        {"Doubled": {"factor": 3.0}, "Halfway": {"weight": 0.25}},
        **SHORT,
        data__name=f"{OWN}:stripes",
        distill__divergence=f"{OWN}:square",
        data__validation=0.0,
        model__name=f"{OWN}:Patches",
        init__method=f"{OWN}:Doubled",
        stages=(f"{OWN}:Halfway",),
        generators__inversion_weight=0.0,
        meta__gate_experts=1,
    )
    work = Experiment(given, tmp_path)
    assert type(work.study.algorithm).__name__ == "Doubled"
    assert work.study.algorithm.factor == 3.0
    # The network is given those of the settings that it declares.
    assert type(work.study.classifier.module).__name__ == "Patches"
    assert work.study.classifier.module.width == given.model.width
    assert work.data.info.image_shape == (16, 16, 1)
    assert work.data.info.num_classes == 4
    summary = work.run()
    assert summary.dataset == f"{OWN}:stripes"
    assert np.isfinite(summary.test_accuracy["final"])
    # The stage has its field, and stands between distillation and the last rounds.
    assert list(summary.stages)[-3:] == ["distill", "halfway", "finetune"]
    assert summary.headline["halfway"]["mean"] == 0.25
    assert summary.flops["halfway"] == 0
    running.check_templates(work)
    made = running.artifacts(work)
    jax.tree.map(
        lambda found, one, other: np.testing.assert_allclose(
            found, 0.75 * one + 0.25 * other, atol=1e-6
        ),
        made["halfway"]["halfway_model"],
        made["init"]["global_model"],
        made["distill"]["student"],
    )
    # Any factor of the weights is FedAvg, but for who says it.
    fedavg = dataclasses.replace(
        given, init=dataclasses.replace(given.init, method="fedavg"), methods={}
    )
    other = Experiment(fedavg, tmp_path / "fedavg")
    plan = {link.name: fingerprint for link, fingerprint in work.plan()}
    assert not set(plan.values()) & {fingerprint for _, fingerprint in other.plan()}


@pytest.mark.parametrize(
    "when", ["once", pytest.param("every_round", marks=pytest.mark.slow)]
)
def test_an_own_method_on_the_server_runs(when, tmp_path):
    given = tiny_study(
        {"Shrink": {"by": 0.25}},
        **SHORT | {"finetune__rounds": 0},
        method="federated",
        server__method=f"{OWN}:Shrink",
        server__when=when,
        server__rounds=2,
    )
    work = Experiment(given, tmp_path)
    work.run()
    made = running.artifacts(work)
    if when == "once":
        whole, found = made["init"]["global_model"], made["server"]["student"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a / 16, b, rtol=1e-5),
            whole.params,
            found.params,
        )
    else:
        plain = tiny_study(**SHORT | {"finetune__rounds": 0}, method="federated")
        whole = Experiment(plain, tmp_path / "plain")
        whole.run()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a / 4, b, rtol=1e-5),
            running.artifacts(whole)["init"]["global_model"].params,
            made["init"]["global_model"].params,
        )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__name": f"{OWN}:Nothing"}, "cannot be imported: AttributeError"),
        ({"init__method": "no_such:Thing"}, "init.method = 'no_such:Thing': cannot be"),
        ({"data__name": "no_such:thing"}, "data.name = 'no_such:thing': cannot be"),
        (
            {"distill__divergence": "no_such:loss"},
            "distill.divergence = 'no_such:loss'",
        ),
        ({"init__method": f"{OWN}:stripes"}, "stripes': must be a frozen dataclass"),
        ({"init__method": f"{OWN}:Halfway"}, "inherits mosaic_jax.fl.algorithms.base"),
        ({"init__method": f"{WRONG}:Undecorated"}, "must be a frozen dataclass that"),
        ({"init__method": f"{WRONG}:Bare"}, "Bare.factor: has no default: must have"),
        (
            {"method": "federated", "server__method": f"{OWN}:Doubled"},
            "inherits mosaic_jax.server.base:Server",
        ),
        ({"data__name": f"{WRONG}:NUMBER"}, "NUMBER': must be a function from a path"),
        ({"data__name": f"{OWN}:Doubled"}, "Doubled': must be a function from a path"),
        (
            {"data__name": f"{WRONG}:returns_a_dict"},
            "returns_a_dict': must return mosaic_jax.data.dataset.Arrays, not dict",
        ),
        (
            {"data__name": f"{WRONG}:finds_nothing"},
            "files must be readable: FileNotFoundError: [Errno 2]",
        ),
        (
            {"distill__divergence": f"{WRONG}:NUMBER"},
            "must be a function of two logits",
        ),
        (
            {"distill__divergence": f"{WRONG}:one_argument"},
            "that returns [B]: TypeError: one_argument() takes 1 positional argument",
        ),
        (
            {"distill__divergence": f"{WRONG}:returns_a_mean"},
            "returns_a_mean': must be a function of two logits [B, K] that returns [B]",
        ),
        ({"profile": "inti"}, "profile = 'inti': did you mean 'init'?"),
    ],
)
def test_wrong_names_are_one_line(tmp_path, changes, expected):
    with pytest.raises((errors.ConfigError, errors.DataError)) as error:
        Experiment(tiny_study(**changes), tmp_path).plan()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def refused(methods=None, **changes):
    """What a study that cannot be built says."""
    with pytest.raises((errors.ConfigError, errors.DataError)) as error:
        built(methods, **changes)
    return str(error.value)


@pytest.mark.parametrize("when", ["before", "after"])
def test_types_as_text_are_checked_too(when, edited):
    """As `from __future__ import annotations` leaves them."""
    end = 'outside of the library."""\n'
    if when == "after":
        edited(end, f"{end}\nfrom __future__ import annotations\n")
    else:
        edited()
    named = {"stages": ("their_parts:Halfway",)}
    assert refused({"Halfway": {"weight": 2.0}}, **named) == (
        "methods.Halfway.weight = 2.0: must be in [0, 1]"
    )
    assert refused({"Halfway": {"weight": "much"}}, **named) == (
        "methods.Halfway.weight = 'much': must be float, not str"
    )


# --- what parts say that they cannot be combined with


def test_every_part_is_asked():
    found = refused(
        {"PickyServer": {"least": 7}},
        method="federated",
        init__method=f"{WRONG}:PickyAlgorithm",
        server__method=f"{WRONG}:PickyServer",
        stages=(f"{WRONG}:PickyStage",),
    )
    rounds = tiny.FIELDS["init.rounds"]
    assert found.splitlines() == [
        f"init.rounds = {rounds}: must be >= 100 for this",
        f"init.rounds = {rounds}: must be >= 7 for it",
        f"init.rounds = {rounds}: must be >= 100 for PickyStage",
    ]
    once = refused(stages=(f"{WRONG}:PickyStage",), model__others=("resnet18",))
    assert once.endswith("for PickyStage") and "\n" not in once


def test_parts_of_a_network_that_cannot_be_cut():
    found = refused(init__method="heterofl", model__name=f"{OWN}:Patches")
    assert found == (
        f"model.name = '{OWN}:Patches': must have rate, scale, widths, spaces, as"
        " mosaic_jax.nn.cnn.CNN has, for init.method = 'heterofl', whose clients hold"
        " parts of it"
    )


# --- groups of fields


def test_two_parts_of_one_group():
    both = {"init__method": f"{OWN}:Doubled", "stages": (f"{WRONG}:Doubled",)}
    assert refused(**both).startswith(
        f"methods.Doubled: has the fields of {OWN}:Doubled and of {WRONG}:Doubled:"
    )
    assert refused(init__method=f"{WRONG}:Partial").startswith(
        "methods.partial: has the fields of mosaic_jax.fl.algorithms."
    )


def test_a_class_derived_from_the_librarys_has_fields_of_its_own():
    found = built(
        {"partial": {"scaler": False}, "OwnHeteroFL": {"weighting": "uniform"}},
        init__method=f"{WRONG}:OwnHeteroFL",
    ).algorithm
    assert (found.scaler, found.weighting) == (True, "uniform")


# --- networks

ANY_NETWORK = {"generators__inversion_weight": 0.0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{OWN}:stripes", "stripes': must be a flax.linen.Module with the field"),
        (f"{OWN}:Doubled", "Doubled': must be a flax.linen.Module with the field"),
        (f"{WRONG}:WithoutClasses", "must be a flax.linen.Module with the field"),
        (f"{WRONG}:WithoutHead", "must be a flax.linen.Module with the field"),
        (f"{WRONG}:WithDepth", "must be a flax.linen.Module with the field"),
        (f"{WRONG}:OneClassMore", "(2, F) and (2, 10): not (2, 2), (2, 2), (2, 1)"),
        (f"{WRONG}:FeaturesOnly", "of 2 images (16, 16, 1) must be of shapes"),
        (f"{WRONG}:WithoutMask", "unexpected keyword argument 'mask'"),
    ],
)
def test_wrong_networks(name, expected):
    found = refused(**ANY_NETWORK, model__name=name)
    assert expected in found
    assert found.startswith(f"model.name = '{name}'")
    assert "\n" not in found


def test_settings_that_an_own_network_does_not_have():
    own = ANY_NETWORK | {"model__name": f"{OWN}:Patches"}
    for field, value, default in (
        ("rate", 0.5, 1.0),
        ("dtype", "bfloat16", "float32"),
        ("norm", "group", "batch"),
    ):
        assert refused(**own, **{f"model__{field}": value}) == (
            f"model.{field} = {value!r}: must be {default!r} for the network"
            f" '{OWN}:Patches', which has no field '{field}'"
        )
    plain = own | {"model__width": 3, "compute__convolution": "patches"}
    assert built(**plain).classifier.module.width == 3


@pytest.mark.parametrize("name", [f"{OWN}:Patches", f"{WRONG}:FlaxNorm"])
def test_inversion_needs_the_librarys_batch_norm(name):
    weight = {"generators__inversion_weight": 0.5}
    assert refused(model__name=name, **weight) == (
        f"generators.inversion_weight = 0.5: must be 0 for the network '{name}', which"
        " has no batch-norm of mosaic_jax.nn.norm to match"
    )
    # Without GANs nobody asks.
    assert built(model__name=name, method="federated", **weight).networks
    assert built(model__name="tests.tiny:Net", **weight).networks


def test_only_mosaic_has_a_gate():
    assert refused(meta__gate_experts=11).startswith("meta.gate_experts = 11: must be")
    assert built(meta__gate_experts=11, method="federated").chain
