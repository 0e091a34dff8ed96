"""A stage is remembered by all that it can see, and by nothing else."""

import dataclasses
import functools
import importlib
import json
import sys

import numpy as np
import pytest

from mosaic_jax import algorithms, distillation, errors, experiment, provenance, stages
from mosaic_jax import settings as library
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.data import federated
from mosaic_jax.data.arrays import Arrays, Info
from tests import tiny

EVERY_ROUND = {"method": "federated", "server.method": "fedftg"}
ONCE = {"method": "federated", "server.method": "dense", "server.when": "once"}
FRESH = {"generators.classifier": "fresh"}
EPOCHS = {"generators.steps": 0, "generators.epochs": 1}
HETEROFL = {"init.method": "heterofl"}
# Where the change of a field needs others to be set, or a value of its own:
# (the other settings, the new value).
CASES = {
    "method": ({}, "federated"),
    "compare": ({}, "fedavg,mosaic"),
    "profile": ({}, "init"),
    "model.name": ({}, "resnet18"),
    "model.others": ({}, ("resnet18",)),
    "model.rate": ({}, 0.5),
    "data.num_clients": ({}, 4),
    "data.max_images": ({}, 300),
    "data.validation": ({}, 0.5),
    "data.augmentation": ({}, "crop_flip"),
    "meta.gate_experts": ({}, 5),
    "init.method": ({}, "fedprox"),
    "init.clients_per_round": ({}, 2),
    "budgets.rule": (HETEROFL, "formula"),
    "budgets.rates": (HETEROFL, (0.5,)),
    "budgets.shares": (HETEROFL | {"budgets.rule": "shares"}, (1.0, 0, 0, 0, 0)),
    "budgets.rho": (HETEROFL | {"budgets.rule": "formula"}, 10.0),
    "budgets.sigma": (HETEROFL | {"budgets.rule": "formula", "budgets.rho": 20.0}, 1),
    "server.method": ({"method": "federated"}, "dense"),
    "server.when": (EVERY_ROUND, "once"),
    "server.batch_norm": (EVERY_ROUND, "train"),
    "server.rounds": (ONCE, 3),
    "server.participants": (ONCE, "latest"),
    "generators.when": (FRESH, "before_init"),
    "generators.classifier": ({}, "fresh"),
    "generators.steps": ({}, 7),
    "generators.epochs": (EPOCHS, 2),
    "generators.max_steps": (EPOCHS | {"generators.min_steps": 0}, 5),
    "warmup.rounds": ({"warmup.rounds": 1}, 2),
    "distill.source": ({}, "validation"),
    "audit.images": ({"audit.images": 4}, 8),
    "audit.reference_steps": ({"audit.images": 4}, 3),
}


def fields():
    """Every field of the settings, those of algorithms and methods one by one."""
    for name, _ in provenance.leaves(tiny.study()):
        if name != "methods":
            yield name
    for group in (algorithms.ALGORITHMS, distillation.METHODS):
        for name, cls in group.items():
            for field in dataclasses.fields(cls):
                yield f"methods.{name}.{field.name}"


def case(name):
    """Settings in which field `name` is at work, and another value of it."""
    if name in CASES:
        return CASES[name]
    others = {}
    if name.startswith("methods."):
        method = name.split(".")[1]
        others = {"init.method": method}
        if method in distillation.METHODS:
            others = {"method": "federated", "server.method": method}
    old = tiny.config().to_dict()
    for part in name.split("."):
        old = old[part]
    return others, other_value(name, old)


