"""A stage is remembered by all that it can see, and by nothing else."""

import dataclasses
import functools
import importlib
import inspect
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from mosaic_jax import server
from mosaic_jax.core import provenance, schema
from mosaic_jax.fl.attacks import ATTACKS
from mosaic_jax.fl.compression import COMPRESSORS
from mosaic_jax.nn import norm, resnet
from mosaic_jax.run import runner, settings
from mosaic_jax.stages.base import Link, Stage
from tests import golden, tiny
from tests.prepared import prepare

EVERY_ROUND = {"method": "federated", "server.method": "fedftg"}
ONCE = {"method": "federated", "server.method": "dense", "server.when": "once"}
FRESH = {"compat.fresh_classifier": True}
EPOCHS = {"generators.steps": 0, "generators.epochs": 1}
HETEROFL = {"init.method": "heterofl"}
FLIP = {"attack.name": "sign_flip"}
# An algorithm that has the fields of a group of another name.
USED_BY = {"partial": "heterofl"}
# Algorithms whose clients keep layers of their own.
OWN_LAYERS = ("fedper", "fedrep")
# Where the change of a field needs others to be set, or a value of its own:
# (the other settings, the new value).
CASES = {
    "method": ({}, "federated"),
    "compare": ({}, "fedavg,mosaic"),
    "profile": ({}, "init"),
    "model.name": ({}, "resnet18"),
    "model.others": ({}, ("resnet18",)),
    "model.rate": ({}, 0.5),
    "model.dtype": ({}, "bfloat16"),  # "auto" is float32 on a CPU
    "data.num_clients": ({}, 4),
    "data.max_images": ({}, 300),
    "data.validation": ({}, 0.5),
    "data.augmentation": ({}, "crop_flip"),
    "data.iid_share": ({"data.split": "dirichlet_mixed"}, 0.9),
    "data.classes_per_client": ({"data.split": "pathological"}, 3),
    "data.sigma": ({"data.split": "quantity"}, 0.5),
    "data.shift_strength": ({"data.shift": "rotate"}, 0.5),
    "meta.gate_experts": ({}, 5),
    "init.method": ({}, "fedprox"),
    "init.clients_per_round": ({}, 2),
    "budgets.rates": (HETEROFL, (0.5,)),
    "server.method": ({"method": "federated"}, "dense"),
    "server.when": (EVERY_ROUND, "once"),
    "server.batch_norm": (EVERY_ROUND, "train"),
    "server.rounds": (ONCE, 3),
    "server.participants": (ONCE, "latest"),
    "compat.generators_first": (FRESH, True),
    "compat.classifier_epochs": (FRESH, 2),
    "stages": ({}, ("tests.own_parts:Halfway",)),
    "generators.steps": ({}, 7),
    "generators.epochs": (EPOCHS, 2),
    "generators.max_steps": (EPOCHS | {"generators.min_steps": 0}, 5),
    "warmup.rounds": ({"warmup.rounds": 1}, 2),
    "distill.source": ({}, "validation"),
    "distill.pool": ({}, 16),
    "generators.discriminator": ({"generators.entropy_weight": 1.0}, "classifier"),
    "prototypes.gathered": (
        {"warmup.rounds": 1, "prototypes.space": "global"},
        "every_round",
    ),
    **{
        f"refine.{name}": ({"refine.steps": 2}, value)
        for name, value in (
            ("batch_size", 3),
            ("learning_rate", 0.1),
            ("entropy_weight", 0.1),
            ("distance_weight", 0.1),
        )
    },
    **{
        f"methods.{name}.layers": (
            {"init.method": name, "method": "federated", "finetune.rounds": 0},
            ("conv_1", "fc"),
        )
        for name in OWN_LAYERS
    },
    "aggregation.attackers": ({"aggregation.rule": "trimmed_mean"}, 0),
    "attack.share": (FLIP, 0.7),
    "methods.multi_krum.selected": (
        {"aggregation.rule": "multi_krum", "aggregation.attackers": 0},
        2,
    ),
    "audit.images": ({"audit.images": 4}, 8),
    "data.size": ({}, (32, 32)),
    "log.trackers": ({}, ("tensorboard",)),
    "audit.reference_steps": ({"audit.images": 4}, 3),
    "leakage.images": ({"leakage.images": 4}, 8),
    **{
        f"leakage.{name}": ({"leakage.images": 4}, new)
        for name, new in {
            "shadows": 4,
            "shadow_generators": True,
            "generated": 8,
            "canaries": 2,
            "inversion_steps": 2,
            "inversion_images": 2,
            "inversion_rate": 0.2,
            "inversion_smooth": 0.2,
        }.items()
    },
}


