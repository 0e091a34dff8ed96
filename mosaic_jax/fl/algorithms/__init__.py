"""Federated algorithms by name."""

from mosaic_jax.core.registry import Registry, subclass_of
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.fedavg import FedAvg
from mosaic_jax.fl.algorithms.fedbn import FedBN
from mosaic_jax.fl.algorithms.feddropout import FedDropout
from mosaic_jax.fl.algorithms.feddyn import FedDyn
from mosaic_jax.fl.algorithms.fedlc import FedLC
from mosaic_jax.fl.algorithms.fedprox import FedProx
from mosaic_jax.fl.algorithms.fedrolex import FedRolex
from mosaic_jax.fl.algorithms.fedrs import FedRS
from mosaic_jax.fl.algorithms.heterofl import HeteroFL

ALGORITHMS: Registry[type[Algorithm]] = Registry(
    "init.method",
    {
        "fedavg": FedAvg,
        "fedprox": FedProx,
        "fedbn": FedBN,
        "fedrs": FedRS,
        "fedlc": FedLC,
        "feddyn": FedDyn,
        "heterofl": HeteroFL,
        "fedrolex": FedRolex,
        "feddropout": FedDropout,
    },
    subclass_of(Algorithm),
)
