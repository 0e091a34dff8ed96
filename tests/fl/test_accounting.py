"""The noise of private studies, against the accountant's own answers and exact ones."""

import fractions
import functools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import optimize, stats

from mosaic_jax.core import errors
from mosaic_jax.fl import accounting, privacy
from mosaic_jax.fl.accounting import Release

DELTA = 1e-5
# For which the accountant has formulas: those between them it often fails to find.
ORDERS = (*range(2, 200), 256, 512)
# Epsilon, and (chance, count) of what a client does: steps of rounds, steps of a GAN of
# another batch size, and what it sends once.
SETTINGS = [
    (3.0, ((1.0, 1),)),
    (1.0, ((0.5, 100), (1.0, 1))),
    (8.0, ((0.25, 20), (1.0, 2))),
    (8.0, ((1.0, 500),)),
    (0.5, ((1.0, 20),)),
    (1.0, ((1.0, 50),)),
    (2.0, ((0.1, 100),)),
    (4.0, ((0.1, 100), (0.2, 50))),
    (8.0, ((0.1, 100), (0.2, 50), (1.0, 2))),
    (16.0, ((0.3, 200), (1.0, 2))),
    (1.0, ((0.3, 20), (1.0, 2))),
    (2.0, ((0.064, 1000), (0.128, 500), (1.0, 2))),
    (8.0, ((0.064, 5000), (1.0, 2))),
    (8.0, ((0.01, 2000), (1.0, 2))),
    (1.0, ((0.01, 2000), (1.0, 1))),
    (1.0, ((0.003, 500),)),
    (3.0, ((0.02, 400), (0.05, 2000))),
    (8.0, ((0.256, 400), (0.256, 500), (1.0, 2))),
    (0.25, ((0.05, 300), (1.0, 2))),
    (20.0, ((0.7, 60), (1.0, 1))),
    # Many steps, whose losses are far below epsilon; and losses far above one.
    (0.5, ((0.01, 20000),)),
    (1.0, ((0.01, 20000),)),
    (0.05, ((0.25, 460), (1.0, 2))),
    (1.0, ((0.001, 100000),)),
    (100.0, ((0.3, 10), (1.0, 2))),
    (100.0, ((1.0, 1),)),
    (100.0, ((0.01, 2000), (1.0, 2))),
]


def event(noise, uses):
    gaussian = dp_accounting.GaussianDpEvent(noise)
    parts = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(share, gaussian), count
        )
        for share, count in uses
    ]
    return dp_accounting.ComposedDpEvent(parts)


def theirs(epsilon, uses, accountant, guess):
    """The noise multiplier by the accountant's own calibration."""
    return dp_accounting.calibrate_dp_mechanism(
        accountant,
        lambda noise: event(noise, uses),
        epsilon,
        DELTA,
        bracket_interval=dp_accounting.ExplicitBracketInterval(guess / 2, 2 * guess),
        tol=1e-3 * guess,
    )


@pytest.mark.parametrize(
    ("epsilon", "uses"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] * (i > 1))
        for i, one in enumerate(SETTINGS)
    ],
)
def test_noise_is_what_dp_accounting_finds(epsilon, uses):
    found = accounting.noise_multiplier(epsilon, DELTA, uses)
    finer = accounting._interval(found, uses) / 5
    wanted = theirs(
        epsilon,
        uses,
        functools.partial(pld.PLDAccountant, value_discretization_interval=finer),
        found,
    )
    assert found == pytest.approx(wanted, rel=1e-2)
    # Renyi divergences never ask for less.
    assert (
        found <= theirs(epsilon, uses, lambda: rdp.RdpAccountant(ORDERS), found) * 1.002
    )
    assert accounting.spent(found, DELTA, uses) <= epsilon
    assert accounting.spent(0.99 * found, DELTA, uses) > epsilon


@pytest.mark.parametrize(
    ("noise", "count"),
    [(1.0, 1), (0.7, 3), (12.0, 100), (0.1, 1), (1.0, 200), (1e4, 100)],
)
def test_a_plain_gaussian_costs_what_its_formula_says(noise, count):
    """Balle and Wang (2018), theorem 8."""
    away = math.sqrt(count) / noise

    def gap(epsilon):
        over = stats.norm.cdf(away / 2 - epsilon / away)
        under = stats.norm.logcdf(-away / 2 - epsilon / away)
        return over - math.exp(epsilon + under)

    wanted = optimize.brentq(lambda epsilon: gap(epsilon) - DELTA, 0, 500, xtol=1e-9)
    found = accounting.spent(noise, DELTA, ((1.0, count),))
    assert found == pytest.approx(wanted, rel=1e-3)


def tail(number, share, rows):
    """Exact probability of more than `rows` of `number`, each with chance `share`."""
    share = fractions.Fraction(share)
    return 1 - sum(
        math.comb(number, k) * share**k * (1 - share) ** (number - k)
        for k in range(min(rows, number) + 1)
    )


@pytest.mark.parametrize(("size", "batch_size"), [(40, 8), (300, 16), (9, 8), (64, 64)])
def test_batches_have_the_rows_that_the_exact_tail_asks_for(size, batch_size):
    bound = 1e-20
    rows = accounting.rows_for(size, batch_size, math.log(bound))
    share = accounting.chance(size, batch_size)
    assert tail(size + 1, share, rows) <= bound
    assert tail(size + 1, share, rows - 8) > bound


