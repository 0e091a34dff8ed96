"""Membership inference: what an attacker's scores tell of who was trained on.

A score is higher the more likely an image was trained on. Rates at few false positives
say more than the area under the curve, which hides whether anyone is found for sure
(Carlini et al., S&P 2022). Where coins decided what was trained on, right guesses of
them bound epsilon from below (Steinke et al., NeurIPS 2023).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mosaic_jax.core.types import Array

# Of intervals and bounds.
CONFIDENCE = 0.95
# Shares of the coins that an attacker guesses, the surest ones; the best bound counts.
SHARES = (0.125, 0.25, 0.5, 1.0)
# No bound is searched for beyond.
_MOST = 100.0


def confidence(logits: Array, label: Array) -> jax.Array:
    """How sure a model is of labels, log(p / (1 - p)) of their probability p.

    Nearly normal over models (Carlini et al., 2022), and no worse where p is near 1.

    Args:
      logits: [N, K].
      label: [N] int.

    Returns:
      [N] float32.
    """
    own = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
    return jnp.sum(jnp.where(own, logits, 0), axis=-1) - others


def halves(np_rng: np.random.RandomState, shadows: int, count: int) -> np.ndarray:
    """Which of `count` images each shadow trains on, [shadows, count] bool.

    A random half each; shadows go in pairs of a half and the rest, so that every image
    is in as many as it is not.

    Args:
      np_rng: draws the halves.
      shadows: how many there are, even.
      count: of images.
    """
    order = np.stack([np_rng.permutation(count) for _ in range(shadows // 2)])
    inside = order < (count + 1) // 2
    return np.concatenate([inside, ~inside])


def likelihood_ratio(
    score: np.ndarray, shadow: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Log of how much likelier scores are of trained images than of others (LiRA).

    Scores of an image are normal over models, with means of its own and, as shadows are
    few, deviations that all images share.

    Args:
      score: [N] of the attacked model.
      shadow: [S, N] of the shadows.
      inside: [S, N] bool, what each shadow was trained on: of every image some were and
        some were not.

    Returns:
      [N].
    """
    found = []
    for of in (inside, ~inside):
        mean = np.sum(np.where(of, shadow, 0), axis=0) / of.sum(axis=0)
        # With so many means taken from the same numbers.
        freedom = max(1, of.sum() - of.shape[1])
        variance = np.sum(np.where(of, (shadow - mean) ** 2, 0)) / freedom
        variance = max(variance, 1e-12)
        found.append(-((score - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return found[0] - found[1]


def true_positives(
    member: np.ndarray, other: np.ndarray, level: float
) -> dict[str, float] | None:
    """Share of members found with a share of at most `level` of the others.

    The interval is for a new sample of members at this threshold.

    Args:
      member: [m] scores of members.
      other: [n] scores of others.
      level: in (0, 1).

    Returns:
      {"value", "low", "high"}, in [0, 1]; None: there are no members, or fewer than 1 /
      `level` others, by which such a rate cannot be told.
    """
    allowed = math.floor(level * len(other) + 1e-9)
    if not allowed or not len(member):
        return None
    threshold = np.sort(other)[-1 - allowed]
    hits = int(np.sum(member > threshold))
    low, high = interval(hits, len(member))
    return {"value": hits / len(member), "low": low, "high": high}


def interval(hits: int, count: int) -> tuple[float, float]:
    """The interval of a share by Clopper and Pearson (1934), at `CONFIDENCE`.

    Args:
      hits: how often it was so.
      count: of how many, > 0.
    """
    tail = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(tail, hits, count - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)


def guesses(score: np.ndarray, inside: np.ndarray, share: float) -> tuple[int, int]:
    """How many coins an attacker guesses by scores, and how many rightly.

    Of the highest scores heads and of the lowest tails, as many of each.

    Args:
      score: [M] of one client's canaries.
      inside: [M] bool, the coins.
      share: of the coins that are guessed, in (0, 1].
    """
    count = int(share * len(score)) // 2
    order = np.argsort(score, kind="stable")
    low, high = inside[order[:count]], inside[order[len(order) - count :]]
    return 2 * count, int(np.sum(~low) + np.sum(high))


def bound(
    coins: int, guessed: Sequence[tuple[int, int]], delta: float, among: int = 1
) -> float:
    """A lower bound of epsilon that holds with probability `CONFIDENCE`.

    The best of several ways to guess, each held to its part of what is left of 1.

    Args:
      coins: fair ones, each of which decided on one image.
      guessed: how many coins were guessed, and rightly, each way.
      delta: with which epsilon is claimed.
      among: bounds that all hold together with that probability (Bonferroni).
    """
    level = (1 - CONFIDENCE) / max(1, among * len(guessed))
    return max((_bound(coins, *one, delta, level) for one in guessed), default=0.0)


def _bound(coins: int, count: int, right: int, delta: float, level: float) -> float:
    """The largest epsilon that so many right guesses speak against."""
    low, high = 0.0, _MOST
    if not count or p_value(coins, count, right, low, delta) > level:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(coins, count, right, middle, delta) > level:
            high = middle
        else:
            low = middle
    return low


def p_value(coins: int, count: int, right: int, epsilon: float, delta: float) -> float:
    """At most this often are so many guesses right where (epsilon, delta) holds.

    Steinke, Nasr and Jagielski (2023), theorem 5.2: guesses are as good as those of so
    many randomised responses, but for 2 `coins` delta times the largest mean chance of
    the counts just below.

    Args:
      coins: m, fair ones.
      count: r <= m, of them guessed; all others are abstained from.
      right: v <= r, guessed rightly.
      epsilon: >= 0.
      delta: in [0, 1].
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, count, chance))
    if not delta or not right:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(right)[::-1], count, chance))
    most = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, tail + 2 * coins * delta * most)
