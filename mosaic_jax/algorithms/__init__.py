"""Federated algorithms by name."""

from mosaic_jax import errors, settings
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.algorithms.fedavg import FedAvg
from mosaic_jax.algorithms.fedbn import FedBN
from mosaic_jax.algorithms.feddropout import FedDropout
from mosaic_jax.algorithms.feddyn import FedDyn
from mosaic_jax.algorithms.fedprox import FedProx
from mosaic_jax.algorithms.fedrolex import FedRolex
from mosaic_jax.algorithms.fedrs import FedRS
from mosaic_jax.algorithms.heterofl import HeteroFL

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedbn": FedBN,
    "fedrs": FedRS,
    "feddyn": FedDyn,
    "heterofl": HeteroFL,
    "fedrolex": FedRolex,
    "feddropout": FedDropout,
}


def build(study: settings.Settings) -> Algorithm:
    """The algorithm `init.method` of a study, with its fields in `methods`.

    Raises:
      ConfigError: it is not known, or a field of it or of another algorithm there is
        missing, unknown or out of range.
    """
    name = study.init.method
    if name not in ALGORITHMS:
        raise errors.ConfigError(
            f"init.method = {name!r}: {settings.near(name, list(ALGORITHMS))}"
        )
    return settings.check_one(ALGORITHMS, name, study.methods)