# A study in which these are private, and their clip follows the norms.
WHOLE_CLIENTS = {
    "method": "federated",
    "finetune.rounds": 0,
    "model.name": "mlp",
    "data.num_clients": 100,
    "data.split": "iid",
    "privacy.epsilon": 50.0,
    "privacy.unit": "client",
    "privacy.clip_quantile": 0.5,
}


def fields():
    """Every field of the settings, those of algorithms and methods one by one."""
    for name, _ in schema.leaves(tiny.study()):
        if name != "methods":
            yield name
    for group, component in settings.components().items():
        for field in schema.settings_of(component):
            yield f"methods.{group}.{field.name}"


def case(name):
    """Settings in which field `name` is at work, and another value of it."""
    if name in CASES:
        return CASES[name]
    others = {}
    if name.startswith("methods."):
        group = name.split(".")[1]
        others = {"init.method": USED_BY.get(group, group)}
        if group in ("fedproto", "fedtgp", *OWN_LAYERS):
            others |= {"method": "federated", "finetune.rounds": 0}
        for kinds in (ATTACKS, COMPRESSORS):
            if group in kinds:
                others = {kinds.field: group}
                if kinds is ATTACKS:
                    others |= {"attack.share": 0.7}  # enough to collude
        if group in server.METHODS:
            others = {"method": "federated", "server.method": group}
            others |= {"server.when": server.METHODS[group].when}
    return others, other_value(name, default(name))


def default(name):
    """The value of a field in the tiny study."""
    found = settings.defaults()
    flat = schema.flat(tiny.study())
    if name in flat:
        return flat[name]
    for part in name.split("."):
        found = found[part]
    return found


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
    owner, *path = settings.Settings, *name.split(".")
    if path[0] == "methods":
        owner = settings.components()[path[1]]
        path = path[2:]
    for part in path:
        field = {f.name: f for f in dataclasses.fields(owner)}[part]
        owner = field.type
    return schema.allowed_of(field)


def mapping(changes):
    """The tiny study's settings, nested, with `changes` by dotted name."""
    result = tiny.config().to_dict()
    for name, value in changes.items():
        *groups, last = name.split(".")
        group = result
        for one in groups:
            group = group.setdefault(one, {})
        group[last] = value
    return result


def plan(tmp_path, changes):
    study = settings.from_mapping(mapping(changes))
    work = runner.Experiment(study, tmp_path / "none")
    return [(link.name, fingerprint) for link, fingerprint in work.plan()]


PLANS = {}


def earlier_plan(tmp_path, changes):
    """That of another test with the same changes, if there was one."""
    key = json.dumps(changes, sort_keys=True)
    if key not in PLANS:
        PLANS[key] = plan(tmp_path, changes)
    return PLANS[key]


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
            writer=np.arange(400) % 3,
            city=np.arange(400) // 3 % 3,
        )
        shutil.copy(
            pathlib.Path(golden.__file__).parent / "mlp.pth", folder / f"{number}.pth"
        )
    return folder


