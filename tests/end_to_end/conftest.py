"""What the tests of whole studies share."""

import jax
import pytest


@pytest.fixture(scope="module")
def no_key_twice():
    """jax looks at every program: it draws from no random key twice.

    Not for seeds that run together: jax counts stacking keys as drawing from them.
    """
    with jax.debug_key_reuse(True):
        yield