def test_no_image_is_drawn_more_often_than_the_accountant_counts():
    for size in (1, 7, 9, 63, 64, 65, 100, 1001, 12345, 60000):
        for batch_size in (1, 8, 64, 250):
            share = privacy.rate(np.asarray(size), batch_size)
            assert share.dtype == np.float32
            # Uniform draws k / DRAWS below `share`.
            drawn = math.ceil(fractions.Fraction(float(share)) * privacy.DRAWS)
            counted = fractions.Fraction(accounting.chance(size, batch_size))
            assert fractions.Fraction(drawn, privacy.DRAWS) <= counted
            assert counted <= 1
            exact = min(1, fractions.Fraction(batch_size, size))
            assert exact <= counted <= exact + fractions.Fraction(3, privacy.DRAWS)


def test_a_plan_composes_what_each_client_sends():
    sizes = np.array([16, 40, 200])
    releases = [
        Release("models", np.array([20, 20, 20]), 16),
        Release("models", np.array([10, 10, 10]), 16),
        Release("generators", np.array([30, 30, 0]), 8),
        Release("label_counts", np.array([1, 1, 0])),
    ]
    config = privacy.Privacy(epsilon=4.0, delta=1e-4, clip=2.0, prototype_clip=3.0)
    plan = accounting.plan(config, sizes, releases)
    assert (plan.mechanism.clip, plan.mechanism.prototype_clip) == (2.0, 3.0)
    assert list(dict(plan.mechanism.rows)) == [8, 16]
    assert max(plan.epsilon) <= 4.0 and min(plan.epsilon) > 3.95
    # Smaller clients need more noise.
    assert plan.noise[0] > plan.noise[1] > plan.noise[2] > 0
    delta = config.delta * (1 - accounting.OVERFLOW_SHARE)
    for i, size in enumerate(sizes):
        wide = (accounting.chance(int(size), 16), 30)
        narrow = (accounting.chance(int(size), 8), int(releases[2].count[i]))
        once = (1.0, int(releases[3].count[i]))
        uses = [one for one in (wide, narrow, once) if one[1]]
        accountant = rdp.RdpAccountant(ORDERS)
        accountant.compose(event(plan.noise[i], uses))
        assert plan.epsilon[i] <= accountant.get_epsilon(delta)
        of_models = accounting.spent(plan.noise[i], delta, (wide,))
        assert plan.by_payload["models"][i] == pytest.approx(of_models)
        parts = [plan.by_payload[name][i] for name in plan.by_payload]
        assert max(parts) <= plan.epsilon[i] < sum(parts) or sum(map(bool, parts)) == 1
    assert plan.by_payload["generators"][2] == plan.by_payload["label_counts"][2] == 0
    # What full batches leave out is paid for, in both directions.
    over = sum(
        30 * float(tail(int(sizes[0]) + 1, accounting.chance(16, b), rows))
        for b, rows in plan.mechanism.rows
    )
    assert over * (1 + math.exp(4.0)) <= accounting.OVERFLOW_SHARE * config.delta


def test_a_client_that_tells_nothing_needs_no_noise():
    none = Release("models", np.array([0, 5]), 8)
    plan = accounting.plan(privacy.Privacy(epsilon=1.0), np.array([20, 20]), [none])
    assert plan.noise[0] == plan.epsilon[0] == 0 < plan.noise[1]


def test_no_noise_is_enough_for_a_delta_that_no_accountant_can_tell():
    """Neither of images nor of clients, drawn or not."""
    told = r"privacy.epsilon = 1.0, privacy.delta = 1e-300: .* no noise is enough"
    images = Release("models", np.array([5, 5]), 8)
    config = privacy.Privacy(epsilon=1.0, delta=1e-300)
    with pytest.raises(errors.ConfigError, match=told):
        accounting.plan(config, np.array([20, 20]), [images])
    for participants in (5, 20):
        with pytest.raises(errors.ConfigError, match=told):
            accounting.plan_of_clients(
                config, num_clients=20, participants=participants, rounds=3
            )


def test_the_draw_is_left_out_where_its_bound_tells_nothing(monkeypatch):
    config = privacy.Privacy(epsilon=1.0, unit="client")
    monkeypatch.setattr(accounting, "spent_of_drawn", lambda *_, **__: math.inf)
    plan = accounting.plan_of_clients(config, num_clients=20, participants=5, rounds=3)
    without = accounting.noise_multiplier(1.0, config.delta, ((1.0, 3),))
    assert plan.of_clients.noise == 2 * without
    assert plan.epsilon[0] == accounting.spent(without, config.delta, ((1.0, 3),))


def test_chance_alone_may_be_enough():
    """Of an image that is hardly ever drawn delta covers all that is told."""
    assert accounting.noise_multiplier(1.0, 1e-2, ((1e-3, 2),)) < accounting._LEAST


def test_delta_must_be_less_than_one_in_the_images():
    config = privacy.Privacy(epsilon=1.0, delta=0.01)
    with pytest.raises(errors.ConfigError, match=r"privacy.delta = 0.01: .* < 1 / 100"):
        accounting.plan(config, np.array([10, 100]), [])


def test_the_accountant_must_be_there(monkeypatch):
    accounting._accountants.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(errors.ConfigError, match="needs the package dp-accounting"):
        accounting.plan(privacy.Privacy(epsilon=1.0), np.array([10]), [])
    accounting._accountants.cache_clear()
