"""Compression of what clients send: from an update to arrays that are sent, and back.

Each array of an update is compressed by itself. What is sent is what `encode` returns:
the byte ledger counts these arrays. A compressor that leaves something out may feed it
back: the client adds to its next update what is missing of the ones before.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core import prng, schema
from mosaic_jax.core.registry import Registry, build, subclass_of
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.fl import uploads
from mosaic_jax.fl.uploads import Compressor


@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """The largest entries of each array, with memory (Stich et al., NeurIPS 2018).

    Of n entries the ceil(share n) of the largest magnitude are sent, with their places
    as the smallest unsigned integers that can hold them. Each array has its own k, as
    in Deep Gradient Compression (Lin et al., ICLR 2018), so that none is left out.
    """

    share: float = schema.field(
        0.01, "in (0, 1]", lambda x: 0 < x <= 1, "of an array's entries that are sent"
    )
    error_feedback: bool = schema.anything(
        True, "clients send later what was left out before"
    )

    def encode(self, array: Array, key: Array) -> Tree:
        """Values [k] and their places [k]."""
        del key
        # Rounded first: 0.07 * 100 is more than 7 in floating point.
        count = max(1, -int(-round(self.share * len(array), 6) // 1))
        _, place = jax.lax.top_k(jnp.abs(array), count)
        return {"value": array[place], "place": place.astype(_unsigned(len(array)))}

    def decode(self, message: Tree, size: int) -> Array:
        """0 wherever nothing was sent."""
        zero = jnp.zeros(size, message["value"].dtype)
        return zero.at[message["place"].astype(jnp.int32)].set(message["value"])


def _unsigned(size: int) -> Any:
    """The smallest unsigned type for numbers below `size`."""
    kinds = (jnp.uint8, jnp.uint16, jnp.uint32)
    return next(kind for kind in kinds if size - 1 <= jnp.iinfo(kind).max)


@dataclasses.dataclass(frozen=True)
class EightBits(Compressor):
    """Integers in [-127, 127] and the largest magnitude (QSGD, Alistarh et al., 2017).

    Entries are rounded up or down at random, so that their expectation is exact. The
    scale is the array's largest magnitude, where the paper has the norm.
    """

    def encode(self, array: Array, key: Array) -> Tree:
        """Levels int8 [n] and their scale []."""
        scale = jnp.max(jnp.abs(array))
        level = array * (127 / jnp.where(scale > 0, scale, 1))
        level = jnp.floor(level + jax.random.uniform(key, array.shape))
        return {"level": jnp.clip(level, -127, 127).astype(jnp.int8), "scale": scale}

    def decode(self, message: Tree, size: int) -> Array:
        """Levels times their unit."""
        del size
        return message["level"] * (message["scale"] / 127)


@dataclasses.dataclass(frozen=True)
class Sign(Compressor):
    """Signs times the mean magnitude (EF-signSGD, Karimireddy et al., ICML 2019)."""

    error_feedback: bool = schema.anything(
        True, "clients send later what was left out before"
    )

    def encode(self, array: Array, key: Array) -> Tree:
        """Signs, eight in a byte, uint8 [ceil(n / 8)], and the mean magnitude []."""
        del key
        return {"sign": jnp.packbits(array >= 0), "scale": jnp.mean(jnp.abs(array))}

    def decode(self, message: Tree, size: int) -> Array:
        """Plus or minus the mean magnitude."""
        positive = jnp.unpackbits(message["sign"], count=size) > 0
        return jnp.where(positive, message["scale"], -message["scale"])


COMPRESSORS: Registry[type[Compressor]] = Registry(
    "compression.name",
    {"top_k": TopK, "eight_bits": EightBits, "sign": Sign},
    subclass_of(Compressor),
)


@dataclasses.dataclass(frozen=True)
class Compression(schema.Group):
    """How clients compress what they send in rounds."""

    name: str = schema.component(
        ("none", *COMPRESSORS),
        default="none",
        meaning="of the changes of parameters that clients send",
    )

    def build(self, methods: dict[str, Any]) -> Compressor | None:
        """The compressor, with its fields from `methods`; None: there is none.

        Raises:
          ConfigError: it is unknown, or a field of it is wrong.
        """
        if self.name == "none":
            return None
        return build(COMPRESSORS, self.name, methods)

    def problems(self, study: Any) -> Iterator[str]:
        """Uploads that are no changes of the whole network."""
        if self.build(study.methods) is not None:
            told = f"compression.name = {self.name!r}"
            yield from uploads.problems(study, told, "none")


def encode(compressor: Compressor, upload: Tree, key: Array) -> Tree:
    """All that a client sends: its parameters compressed, the rest as it is.

    Args:
      compressor: of the study.
      upload: its parameters are the update.
      key: random key [] of the client and the round.
    """
    update = uploads.parameters(upload)
    message = [
        compressor.encode(leaf.reshape(-1), prng.at(key, i))
        for i, leaf in enumerate(update)
    ]
    # () holds no array.
    return message, uploads.with_parameters(upload, ((),) * len(update))


def decode(compressor: Compressor, message: Tree, upload: Tree) -> Tree:
    """The upload that the server reads.

    Args:
      compressor: of the study.
      message: the result of `encode`.
      upload: that was encoded, or its shapes.
    """
    read = tuple(
        compressor.decode(sent, leaf.size).reshape(leaf.shape)
        for sent, leaf in zip(message[0], uploads.parameters(upload), strict=True)
    )
    return uploads.with_parameters(upload, read)
