"""Distillation on the server: Mosaic's ensemble, and data-free methods by name."""

from mosaic_jax import errors, settings
from mosaic_jax.distillation.base import ServerTraining
from mosaic_jax.distillation.dense import Dense
from mosaic_jax.distillation.dfrd import DFRD
from mosaic_jax.distillation.fedftg import FedFTG

METHODS: dict[str, type[ServerTraining]] = {
    "dense": Dense,
    "fedftg": FedFTG,
    "dfrd": DFRD,
}


def build(study: settings.Settings) -> ServerTraining | None:
    """The method `server.method` of a study, with its fields in `methods`.

    Raises:
      ConfigError: it is not known, or a field of it or of another method there is
        missing, unknown or out of range.
    """
    name = study.server.method
    if name != "none" and name not in METHODS:
        hint = settings.near(name, ["none", *METHODS])
        raise errors.ConfigError(f"server.method = {name!r}: {hint}")
    return settings.check_one(METHODS, name, study.methods)
