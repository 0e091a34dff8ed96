"""Measures of the audit: what generators leak, and how good their images are.

Pure functions of samples and distances. Held-out images are real images that no client
has. Where a client's images are compared with held-out ones, both sets have the same
number of images of each class, so that a generator that knows its client's classes, but
none of its images, is at chance.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from mosaic_jax.core.types import Array

# Quantile of the normal distribution for a two-sided 95 % interval.
Z = 1.96
# Random subsets of KID, and images in each; random halves for the variance of FID.
KID_SUBSETS = 50
KID_SIZE = 200
FID_HALVES = 10


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate with its sampling variance, so that estimates can be averaged."""

    value: float
    variance: float

    def interval(
        self, low: float = -math.inf, high: float = math.inf
    ) -> dict[str, float]:
        """A 95 % confidence interval, clipped to a range: "mean", "low" and "high"."""
        width = Z * math.sqrt(self.variance)
        return {
            "mean": self.value,
            "low": max(low, self.value - width),
            "high": min(high, self.value + width),
        }


def weighted(estimates: Sequence[Estimate], weight: Sequence[float]) -> Estimate:
    """Weighted mean of independent estimates; the weights need not sum to 1."""
    share = np.asarray(weight, float) / np.sum(weight)
    value = sum(w * e.value for w, e in zip(share, estimates, strict=True))
    variance = sum(w**2 * e.variance for w, e in zip(share, estimates, strict=True))
    return Estimate(float(value), float(variance))


def share(hits: np.ndarray) -> Estimate:
    """Share of booleans [n] that are True, in [0, 1]."""
    # Agresti and Coull's added counts keep the variance above 0 at the ends.
    near = (np.sum(hits) + 2) / (len(hits) + 4)
    return Estimate(float(np.mean(hits)), float(near * (1 - near) / (len(hits) + 4)))


def auc(positive: np.ndarray, negative: np.ndarray) -> Estimate:
    """Probability in [0, 1] that a positive scores above a negative; ties count half.

    The variance is that of DeLong et al. (1988) with a success and a failure added to
    each sample's shares, as Agresti and Caffo (2000) do for the difference of two
    shares: it would be 0 where a few scores are all in order, and is DeLong's for many.

    Args:
      positive: [m] scores of the positives.
      negative: [n] scores of the negatives.
    """
    m, n = len(positive), len(negative)
    ranks = scipy.stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - scipy.stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - scipy.stats.rankdata(negative)) / m
    variance = sum(
        float(np.var([*part, 0.0, 1.0], ddof=1)) / (len(part) + 2)
        for part in (above, below)
    )
    return Estimate(float(np.mean(above)), variance)


def nearest(points: Array, others: Array, mask: Array) -> tuple[Array, Array]:
    """Nearest neighbours of `points` among `others`.

    Args:
      points: [n, P].
      others: [m, P].
      mask: [m] or [n, m] bool, which of `others` count, for all points or for each; at
        least one.

    Returns:
      Squared Euclidean distance [n] to the nearest neighbour, and its row [n] in
      `others`.
    """
    square = jnp.sum(points**2, axis=1)[:, None] + jnp.sum(others**2, axis=1)[None]
    product = jnp.matmul(points, others.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.where(mask, square - 2 * product, jnp.inf)
    index = jnp.argmin(distance, axis=1)
    # The sum above loses digits by cancellation; this distance does not.
    return jnp.sum((points - others[index]) ** 2, axis=1), index


def matched_rows(
    label: np.ndarray,
    other_label: np.ndarray,
    most: int,
    np_rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of two sets, with the same number of rows of each class.

    Args:
      label: [n] int, classes of the first set.
      other_label: [m] int, classes of the second set.
      most: about the largest number of rows; classes are cut in proportion.
      np_rng: draws the rows.

    Returns:
      Rows of the first and of the second set, both [r] int; r = 0 where the sets have
      no class in common.
    """
    num_classes = int(max(label.max(initial=0), other_label.max(initial=0))) + 1
    both = np.minimum(
        np.bincount(label, minlength=num_classes),
        np.bincount(other_label, minlength=num_classes),
    )
    if both.sum() > most:
        both = np.where(both > 0, np.maximum(1, both * most // both.sum()), 0)
    rows = [
        np.concatenate(
            [
                np_rng.permutation(np.flatnonzero(labels == k))[: both[k]]
                for k in range(num_classes)
            ]
        )
        for labels in (label, other_label)
    ]
    return rows[0].astype(int), rows[1].astype(int)


def fid(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance >= 0 of Gaussians fitted to features [n, F] and [m, F].

    Source: Heusel et al. (2017), there for the features of an Inception network.
    """
    means = first.mean(axis=0), second.mean(axis=0)
    a, b = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (first, second))
    # tr sqrt(A B) by the eigenvalues of the product, which are real and >= 0.
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    distance = np.sum((means[0] - means[1]) ** 2)
    return float(distance + np.trace(a) + np.trace(b) - 2 * root)


def fid_estimate(
    first: np.ndarray, second: np.ndarray, np_rng: np.random.RandomState
) -> Estimate:
    """`fid`, with its variance over random halves of both sets.

    Halves drawn without replacement vary about as much as whole sets drawn anew would.

    Args:
      first: [n, F] features.
      second: [m, F] features.
      np_rng: draws the halves.
    """

    def half(features: np.ndarray) -> np.ndarray:
        return features[np_rng.permutation(len(features))[: len(features) // 2]]

    halves = [fid(half(first), half(second)) for _ in range(FID_HALVES)]
    return Estimate(fid(first, second), float(np.var(halves, ddof=1)))


def kid_estimate(
    first: np.ndarray, second: np.ndarray, np_rng: np.random.RandomState
) -> Estimate:
    """Unbiased kernel distance of two sets of features (Binkowski et al., 2018).

    The mean over random subsets; the kernel is (x . y / F + 1)^3.

    Args:
      first: [n, F] features.
      second: [m, F] features.
      np_rng: draws the subsets.
    """
    size = min(KID_SIZE, len(first), len(second))
    distances = []
    for _ in range(KID_SUBSETS):
        x = first[np_rng.permutation(len(first))[:size]]
        y = second[np_rng.permutation(len(second))[:size]]
        distances.append(_kernel_distance(x, y))
    variance = float(np.var(distances, ddof=1) / len(distances))
    return Estimate(float(np.mean(distances)), variance)


def _kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(matrix: np.ndarray) -> float:
        count = len(matrix)
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    return within(kernel(x, x)) + within(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def label_distance(predicted: np.ndarray, count: np.ndarray) -> float:
    """Total variation in [0, 1] between classes [n] int and a label histogram [K]."""
    frequency = np.bincount(predicted, minlength=len(count)) / len(predicted)
    return float(np.abs(frequency - count / count.sum()).sum() / 2)


def coverage(predicted: np.ndarray, count: np.ndarray) -> float:
    """Share of the images of a label histogram [K] with a class in `predicted` [n]."""
    return float(count[np.unique(predicted)].sum() / count.sum())
