"""Fields of components: defaults, checks, and what a stage may see of them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import pytest

from mosaic_jax.core import errors, schema

NAMES = ["tree"]


@dataclasses.dataclass(frozen=True)
class Inner(schema.Group):
    """A group within another."""

    rate: float = schema.between(0, 1, default=0.5, meaning="a share")
    seed: int = schema.at_least(0, default=3)


@dataclasses.dataclass(frozen=True)
class Outer(schema.Group):
    """Fields of every kind."""

    steps: int = schema.above(0, default=10)
    decay: float = schema.below_one(default=0.0)
    kind: str = schema.one_of(("a", "b"), default="a")
    name: str = schema.component(NAMES, default="tree")
    flag: bool = schema.anything(default=True)
    sizes: tuple = schema.field((1, 2), "not empty", len, "of layers")
    plain: int = 7
    more: dict = dataclasses.field(default_factory=dict)
    maybe: int | None = schema.field(
        None, ">= 1 or None", lambda x: x is None or x >= 1, "a union"
    )
    bound: float | None = schema.above(0, default=1.0)
    text: Literal["up", "down"] = "up"
    rates: Sequence[float] = ()
    later: "float" = schema.above(0, default=1.0)
    inner: "Inner" = dataclasses.field(default_factory=Inner)


def message(**fields):
    with pytest.raises(errors.ConfigError) as caught:
        schema.check(Outer, fields, "outer")
    return str(caught.value)


def test_fields_left_out_have_their_defaults():
    assert schema.check(Outer, {}) == Outer()
    found = schema.check(Outer, {"steps": 4, "inner": {"seed": 5}})
    assert found == Outer(steps=4, inner=Inner(seed=5))
    assert schema.check(Outer, schema.to_mapping(found)) == found
    assert schema.defaults(Outer) == schema.to_mapping(Outer())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"steps": 0}, "outer.steps = 0: must be > 0"),
        ({"steps": "ten"}, "outer.steps = 'ten': must be int, not str"),
        ({"steps": True}, "outer.steps = True: must be int, not bool"),
        ({"steps": 2**31}, f"outer.steps = {2**31}: must be in [-{2**31 - 1}, "),
        ({"decay": 1.0}, "outer.decay = 1.0: must be in [0, 1)"),
        ({"decay": float("nan")}, "outer.decay = nan: must be finite"),
        ({"kind": "c"}, "outer.kind = 'c': must be one of a, b"),
        ({"name": "bush"}, "outer.name = 'bush': must be one of tree, or 'package."),
        ({"flag": 1}, "outer.flag = 1: must be bool, not int"),
        ({"sizes": ()}, "outer.sizes = (): must be not empty"),
        ({"stesp": 1}, "outer.stesp: unknown field, did you mean 'steps'?"),
        ({"zzz": 1}, "outer.zzz: unknown field, known: steps, decay, kind, name,"),
        ({"maybe": 0}, "outer.maybe = 0: must be >= 1 or None"),
        ({"maybe": "x"}, "outer.maybe = 'x': must be int or None, not str"),
        ({"maybe": True}, "outer.maybe = True: must be int or None, not bool"),
        ({"maybe": 1.5}, "outer.maybe = 1.5: must be int or None, not float"),
        ({"bound": None}, "outer.bound = None: must be > 0"),
        ({"bound": float("inf")}, "outer.bound = inf: must be finite"),
        ({"text": "left"}, "outer.text = 'left': must be typing.Literal['up', 'down']"),
        ({"rates": 3}, "outer.rates = 3: must be collections.abc.Sequence[float], not"),
        ({"later": 0}, "outer.later = 0.0: must be > 0"),
        ({"later": "x"}, "outer.later = 'x': must be float, not str"),
        ({"inner": 3}, "outer.inner = 3: must be a group of fields"),
        ({"inner": {"rate": 2.0}}, "outer.inner.rate = 2.0: must be in [0, 1]"),
        ({"inner": {"seed": -1}}, "outer.inner.seed = -1: must be >= 0"),
    ],
)
def test_problems_name_field_value_and_what_is_allowed(fields, expected):
    found = message(**fields)
    assert found.startswith(expected)
    assert "\n" not in found


def test_all_problems_come_at_once():
    found = message(steps=0, kind="c", inner={"rate": -1.0, "sed": 1})
    assert len(found.splitlines()) == 4


def test_whole_numbers_are_floats_too():
    found = schema.check(Outer, {"decay": 0, "bound": 2, "later": 3, "maybe": 4})
    given = [found.decay, found.bound, found.later, found.maybe]
    assert given == [0.0, 2.0, 3.0, 4]
    assert list(map(type, given)) == [float, float, float, int]


def test_other_types():
    found = schema.check(Outer, {"maybe": None, "text": "down", "rates": [0.5]})
    assert (found.maybe, found.text, found.rates) == (None, "down", [0.5])


def test_a_type_that_is_not_there_when_the_study_runs():
    @dataclasses.dataclass(frozen=True)
    class Early:
        steps: "Missing" = 3  # noqa: F821

    with pytest.raises(errors.ConfigError) as caught:
        schema.check(Early, {})
    assert "Early: NameError: name 'Missing' is not defined: types" in str(caught.value)


def test_names_may_be_added_later_and_import_paths_are_taken():
    NAMES.append("bush")
    try:
        assert schema.check(Outer, {"name": "bush"}).name == "bush"
    finally:
        NAMES.remove("bush")
    assert schema.check(Outer, {"name": "mine:Tree"}).name == "mine:Tree"


def test_a_field_without_a_default_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Bare:
        steps: int

    for function in (schema.defaults, lambda one: schema.check(one, {"steps": 1})):
        with pytest.raises(errors.ConfigError, match="Bare.steps: has no default"):
            function(Bare)


def test_a_class_that_is_not_decorated_itself_is_refused():
    class Derived(Outer):
        pass

    for found in (Derived, dict, 3):
        assert not schema.is_component(found)
        with pytest.raises(errors.ConfigError, match="must be a frozen dataclass"):
            schema.check(found, {})


def test_leaves_are_dotted_names():
    names = [name for name, _ in schema.leaves(Outer())]
    assert names[-3:] == ["later", "inner.rate", "inner.seed"]
    assert dict(schema.leaves(Outer()))["inner.rate"] == 0.5


def test_a_view_shows_what_was_declared():
    view = schema.View(Outer(), ["steps", "inner.rate"], neutral=["flag"])
    assert (view.steps, view.inner.rate, view.flag) == (10, 0.5, True)
    assert view.content() == {"steps": 10, "inner.rate": 0.5}
    for read in (lambda: view.kind, lambda: view.inner.seed):
        with pytest.raises(schema.UndeclaredError, match="does not declare it"):
            read()
    with pytest.raises(AttributeError):
        view.nothing  # noqa: B018
    whole = schema.View(Outer(), ["inner"], neutral=["inner.seed"])
    assert whole.inner == Inner()
    assert whole.content() == {"inner.rate": 0.5}


def test_digests_go_by_content():
    assert schema.digest({"a": 1, "b": [2]}) == schema.digest({"b": [2], "a": 1})
    assert schema.digest({"a": 1}) != schema.digest({"a": 2})
