"""What generators give away about training images, and what they learned of the data.

Pure functions of samples and distances. "Held out" are real images that no client
holds. Wherever members of a client's data are compared with others, both have the same
number of images of each class: a generator that knows its client's classes, but no
image, stays at chance.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from mosaic_jax.types import Array

# Of a normal distribution, two-sided 95 %.
Z = 1.96
KID_SUBSETS = 50
KID_SIZE = 200
FID_HALVES = 10


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its variance, by which it can be averaged with others."""

    value: float
    variance: float

    def interval(
        self, low: float = -math.inf, high: float = math.inf
    ) -> dict[str, float]:
        """95 % confidence interval, cut to a range: "mean", "low", "high"."""
        width = Z * math.sqrt(self.variance)
        return {
            "mean": self.value,
            "low": max(low, self.value - width),
            "high": min(high, self.value + width),
        }


def weighted(estimates: Sequence[Estimate], weight: Sequence[float]) -> Estimate:
    """Mean of independent estimates."""
    share = np.asarray(weight, float) / np.sum(weight)
    value = sum(w * e.value for w, e in zip(share, estimates, strict=True))
    variance = sum(w**2 * e.variance for w, e in zip(share, estimates, strict=True))
    return Estimate(float(value), float(variance))


def share(hits: np.ndarray) -> Estimate:
    """Mean of booleans [n]."""
    # Agresti and Coull's added counts keep the variance above 0 at the ends.
    near = (np.sum(hits) + 2) / (len(hits) + 4)
    return Estimate(float(np.mean(hits)), float(near * (1 - near) / (len(hits) + 4)))


def auc(positive: np.ndarray, negative: np.ndarray) -> Estimate:
    """Probability that a positive scores above a negative; ties count half.

    The variance is that of DeLong et al. (1988).

    Args:
      positive: [m] scores.
      negative: [n] scores.
    """
    m, n = len(positive), len(negative)
    ranks = scipy.stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - scipy.stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - scipy.stats.rankdata(negative)) / m
    variance = sum(
        float(np.var(part, ddof=1)) / len(part)
        for part in (above, below)
        if len(part) > 1
    )
    return Estimate(float(np.mean(above)), variance)


def nearest(points: Array, others: Array, mask: Array) -> tuple[Array, Array]:
    """Squared Euclidean distance to the nearest of some others, and its number.

    Args:
      points: [n, P].
      others: [m, P].
      mask: [m] bool, which of them count; at least one.
    """
    square = jnp.sum(points**2, axis=1)[:, None] + jnp.sum(others**2, axis=1)[None]
    product = jnp.matmul(points, others.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.where(mask[None], square - 2 * product, jnp.inf)
    index = jnp.argmin(distance, axis=1)
    # What cancels is lost above; of the nearest the distance is taken anew.
    return jnp.sum((points - others[index]) ** 2, axis=1), index


def matched_rows(
    label: np.ndarray,
    other_label: np.ndarray,
    most: int,
    np_rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two sets, as many of each class from both.

    Args:
      label: [n] int.
      other_label: [m] int.
      most: rows in all, about: classes are cut in proportion.
      np_rng: draws them.

    Returns:
      Rows of `label` and of `other_label`, of one length; empty where no class is in
      both.
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
    """Frechet distance of Gaussians fitted to features [n, F] and [m, F].

    Heusel et al. (2017), in the features of any network.
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
    """`fid`, with the variance over random halves of both sets.

    Halves drawn without replacement vary as much as whole sets drawn anew would.
    """

    def half(features: np.ndarray) -> np.ndarray:
        return features[np_rng.permutation(len(features))[: len(features) // 2]]

    halves = [fid(half(first), half(second)) for _ in range(FID_HALVES)]
    return Estimate(fid(first, second), float(np.var(halves, ddof=1)))


def kid_estimate(
    first: np.ndarray, second: np.ndarray, np_rng: np.random.RandomState
) -> Estimate:
    """Kernel distance of features [n, F] and [m, F], unbiased (Binkowski et al., 2018).

    Mean over random subsets; kernel (x.y / F + 1)^3.
    """
    size = min(KID_SIZE, len(first), len(second))
    found = []
    for _ in range(KID_SUBSETS):
        x = first[np_rng.permutation(len(first))[:size]]
        y = second[np_rng.permutation(len(second))[:size]]
        found.append(_kernel_distance(x, y))
    return Estimate(float(np.mean(found)), float(np.var(found, ddof=1) / len(found)))


def _kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(matrix: np.ndarray) -> float:
        count = len(matrix)
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    return within(kernel(x, x)) + within(kernel(y, y)) - 2 * float(kernel(x, y).mean())


def label_distance(predicted: np.ndarray, count: np.ndarray) -> float:
    """Total variation, 0..1, between classes [n] int and a histogram [K]."""
    found = np.bincount(predicted, minlength=len(count)) / len(predicted)
    return float(np.abs(found - count / count.sum()).sum() / 2)


def coverage(predicted: np.ndarray, count: np.ndarray) -> float:
    """Share of a client's images, histogram [K], whose class is among [n] int."""
    return float(count[np.unique(predicted)].sum() / count.sum())
