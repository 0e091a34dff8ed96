"""Distillation on the server: Mosaic's ensemble, and data-free methods by name."""

from mosaic_jax.core.registry import Registry, subclass_of
from mosaic_jax.server.base import ServerTraining
from mosaic_jax.server.coboosting import CoBoosting
from mosaic_jax.server.dense import Dense
from mosaic_jax.server.dfrd import DFRD
from mosaic_jax.server.feddf import FedDF
from mosaic_jax.server.fedftg import FedFTG
from mosaic_jax.server.fedgen import FedGen

METHODS: Registry[type[ServerTraining]] = Registry(
    "server.method",
    {
        "feddf": FedDF,
        "dense": Dense,
        "coboosting": CoBoosting,
        "fedgen": FedGen,
        "fedftg": FedFTG,
        "dfrd": DFRD,
    },
    subclass_of(ServerTraining),
)