@pytest.mark.parametrize("name", sorted(fields()))
def test_every_setting_counts_or_cannot_change_a_result(
    name, tmp_path, tmp_path_factory
):
    special = name.startswith(("data.", "privacy.")) or name == "model.start"
    others, new = ({}, None) if special else case(name)
    if name.startswith("privacy."):
        # Of a study that clients' noise, prototypes among it, is part of.
        others = {
            "privacy.epsilon": 8.0,
            "model.norm": "group",
            "generators.inversion_weight": 0.0,
            "prototypes.clusters": 1,
        }
        field = name.removeprefix("privacy.")
        new = {"epsilon": 4.0, "delta": 1e-6, "unit": "client"}.get(field, 0.5)
        if field in ("unit", "noised_by", "clip_quantile", "clip_rate"):
            others = WHOLE_CLIENTS
            new = {"noised_by": "client", "unit": "image", "clip_quantile": 0.4}.get(
                field, 0.5
            )
            if field in ("unit", "noised_by"):
                others = WHOLE_CLIENTS | {"privacy.clip_quantile": 0.0}
    if name == "data.split_file":
        folder = files_of(tmp_path_factory.getbasetemp())
        others = {"data.split": "file", name: str(folder / "0.json")}
        new = str(folder / "1.json")
    elif name in ("data.dir", "data.name"):
        folder = files_of(tmp_path_factory.getbasetemp())
        new = str(folder / "0.npz") if name == "data.dir" else "npz"
        others = {} if name == "data.dir" else {"data.dir": str(folder / "0.npz")}
    elif name == "data.column":
        folder = files_of(tmp_path_factory.getbasetemp())
        others = {"data.name": "npz", "data.dir": str(folder / "0.npz")}
        others |= {"data.split": "by_column", "data.column": "writer"}
        new = "city"
    elif name == "data.in_memory":
        prepare(tmp_path, "Alike", side=16)
        others = {"data.name": "tfds:alike", "data.dir": str(tmp_path)}
        others |= {"data.size": (16, 16), "data.validation": 0.2}
        others |= {"method": "federated", "finetune.rounds": 0}
        new = False
    elif name.startswith("data."):
        others, new = case(name)
    elif name == "model.start":
        folder = files_of(tmp_path_factory.getbasetemp())
        others = {"method": "federated", "model.name": "mlp", "model.width": 4}
        others |= {"finetune.rounds": 0, name: str(folder / "0.pth")}
        new = str(folder / "1.pth")
    before = earlier_plan(tmp_path, others)
    assert before == plan(tmp_path, others)
    changed = before != plan(tmp_path, others | {name: new})
    assert changed != schema.is_covered(name, settings.NEUTRAL)


def test_other_images_of_the_user_count(tmp_path, tmp_path_factory):
    folder = files_of(tmp_path_factory.getbasetemp())
    one, other = (
        plan(tmp_path, {"data.name": "npz", "data.dir": str(folder / f"{i}.npz")})
        for i in range(2)
    )
    assert not set(one) & set(other)


def test_neutral_settings_exist():
    known = {name for name, _ in schema.leaves(tiny.study())}
    for name in settings.NEUTRAL:
        assert any(schema.is_covered(field, {name}) for field in known), name


def test_a_view_shows_what_is_declared():
    study = tiny.study()
    view = settings.view(study, ("local", "init.rounds"))
    assert view.local == study.local
    assert view.init.rounds == study.init.rounds
    assert view.log.every_steps == study.log.every_steps
    assert view.seed == study.seed
    content = view.content()
    assert content["init.rounds"] == 4 and content["local.steps"] == 2
    assert not any(name.startswith(("init.m", "log", "distill")) for name in content)
    for read in (lambda: view.distill, lambda: view.init.method, lambda: view.method):
        with pytest.raises(schema.UndeclaredError, match="does not declare"):
            read()
    with pytest.raises(AttributeError, match="stepps"):
        _ = view.local.stepps
    with pytest.raises(schema.UndeclaredError, match="locla"):
        settings.view(study, ("locla",))


CHAINS = {
    "mosaic": {"warmup__rounds": 1, "audit__images": 4},
    "networks": {"model__others": ("resnet18",)},
    "once": {"method": "federated", "server__method": "dense", "server__when": "once"},
}


