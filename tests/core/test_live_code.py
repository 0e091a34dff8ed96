"""Code of notebooks and scripts: every change of it is noticed, and nothing else."""

import importlib
import re
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, provenance

CELLS = """
import dataclasses, functools, math
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from mosaic_jax.fl.algorithms.base import Algorithm

FACTOR = 2.0
TABLE = np.arange(3)

def inner(size):
    return size * FACTOR + math.pi

@jax.jit
def helper(size):
    return inner(size) + jnp.sum(TABLE)

class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width)(x))

class Net(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.classes)(Block()(x))

@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    mu: float = 0.5

    def weight(self, size):
        known = {"a", "b", "c", "d"}
        return [helper(size) * self.mu for name in "abc" if name in known]

    @functools.cached_property
    def twice(self):
        return lambda: 2 * self.mu

UNUSED = 1
"""


def described(*changes):
    """Of the algorithm and an instance of the network, after changes of the cells."""
    cells = CELLS
    for old, new in changes:
        assert old in cells
        cells = cells.replace(old, new)
    notebook = types.ModuleType("notebook_of_a_user")
    exec(cells, vars(notebook))
    return provenance.code_digest(notebook.Mine), provenance.description(notebook.Net())


# What changes: (a change of the cells, of the algorithm, of the network).
CHANGES = {
    "nothing": (("UNUSED = 1", "UNUSED = 2"), False, False),
    "layout": (("TABLE = ", "\n\n# as it were\nTABLE = "), False, False),
    "a constant": (("FACTOR = 2.0", "FACTOR = 2.5"), True, False),
    "an array": (("np.arange(3)", "np.arange(4)"), True, False),
    "a function two calls away": (("math.pi", "math.e"), True, False),
    "a default": (("mu: float = 0.5", "mu: float = 0.6"), True, False),
    "a hook": (('in "abc"', 'in "abd"'), True, False),
    "a function in a function": (("2 * self.mu", "3 * self.mu"), True, False),
    "a layer of another cell": (("nn.relu", "nn.gelu"), False, True),
    "a layer's default": (("width: int = 4", "width: int = 5"), False, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_noticed(change):
    edit, *expected = CHANGES[change]
    before, after = described(), described(edit)
    assert [a != b for a, b in zip(before, after, strict=True)] == expected


def test_fields_of_an_instance_count():
    def of(value):
        return provenance.description(value)

    assert of(nn.Dense(3)) == of(nn.Dense(3)) != of(nn.Dense(4))
    assert of(optax.sgd(0.1)) == of(optax.sgd(0.1)) != of(optax.sgd(0.2))
    assert of(jax.jit(np.sin)) != of(jax.jit(np.cos))


def test_what_a_function_encloses_counts():
    def make(factor):
        return lambda size: size * factor

    assert provenance.code_digest(make(1)) == provenance.code_digest(make(1))
    assert provenance.code_digest(make(1)) != provenance.code_digest(make(2))


def test_what_cannot_be_described_is_told():
    np_rng = np.random.RandomState(0)
    told = "what weight encloses: is a numpy.random.mtrand.RandomState, whose changes"

    def weight(size):
        return size * np_rng.rand()

    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        provenance.code_digest(weight)


ROUNDED = """
import jax

@jax.custom_vjp
def rounded(x):
    return x.round()

def forward(x):
    return rounded(x), None

def backward(_, slope):
    return (slope * 2,)

rounded.defvjp(forward, backward)

def users(x):
    from their_helper import mix

    return mix(rounded(x))
"""


def test_gradients_of_ones_own_count():
    def of(text):
        notebook = types.ModuleType("notebook_of_a_user")
        exec(text, vars(notebook))
        return provenance.description(notebook.rounded)

    assert of(ROUNDED) == of(ROUNDED) != of(ROUNDED.replace("* 2", "* 3"))


def test_what_a_function_imports_counts(tmp_path, monkeypatch):
    """Whether or not something has imported it already."""
    monkeypatch.syspath_prepend(tmp_path)

    def of(factor):
        text = f"def mix(x):\n    return x * {factor}\n\n\nprint(1 / 0)\n"
        (tmp_path / "their_helper.py").write_text(text)
        importlib.invalidate_caches()
        notebook = types.ModuleType("notebook_of_a_user")
        exec(ROUNDED, vars(notebook))
        return provenance.description(notebook.users)

    assert of(2) == of(2) != of(3)
    assert "their_helper" not in sys.modules


DECORATOR = """
import functools

def scaled(factor):
    def decorate(function):
        @functools.wraps(function)
        def inner(x):
            return factor * function(x)

        return inner

    return decorate
"""


def test_how_a_function_is_wrapped_counts(tmp_path, monkeypatch):
    def of(value):
        return provenance.description(value)

    def weight(size):
        return size

    def scaled(factor, text=DECORATOR):
        (tmp_path / "their_decorator.py").write_text(text)
        sys.modules.pop("their_decorator", None)
        importlib.invalidate_caches()
        return importlib.import_module("their_decorator").scaled(factor)(weight)

    assert of(jax.vmap(weight)) == of(jax.vmap(weight))
    assert of(jax.vmap(weight)) != of(jax.vmap(weight, in_axes=1))
    assert of(jax.grad(weight)) != of(weight)
    # What packages keep for themselves is no reason to refuse a function.
    named = jax.named_scope("a")(weight)
    assert of(named) == of(jax.named_scope("a")(weight)) != of(weight)
    monkeypatch.syspath_prepend(tmp_path)
    first = of(scaled(2.0))
    assert first == of(scaled(2.0)) != of(scaled(3.0))
    assert first != of(scaled(2.0, DECORATOR.replace("factor *", "factor +")))
    del sys.modules["their_decorator"]


@pytest.mark.parametrize(
    "value", [np.array(["a", None], object), jax.random.key(0)], ids=["objects", "key"]
)
def test_arrays_without_bytes_of_their_own_are_refused(value):
    told = f"is a {type(value).__module__}.{type(value).__qualname__}, whose changes"
    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        provenance.description(value)


def test_names_of_arguments_count():
    def of(text):
        found = {}
        exec(text, found)
        return provenance.description(found["weight"])

    assert of("def weight(*, a, b): return a") != of("def weight(*, c, b): return c")
