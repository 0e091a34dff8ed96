"""FedAvg: the defaults of `Algorithm`."""

import dataclasses

from mosaic_jax.fl.algorithms.base import Algorithm


@dataclasses.dataclass(frozen=True)
class FedAvg(Algorithm):
    """Average of the client models by sample counts, over parameters and statistics."""

    per_image = True