def other_value(name, old):
    """Another value that is allowed for the field."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + 1
    if isinstance(old, float):
        return old / 2 or 0.5
    allowed = allowed_of(name).phrase
    assert allowed.startswith("one of "), f"{name}: name a case for it"
    return next(x for x in allowed[len("one of ") :].split(", ") if x != old)


def allowed_of(name):
    owner, *path = library.Settings, *name.split(".")
    if path[0] == "methods":
        owner = (algorithms.ALGORITHMS | distillation.METHODS)[path[1]]
        path = path[2:]
    for part in path:
        field = {f.name: f for f in dataclasses.fields(owner)}[part]
        owner = field.type
    return field.metadata["allowed"]


def plan(tmp_path, changes):
    config = tiny.config()
    config.update_from_flattened_dict(changes)
    study = library.from_mapping(config.to_dict())
    work = experiment.Experiment(study, tmp_path / "none")
    return [(stage.name, fingerprint) for stage, fingerprint in work.plan()]


@functools.cache
def files_of(folder):
    """Two splits over three clients, and two sets of images."""
    np_rng = np.random.RandomState(0)
    for number in range(2):
        parts = np.array_split(np_rng.permutation(120), 3)
        content = {"clients": [part.tolist() for part in parts]}
        (folder / f"{number}.json").write_text(json.dumps(content))
        np.savez(
            folder / f"{number}.npz",
            x_train=np_rng.randint(0, 256, (400, 16, 16)).astype(np.uint8),
            y_train=np.arange(400) % 10,
        )
    return folder


@pytest.mark.parametrize("name", sorted(fields()))
def test_every_setting_counts_or_cannot_change_a_result(
    name, tmp_path, tmp_path_factory
):
    others, new = ({}, None) if name.startswith("data.") else case(name)
    if name == "data.split_file":
        folder = files_of(tmp_path_factory.getbasetemp())
        others = {"data.split": "file", name: str(folder / "0.json")}
        new = str(folder / "1.json")
    elif name in ("data.dir", "data.name"):
        folder = files_of(tmp_path_factory.getbasetemp())
        new = str(folder / "0.npz") if name == "data.dir" else "npz"
        others = {} if name == "data.dir" else {"data.dir": str(folder / "0.npz")}
    elif name.startswith("data."):
        others, new = case(name)
    before = plan(tmp_path, others)
    assert before == plan(tmp_path, others)
    changed = before != plan(tmp_path, others | {name: new})
    assert changed != provenance.is_covered(name, provenance.NEUTRAL)


def test_other_images_of_the_user_count(tmp_path, tmp_path_factory):
    folder = files_of(tmp_path_factory.getbasetemp())
    one, other = (
        plan(tmp_path, {"data.name": "npz", "data.dir": str(folder / f"{i}.npz")})
        for i in range(2)
    )
    assert not set(one) & set(other)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("kind", ["image", "label"])
def test_every_image_and_label_counts(part, kind):
    # Half of the images for training are held out for validation.
    config = dataclasses.replace(
        tiny.study().data, split="iid", num_clients=2, validation=0.5
    )
    info = Info(2, 16, 1, (0.5,), (0.5,), "none")
    arrays = {
        f"{part}_{kind}": np.zeros((8, 16, 16, 1) if kind == "image" else 8, np.uint8)
        for part in ("train", "test")
        for kind in ("image", "label")
    }

    def content():
        return federated.build(config, 0, info, Arrays(**arrays)).content_sha256

    seen = {content()}
    for row in range(8):
        changed = arrays[f"{part}_{kind}"].copy()
        changed[row] += 1
        arrays[f"{part}_{kind}"] = changed
        seen.add(content())
    assert len(seen) == 9


def test_neutral_settings_exist():
    known = {name for name, _ in provenance.leaves(tiny.study())}
    for name in provenance.NEUTRAL:
        assert any(provenance.is_covered(field, {name}) for field in known), name


def test_a_view_shows_what_is_declared():
    study = tiny.study()
    view = provenance.view(study, ("local", "init.rounds"))
    assert view.local == study.local
    assert view.init.rounds == study.init.rounds
    assert view.log.every_steps == study.log.every_steps
    assert view.seed == study.seed
    content = view.content()
    assert content["init.rounds"] == 4 and content["local.steps"] == 2
    assert not any(name.startswith(("init.m", "log", "distill")) for name in content)
    for read in (lambda: view.distill, lambda: view.init.method, lambda: view.method):
        with pytest.raises(provenance.UndeclaredError, match="does not declare"):
            read()
    with pytest.raises(AttributeError, match="stepps"):
        _ = view.local.stepps
    with pytest.raises(provenance.UndeclaredError, match="locla"):
        provenance.view(study, ("locla",))


def test_stages_hold_no_settings_but_their_view():
    """What a stage's function has bound or closed over is not the whole study."""

    def held(function):
        if isinstance(function, functools.partial):
            yield from function.args
            yield from function.keywords.values()
            yield from held(function.func)
        for cell in function.__closure__ or () if hasattr(function, "__code__") else ():
            yield cell.cell_contents
            if callable(cell.cell_contents):
                yield from held(cell.cell_contents)
            if isinstance(cell.cell_contents, stages.Stage):
                yield from held(cell.cell_contents.run)

    for changes in ({}, {"model__others": ("resnet18",)}, {"audit__images": 4}):
        for stage in stages.pipeline(tiny.study(warmup__rounds=1, **changes)):
            for value in held(stage.run):
                assert not dataclasses.is_dataclass(value) or isinstance(
                    value, stages.Stage
                ), stage.name


