"""Rates of the clients: a list, dealt out in turn."""

import pytest

from mosaic_jax.core import errors
from mosaic_jax.fl.budgets import Budgets
from tests import tiny


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((1.0, 0.5), [1, 0.5, 1, 0.5, 1]),
        ((1,), [1, 1, 1, 1, 1]),
        ((1, 1, 0.5, 0.25, 0.25, 0.125), [1, 1, 0.5, 0.25, 0.25]),
    ],
)
def test_rates_are_dealt_in_turn(rates, expected):
    found = Budgets(rates).of_clients(5)
    assert list(found) == expected
    assert all(type(rate) is float for rate in found)


@pytest.mark.parametrize("rates", [(1.0, 0.0), (), (1.5,), ("1",), (True,)])
def test_wrong_rates(rates):
    with pytest.raises(errors.ConfigError) as error:
        tiny.study(budgets__rates=rates)
    assert str(error.value) == (
        f"budgets.rates = {rates}: must be numbers in (0, 1], at least one"
    )