@pytest.mark.parametrize("name", CHAINS)
def test_stages_see_no_settings_but_those_they_declare(name, tmp_path):
    """What a stage has at hand is its own fields and a view; never the whole study."""
    study = runner.Experiment(tiny.study(**CHAINS[name]), tmp_path).study
    for link in study.chain:
        blueprint = study.blueprint(link)
        held = [*vars(blueprint).values(), *vars(link.stage).values()]
        assert not any(isinstance(one, settings.Settings) for one in held), link.name
        with pytest.raises(schema.UndeclaredError):
            _ = blueprint.settings.method


class Plain(Stage):
    name = "plain"

    def __init__(self, *reads):
        self.declared = reads

    def reads(self, study):
        return self.declared


def test_components_are_there_where_they_are_declared(tmp_path):
    settings_of = tiny.study(
        method="federated", server__method="fedftg", init__method="fedprox"
    )
    study = runner.Experiment(settings_of, tmp_path).study
    nothing = study.blueprint(Link(Plain()))
    with pytest.raises(schema.UndeclaredError, match=r"init\.method names a component"):
        _ = nothing.algorithm.weight
    for read in (lambda: nothing.server.train, lambda: nothing.task.classifier):
        with pytest.raises(schema.UndeclaredError, match=r"server\.method"):
            read()
    everything = study.blueprint(Link(Plain("init", "server")))
    assert everything.algorithm is study.algorithm
    assert everything.server is study.server
    assert everything.task is study.task


USERS = """
import dataclasses
import {helper}
from mosaic_jax.fl.algorithms.base import Algorithm

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


def test_the_users_code_counts(users_code, tmp_path):
    def fingerprints(**code):
        users_code(**code)
        return plan(tmp_path, {"init.method": "their_module:Mine"})

    first = fingerprints(factor=1)
    assert first == fingerprints(factor=1, docstring="Another text.")
    edited = fingerprints(factor=3)
    helped = fingerprints(factor=1, helper="3 * size")
    for other in (edited, helped):
        # All but nothing: each stage of Mosaic sees the algorithm or what it made.
        assert not set(first) & set(other)


def test_what_a_method_imports_later_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "their_lazy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text(
        "class Mine:\n    def weight(self, size):\n"
        "        from their_lazy_package import later\n"
        "        return later.scaled(size)\n"
    )

    def digest(factor):
        (package / "later.py").write_text(f"def scaled(x):\n    return {factor} * x\n")
        return provenance.file_digest.__wrapped__(found.Mine)

    found = importlib.import_module("their_lazy_package.method")
    assert digest(2) == digest(2) != digest(3)
    assert "their_lazy_package.later" not in sys.modules
    for name in ("their_lazy_package.method", "their_lazy_package"):
        del sys.modules[name]


def test_an_installed_package_counts_where_the_class_is_its_own(
    users_code, tmp_path, monkeypatch
):
    def digest(**code):
        return provenance.code_digest(users_code(**code))

    roots = (*provenance._roots(), tmp_path)
    monkeypatch.setattr(provenance, "_roots", lambda: roots)

    first = digest(factor=1)
    assert digest(factor=3) != first
    # Another installed package, as far as this one is concerned.
    assert digest(factor=1, helper="3 * size") == first


def test_a_users_package_may_have_an_empty_init(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("FACTOR = 2\n")
    text = USERS.format(factor=1, docstring="A.", helper="their_package.helper")
    text = text.replace("their_package.helper.scaled(size)", "size")
    (package / "method.py").write_text(text + "\nfrom their_package import helper\n")
    plan(tmp_path, {"init.method": "their_package.method:Mine"})
    for name in ("helper", "method"):
        del sys.modules[f"their_package.{name}"]
    del sys.modules["their_package"]


def test_what_a_component_of_the_library_is_made_of_counts(monkeypatch):
    """As `nn/norm.py` counts for every network: it is imported there."""
    digest = provenance.file_digest.__wrapped__
    before, read = digest(resnet.ResNet), inspect.getsource

    def changed(thing):
        text = read(thing)
        return f"{text}\nCHANGED = 1" if thing is norm else text

    monkeypatch.setattr(inspect, "getsource", changed)
    assert digest(resnet.ResNet) != before
