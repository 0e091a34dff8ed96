"""FedAvg: the defaults of `Algorithm`."""

from mosaic_jax.algorithms.base import Algorithm


class FedAvg(Algorithm):
    """Average of the client models by sample counts, over parameters and statistics."""
