"""Which studies can do with the images of those clients alone whose turn it is."""

from collections.abc import Sequence

from mosaic_jax.core import errors
from mosaic_jax.fl.sending import Sending
from mosaic_jax.run.settings import Settings
from mosaic_jax.stages.base import Link


def obstacle(settings: Settings, chain: Sequence[Link], sending: Sending) -> str:
    """What in a study needs all training images on the devices; "": nothing.

    Args:
      settings: of the study.
      chain: its stages.
      sending: what becomes of uploads.
    """
    for link in chain:
        if link.stage.reads_images(settings):
            return (
                f"the stage {link.name!r}, which reads clients' images outside of"
                " federated rounds"
            )
    if settings.compute.client_state == "device":
        return "compute.client_state = 'device', as rounds go batch by batch then"
    if sending.colludes:
        return (
            f"attack.name = {settings.attack.name!r}, whose attackers wait for each"
            " other"
        )
    return ""


def check(settings: Settings, chain: Sequence[Link], sending: Sending) -> None:
    """Check that a study can do what it asks for.

    Args:
      settings: of the study.
      chain: its stages.
      sending: what becomes of uploads.

    Raises:
      ConfigError: images are to stay in host memory, or in files, and cannot.
    """
    where, in_files = settings.compute.images, not settings.data.in_memory
    if in_files and where == "device":
        raise errors.ConfigError(
            "compute.images = 'device': must be auto or host for data.in_memory ="
            " False, as images that are read from files are never all there"
        )
    why = obstacle(settings, chain, sending)
    if why and in_files:
        raise errors.ConfigError(f"data.in_memory = False: must be True for {why}")
    if why and where == "host":
        raise errors.ConfigError(
            f"compute.images = 'host': must be auto or device for {why}"
        )
