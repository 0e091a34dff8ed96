"""Measures of a classifier's answers: functions of logits [N, K] and labels [N].

A user's own is such a function, or a class of `clu.metrics` that is made from a model's
output, a collection of them included.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import clu.metrics
import numpy as np
import scipy.special
import scipy.stats

from mosaic_jax.core import errors, schema

# (logits [N, K], labels [N] int) -> values by name.
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]
# Bins of `calibration_error`, as in its source.
BINS = 15


def top_1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images whose class has the highest logit, in [0, 1]."""
    return float(np.mean(logits.argmax(-1) == labels))


def top_5(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images whose class is among the five highest logits, in [0, 1]."""
    highest = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    return float(np.mean((highest == labels[:, None]).any(-1)))


def loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy, >= 0, in nats."""
    told = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    return float(-told[np.arange(len(labels)), labels].mean())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that are there or are predicted, in [0, 1]."""
    size, predicted = logits.shape[-1], logits.argmax(-1)
    right = np.bincount(labels[predicted == labels], minlength=size)
    both = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean area under the ROC curve of each class against the rest, in [0, 1].

    By softmax, over the classes that have images, of which some are others'; NaN where
    there are none.
    """
    score = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    areas = []
    for k in np.unique(labels):
        is_k = labels == k
        positive, negative = is_k.sum(), (~is_k).sum()
        if negative:
            rank = scipy.stats.rankdata(score[:, k])[is_k].sum()
            above = rank - positive * (positive + 1) / 2
            areas.append(above / (positive * negative))
    return float(np.mean(areas)) if areas else float("nan")


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error, in [0, 1] (Guo et al., 2017): 15 equal bins.

    How far confidence and accuracy lie apart, on average over the images.
    """
    score = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    sure, right = score.max(-1), logits.argmax(-1) == labels
    bin_of = np.minimum((sure * BINS).astype(int), BINS - 1)
    apart = np.bincount(bin_of, weights=sure - right, minlength=BINS)
    return float(np.abs(apart).sum() / len(labels))


SHIPPED: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    one.__name__: one
    for one in (top_1, top_5, loss, macro_f1, auroc, calibration_error)
}


def measure(given: Any, num_classes: int) -> Measure:
    """One function that computes all metrics that a user gave.

    Args:
      given: a list of names of `SHIPPED`, functions and classes of `clu.metrics`; or a
        mapping from names to such.
      num_classes: K; each metric is tried on made-up logits.

    Raises:
      ConfigError: one is unknown, or raises something, or returns no number.
    """
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        named = {_name(one): one for one in given}
    else:
        raise errors.ConfigError(
            f"metrics = {given!r}: must be a list of names and functions, or a mapping"
            " from names to functions"
        )
    functions = {name: _function(name, one) for name, one in named.items()}

    def all_of_them(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, function in functions.items():
            try:
                value = function(logits, labels)
                several = value if isinstance(value, Mapping) else {name: value}
                found |= {key: float(one) for key, one in several.items()}
            except Exception as error:  # whatever the user's function raises
                raise errors.ConfigError(
                    f"metrics: {name}: must return a number for logits"
                    f" {list(logits.shape)} and labels {list(labels.shape)}:"
                    f" {type(error).__name__}: {errors.reason(error)}"
                ) from error
        return found

    np_rng = np.random.RandomState(0)
    label = np.arange(2 * num_classes, dtype=np.int32) % num_classes
    all_of_them(np_rng.randn(len(label), num_classes).astype(np.float32), label)
    return all_of_them


def _name(given: Any) -> str:
    name = given if isinstance(given, str) else getattr(given, "__name__", None)
    if name is None:
        raise errors.ConfigError(
            f"metrics: {given!r}: must have a name: give a mapping from names"
        )
    return name


def _function(name: str, given: Any) -> Callable[..., Any]:
    """A metric as a function to a number, or to numbers by name."""
    if isinstance(given, str):
        if given not in SHIPPED:
            raise errors.ConfigError(
                f"metrics: {given!r}: {schema.near(given, list(SHIPPED))}"
            )
        return SHIPPED[given]
    if isinstance(given, type) and issubclass(given, clu.metrics.Collection):
        return lambda logits, labels: given.single_from_model_output(
            logits=logits, labels=labels
        ).compute()
    if isinstance(given, type) and issubclass(given, clu.metrics.Metric):
        return lambda logits, labels: given.from_model_output(
            logits=logits, labels=labels
        ).compute()
    if not callable(given):
        raise errors.ConfigError(
            f"metrics: {name}: {given!r}: must be a function of logits [N, K] and"
            " labels [N], or a class of clu.metrics"
        )
    return given