def test_components_are_there_where_they_are_declared():
    stage = stages.Stage("x", (), (), ("init.method",), run=None)
    algorithm = algorithms.FedAvg()
    assert stage.given("init.method", algorithm) is algorithm
    with pytest.raises(provenance.UndeclaredError, match=r"server\.method"):
        _ = stage.given("server.method", algorithm).train


USERS = """
import dataclasses
import {helper}
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.data import federated
from mosaic_jax.data.arrays import Arrays, Info

@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    '''{docstring}'''
    def weight(self, size):
        return {helper}.scaled(size) * {factor}  # {docstring}
"""


@pytest.fixture
def users_code(tmp_path, monkeypatch):
    """`write(factor, ...)` puts the user's module on disk; returns its class."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(factor, helper="2 * size", docstring="A."):
        (tmp_path / "their_helper.py").write_text(
            f"def scaled(size):\n    return {helper}\n"
        )
        (tmp_path / "their_module.py").write_text(
            USERS.format(factor=factor, docstring=docstring, helper="their_helper")
        )
        for name in ("their_helper", "their_module"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("their_module").Mine

    yield write
    for name in ("their_helper", "their_module"):
        sys.modules.pop(name, None)


def test_the_users_code_counts(users_code, tmp_path, monkeypatch):
    def fingerprints(**code):
        monkeypatch.setitem(algorithms.ALGORITHMS, "mine", users_code(**code))
        return plan(tmp_path, {"init.method": "mine"})

    first = fingerprints(factor=1)
    assert first == fingerprints(factor=1, docstring="Another text.")
    edited = fingerprints(factor=3)
    helped = fingerprints(factor=1, helper="3 * size")
    for other in (edited, helped):
        # All but nothing: each stage of Mosaic sees the algorithm or what it made.
        assert not set(first) & set(other)


def test_an_installed_package_counts_where_the_class_is_its_own(
    users_code, tmp_path, monkeypatch
):
    def digest(**code):
        cls = users_code(**code)
        found = provenance.sysconfig.get_path
        with monkeypatch.context() as patch:
            patch.setattr(
                provenance.sysconfig,
                "get_path",
                lambda name: str(tmp_path) if name == "purelib" else found(name),
            )
            return provenance.code_digest(cls)

    first = digest(factor=1)
    assert digest(factor=3) != first
    # Another installed package, as far as this one is concerned.
    assert digest(factor=1, helper="3 * size") == first


def test_code_that_cannot_be_read_is_told():
    namespace = {"Algorithm": Algorithm, "__name__": "made_up"}
    exec("class Mine(Algorithm):\n    pass", namespace)
    sys.modules["made_up"] = type(sys)("made_up")
    try:
        with pytest.raises(errors.ConfigError, match="Mine: has no source file"):
            provenance.code_digest(namespace["Mine"])
    finally:
        del sys.modules["made_up"]
