"""Federated algorithms by name."""

from mosaic_jax.core.registry import Registry, subclass_of
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.ditto import Ditto
from mosaic_jax.fl.algorithms.fedavg import FedAvg
from mosaic_jax.fl.algorithms.fedbn import FedBN
from mosaic_jax.fl.algorithms.feddropout import FedDropout
from mosaic_jax.fl.algorithms.feddyn import FedDyn
from mosaic_jax.fl.algorithms.fedlc import FedLC
from mosaic_jax.fl.algorithms.fednova import FedNova
from mosaic_jax.fl.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from mosaic_jax.fl.algorithms.fedper import FedPer
from mosaic_jax.fl.algorithms.fedproto import FedProto
from mosaic_jax.fl.algorithms.fedprox import FedProx
from mosaic_jax.fl.algorithms.fedrep import FedRep
from mosaic_jax.fl.algorithms.fedrolex import FedRolex
from mosaic_jax.fl.algorithms.fedrs import FedRS
from mosaic_jax.fl.algorithms.fedtgp import FedTGP
from mosaic_jax.fl.algorithms.heterofl import HeteroFL
from mosaic_jax.fl.algorithms.moon import Moon
from mosaic_jax.fl.algorithms.scaffold import Scaffold

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
        "fedproto": FedProto,
        "fedtgp": FedTGP,
        "scaffold": Scaffold,
        "fedavgm": FedAvgM,
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedyogi": FedYogi,
        "moon": Moon,
        "fedper": FedPer,
        "fedrep": FedRep,
        "ditto": Ditto,
        "fednova": FedNova,
    },
    subclass_of(Algorithm),
)
