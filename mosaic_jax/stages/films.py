"""Films of the clients' generators: images of the same noise as training goes on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core.types import Array
from mosaic_jax.data import augment
from mosaic_jax.stages import sections
from mosaic_jax.stages.base import Context

# Images are taken after these shares of a client's steps.
SHARES = (0.05, 0.2, 0.5, 1.0)
MOMENTS = tuple(f"after {100 * share:.0f} %" for share in SHARES)
NUM_IMAGES = 8
NUM_CLIENTS = 20


def add(
    film: Array, moments: Array, number: Array, sample: Callable[[], Array]
) -> Array:
    """The film after a step of training.

    Args:
      film: uint8 [T, n, H, W, D], before it.
      moments: [T] int32, number of steps after which each image is taken.
      number: [] int32, of the step.
      sample: draws n signed images [n, H, W, D]; called only when one is taken.
    """

    def added() -> Array:
        now = moments == number + 1
        image = augment.to_uint8(sample())
        return jnp.where(now[:, None, None, None, None], image, film)

    return jax.lax.cond(jnp.any(moments == number + 1), added, lambda: film)


def latest(film: Array) -> dict[str, np.ndarray]:
    """Of the first clients the images of the last moment that has come, while it runs.

    Args:
      film: uint8 [C, T, n, H, W, D].
    """
    images = np.asarray(film[:NUM_CLIENTS])
    come = images.any(axis=(2, 3, 4, 5)).sum(axis=1)  # black until then
    return {"generated": images[np.arange(len(images)), np.maximum(come - 1, 0)]}


def pictures(context: Context, film: Array) -> dict[str, np.ndarray]:
    """Real images of the first clients, and generated ones at each moment.

    Args:
      context: of the stage.
      film: uint8 [C, T, n, H, W, D].

    Returns:
      uint8 [clients, n, H, W, D] by the names of the report's columns.
    """
    data = context.data.clients
    rows = data.client.index[:NUM_CLIENTS, :NUM_IMAGES]
    moments = np.moveaxis(np.asarray(film[:NUM_CLIENTS]), 1, 0)
    return {
        "real": np.asarray(data.images.image)[rows],
        **dict(zip(MOMENTS, moments, strict=True)),
    }


def section(context: Context, collapsed: list[int]) -> sections.Section:
    """The first clients' images beside those of their generators.

    Args:
      context: of the stage.
      collapsed: numbers of the clients whose generators have collapsed.
    """
    number = context.data.clients.client.number
    shown = number[:NUM_CLIENTS].tolist()
    kind = f" ({context.name})" if len(context.networks) > 1 else ""
    more = f"; the first {len(shown)} clients" if len(shown) < len(number) else ""
    names = ", ".join(map(str, collapsed)) or "none"
    strips = sections.Strips(
        name="generated" + (f"@{context.name}" if kind else ""),
        head=("client", "real", *MOMENTS),
        names=[f"client {i}" for i in shown],
        columns=("real", *MOMENTS),
        caption=f"Real images of each client{kind} beside those of its generator, from"
        f" the same noise over its training{more}.",
    )
    text = sections.Text(f"Collapsed generators, left out: {names}.")
    return sections.Section("Generators", (strips, text))
