"""Components by name or import path."""

import dataclasses
import sys

import pytest

from mosaic_jax.core import errors, registry, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.robust import RULES
from mosaic_jax.fl.uploads import Rule

KINDS = Registry(
    "data.kind",
    {"tree": dict, "bush": list},
    schema.Allowed("a class without _", lambda found: "_" not in found.__name__),
)


@dataclasses.dataclass(frozen=True)
class Plant:
    """A component of this library, so to speak."""

    group = "plants"

    height: int = schema.at_least(1, default=2)


@dataclasses.dataclass(frozen=True)
class Fern(Plant):
    """A user's own, derived from it."""


class Undecorated(Plant):
    """Its fields would be no settings."""


@dataclasses.dataclass(frozen=True)
class Bare(Plant):
    """A field without a default."""

    width: int = dataclasses.field(kw_only=True)


@dataclasses.dataclass
class Thawed:
    """Not frozen."""


def test_it_is_a_mapping_of_the_librarys_own():
    assert list(KINDS) == ["tree", "bush"]
    assert KINDS["tree"] is KINDS.find("tree") is dict
    assert "mine:Tree" not in KINDS
    with pytest.raises(KeyError):
        KINDS["grass"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tre", "data.kind = 'tre': unknown, did you mean 'tree'?; or 'package.module"),
        ("", "data.kind = '': unknown, known: tree, bush; or 'package.module:Class'"),
        ("nowhere.at:All", "data.kind = 'nowhere.at:All': cannot be imported: Module"),
        ("json:Nothing", "data.kind = 'json:Nothing': cannot be imported: Attribute"),
    ],
)
def test_unknown_names(name, expected):
    with pytest.raises(errors.ConfigError) as caught:
        KINDS.find(name)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_import_paths_of_installed_modules_and_of_the_current_folder(
    tmp_path, monkeypatch
):
    assert KINDS.find("collections:OrderedDict").__name__ == "OrderedDict"
    (tmp_path / "my_own_kinds.py").write_text("class Grass: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert KINDS.find("my_own_kinds:Grass").__name__ == "Grass"


def test_groups_of_fields():
    class Named:
        group = "plants"

    assert registry.group_of("tree", Named) == "plants"
    assert registry.group_of("tree", dict) == "tree"
    assert registry.group_of("package.module:Tree", dict) == "Tree"
    # A user's class has fields of its own, whatever it is derived from.
    assert registry.group_of("fern", Fern) == "plants"
    assert registry.group_of("package.module:Fern", Fern) == "Fern"
    assert registry.group_of("package.module:Named", Named) == "plants"


def test_two_components_of_one_group():
    known = {"plants": Plant}
    registry.add(known, "package.module:Fern", Fern)
    registry.add(known, "package.module:Fern", Fern)
    assert known == {"plants": Plant, "Fern": Fern}
    with pytest.raises(errors.ConfigError) as caught:
        registry.add(known, "another:Fern", Bare)
    assert str(caught.value) == (
        f"methods.Fern: has the fields of {__name__}:Fern and of {__name__}:Bare: must"
        " be of one: rename yours, or give it `group`"
    )
    with pytest.raises(errors.ConfigError, match="methods.plants: has the fields of"):
        registry.add({"plants": Fern}, "mine:Plant", Plant)


PLANTS = Registry("garden.plant", {"plant": Plant}, registry.subclass_of(Plant))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("Fern", {"height": 0}, "methods.Fern.height = 0: must be >= 1"),
        ("Bare", {}, "Bare.width: has no default: must have one"),
        ("Undecorated", {}, "must be a frozen dataclass that inherits"),
        ("Thawed", {}, "must be a frozen dataclass that inherits"),
        ("KINDS", {}, f"must be a frozen dataclass that inherits {__name__}:Plant"),
        ("test_groups_of_fields", {}, "must be a frozen dataclass that inherits"),
    ],
)
def test_what_is_built_is_of_its_kind(name, fields, expected):
    with pytest.raises(errors.ConfigError) as caught:
        registry.build(PLANTS, f"{__name__}:{name}", {name: fields})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert registry.build(PLANTS, f"{__name__}:Fern", {"Fern": {"height": 3}}) == Fern(
        3
    )


@dataclasses.dataclass(frozen=True)
class Seedless(Rule):
    """Has no `most_attackers`."""

    def combine(self, upload, weight, attackers):
        return upload


@dataclasses.dataclass(frozen=True)
class Misspelt(Algorithm):
    def penatly(self, params, seen):
        return 0.0


@dataclasses.dataclass(frozen=True)
class Helped(Algorithm):
    """Not wrong: what it adds is called otherwise."""

    def distance(self, params):
        return 0.0

    def _logit(self):
        return 0.0


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            lambda: RULES.find(f"{__name__}:Seedless"),
            "it has no function 'most_attackers'",
        ),
        (
            lambda: ALGORITHMS.find(f"{__name__}:Misspelt"),
            "nothing calls its function 'penatly': did you mean 'penalty'? Else give it"
            " a name that begins with an underscore",
        ),
    ],
)
def test_functions_that_are_missing_or_misspelt(found, told):
    with pytest.raises(errors.ConfigError) as caught:
        found()
    assert str(caught.value).endswith(f"TypeError: {told}")
    assert ALGORITHMS.find(f"{__name__}:Helped") is Helped


def test_a_test_of_the_kind_may_raise():
    with pytest.raises(errors.ConfigError) as caught:
        KINDS.find("math:pi")
    assert str(caught.value) == (
        "data.kind = 'math:pi': must be a class without _: AttributeError: 'float'"
        " object has no attribute '__name__'"
    )


@pytest.mark.parametrize("line", ["raise SystemExit(7)", "import sys; sys.exit('no')"])
def test_a_module_that_ends_the_program(line, tmp_path, monkeypatch):
    (tmp_path / "ends_it_all.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.ConfigError, match="cannot be imported: SystemExit: "):
        KINDS.find("ends_it_all:Grass")
