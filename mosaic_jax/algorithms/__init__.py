"""Federated algorithms by name."""

from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.algorithms.fedavg import FedAvg

ALGORITHMS: dict[str, type[Algorithm]] = {"fedavg": FedAvg}


def build(name: str) -> Algorithm:
    """The algorithm called `name`, a key of `ALGORITHMS`."""
    return ALGORITHMS[name]()
