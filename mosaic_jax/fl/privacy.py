"""Differential privacy: settings, and the mechanism that hides single images.

A client's image moves the sum of clipped gradients by at most the clip, and Gaussian
noise in proportion to the clip hides it (DP-SGD: Abadi et al., 2016). What it costs is
found in `fl/accounting.py`; docs/privacy.md says what is covered.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mosaic_jax.core import prng, programs, schema, trees
from mosaic_jax.core.types import Array, Client, Tree
from mosaic_jax.fl import uploads

# Name of what clients tell of their labels, where they do.
LABEL_COUNTS = "label_counts"
# Uniform draws are whole multiples of 1 / DRAWS.
DRAWS = 2**23
# Gradients of so many images are in memory at once on a CPU, whose caches then hold
# those of small networks (measured), and elsewhere; and no more than take these bytes.
_AT_ONCE_CPU, _AT_ONCE, _MOST_BYTES = 8, 64, 2**28


@dataclasses.dataclass(frozen=True)
class Privacy(schema.Group):
    """Differential privacy of each image, or of each client as a whole."""

    epsilon: float = schema.field(
        0.0,
        "in [0, 100], or inf",
        lambda x: 0 <= x <= 100,
        "> 0: most that is told of one image, or client; 0, or inf: not private",
        stands_for={math.inf: 0.0},
    )
    unit: str = schema.one_of(
        ("image", "client"),
        default="image",
        meaning="what is private: an image, towards the server too; or a client, in the"
        " models that come out of the rounds",
    )
    delta: float = schema.field(
        1e-5,
        "in (0, 1)",
        lambda x: 0 < x < 1,
        "probability that it tells more; less than one in a client's images, or in the"
        " clients",
    )
    clip: float = schema.above(
        0,
        default=1.0,
        meaning="largest norm of one image's gradient, or of a client's update",
    )
    prototype_clip: float = schema.above(
        0, default=1.0, meaning="largest norm of one image's features in a prototype"
    )

    noised_by: str = schema.one_of(
        ("server", "client"),
        default="server",
        meaning="of unit client: who adds noise; client: private from the server too",
    )
    clip_quantile: float = schema.below_one(
        default=0.0,
        meaning="of unit client: of the updates' norms, which the clip follows; 0: it"
        " stays",
    )
    clip_rate: float = schema.above(
        0, default=0.2, meaning="of that: how fast the clip follows, a round"
    )

    @property
    def of_images(self) -> bool:
        """Whether single images are private."""
        return bool(self.epsilon) and self.unit == "image"

    @property
    def of_clients(self) -> bool:
        """Whether whole clients are."""
        return bool(self.epsilon) and self.unit == "client"

    def problems(self, study: Any) -> Iterator[str]:
        """What clients do with their images that is not accounted for."""
        if self.of_images:
            yield from self._problems_of_images(study)
            if self.clip_quantile:
                yield (
                    f"privacy.clip_quantile = {self.clip_quantile}: must be 0 for"
                    " privacy.unit = 'image'"
                )
            if self.noised_by != "server":
                yield (
                    f"privacy.noised_by = {self.noised_by!r}: must be 'server' for"
                    " privacy.unit = 'image', where each client adds its noise"
                )
        if self.of_clients:
            yield from self._problems_of_clients(study)

    def _problems_of_clients(self, study: Any) -> Iterator[str]:
        told = "for privacy.unit = 'client', which hides sums of whole updates"
        if study.method != "federated":
            yield f"method = {study.method!r}: must be 'federated' {told}"
        for field, value, allowed in (
            ("server.method", study.server.method, "none"),
            ("aggregation.rule", study.aggregation.rule, "mean"),
            ("attack.name", study.attack.name, "none"),
            ("compression.name", study.compression.name, "none"),
        ):
            if value != allowed:
                yield f"{field} = {value!r}: must be {allowed!r} {told}"
        yield from uploads.problems(study, "privacy.unit = 'client'", "'image'")
        if self.clip_quantile and self.noised_by == "client":
            yield (
                f"privacy.clip_quantile = {self.clip_quantile}: must be 0 for"
                " privacy.noised_by = 'client', whose norms the server may not learn"
            )

    def _problems_of_images(self, study: Any) -> Iterator[str]:
        told = f"for privacy.epsilon = {self.epsilon}"
        mosaic = study.method == "mosaic"
        if study.trains_every_round:
            yield (
                f"server.when = {study.server.when!r}: must be 'once' {told}, as"
                " clients would tell the labels of each round"
            )
        if study.finetune.rounds and study.finetune.anchor == "distilled":
            yield (
                f"finetune.anchor = 'distilled': must be another {told}, as its"
                " gradient is not clipped by image"
            )
        if study.generators.patience and (mosaic or study.trains_once):
            yield (
                f"generators.patience = {study.generators.patience}: must be 0 {told},"
                " as clients would stop by their own images"
            )
        if mosaic and study.prototypes.clusters != 1:
            yield (
                f"prototypes.clusters = {study.prototypes.clusters}: must be 1 {told},"
                " as k-means is not private"
            )
        if mosaic and study.prototypes.gathered != "once":
            yield (
                f"prototypes.gathered = {study.prototypes.gathered!r}: must be 'once'"
                f" {told}"
            )


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """What is the same for all clients of a private study.

    Each has its own noise multiplier, `Client.noise`.

    Attributes:
      clip: largest norm of one image's gradient.
      prototype_clip: largest norm of one image's features.
      rows: pairs of an expected batch size and the rows that its batches have.
    """

    clip: float
    prototype_clip: float
    rows: tuple[tuple[int, int], ...]

    def batch(
        self, client: Client, key: jax.Array, batch_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """A Poisson batch: each image is in it by chance, whatever the others are.

        The chance is `batch_size` / n of n images, or 1. Where more are drawn than
        there are rows the last are left out, which the accountant has counted.

        Args:
          client: whose images they are.
          key: random key of the client and the step.
          batch_size: expected number of images.

        Returns:
          Positions [rows] int32 in the client's index row, and their mask [rows]: the
          images come first.
        """
        capacity = client.index.shape[-1]
        drawn = jax.random.uniform(key, (capacity,)) < rate(client.size, batch_size)
        drawn &= jnp.arange(capacity) < client.size
        count = jnp.cumsum(drawn)
        wanted = 1 + jnp.arange(dict(self.rows)[batch_size])
        position = jnp.searchsorted(count, wanted).astype(jnp.int32)
        return jnp.minimum(position, capacity - 1), wanted <= count[-1]

    def mean_gradient(
        self,
        gradient: Callable[[Tree], Tree],
        images: Tree,
        mask: Array,
        *,
        client: Client,
        batch_size: int,
        key: jax.Array,
    ) -> Tree:
        """The noisy sum of clipped gradients over the expected number of images.

        Args:
          gradient: of the loss of one image.
          images: a Poisson batch, leaves [B, ...].
          mask: [B] bool, the images that count, which come first.
          client: whose images they are.
          batch_size: expected number of images, unless the client has fewer.
          key: random key of the client and the step, used for nothing else.
        """
        total = clipped_sum(gradient, images, mask, self.clip)
        total = noisy(total, key, noise_of(client) * self.clip)
        expected = jnp.clip(client.size, 1, batch_size)
        return jax.tree.map(lambda leaf: leaf / expected, total)

    def class_means(
        self,
        feature: Array,
        label: Array,
        *,
        client: Client,
        spaces: int,
        key: jax.Array,
    ) -> jax.Array:
        """Noisy means of one client's features by class, in one of several spaces.

        Args:
          feature: [M, F] of the client's images, and of the padding of its index.
          label: [M] int32.
          client: whose images they are; its label counts divide the sums.
          spaces: number of spaces in which the same images are told of.
          key: random key of the client and the space.

        Returns:
          [K, F] float32; meaningless for classes whose label count is not positive.
        """
        held = jnp.arange(len(label)) < client.size
        total = jax.lax.map(
            lambda k: clipped_total(feature, held & (label == k), self.prototype_clip),
            jnp.arange(client.label_count.shape[-1]),
        )
        # One image moves a sum in each space by the clip, so all together by this.
        moved = self.prototype_clip * np.sqrt(spaces)
        total = noisy(total, key, noise_of(client) * moved)
        return total / jnp.maximum(client.label_count, 1)[:, None]


def noise_of(client: Client) -> Array:
    """The noise multiplier [] of a client of a private study."""
    assert client.noise is not None
    return client.noise


def rate(size: Array, batch_size: int) -> Array:
    """Chance [] float32 that one of `size` [] images is in a batch, in (0, 1]."""
    xp = jnp if isinstance(size, jax.Array) else np
    share = xp.float32(batch_size) / xp.maximum(size, 1).astype(xp.float32)
    return xp.minimum(share, xp.float32(1))


def clipped_total(each: Tree, counts: Array, clip: float) -> Tree:
    """The sum of entries that are shortened to norm `clip` where they are longer.

    One entry more or less changes it by at most `clip`, in norm over all leaves, up to
    rounding. An entry that is not finite counts as 0.

    Args:
      each: leaves [B, ...].
      counts: [B] bool, the entries that count.
      clip: > 0.
    """
    norm = jax.vmap(optax.tree.norm)(each)
    kept = counts & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(kept, scale, 0)

    def total(leaf: Array) -> jax.Array:
        flat = jnp.where(kept[:, None], leaf.reshape(len(leaf), -1), 0)
        # A product is 20 times as fast as a sum of products on CPUs (measured);
        # elsewhere it must not be of rounded factors.
        found = jnp.matmul(scale, flat, precision=jax.lax.Precision.HIGHEST)
        return found.reshape(leaf.shape[1:])

    return jax.tree.map(total, each)


def clipped_sum(
    gradient: Callable[[Tree], Tree], images: Tree, mask: Array, clip: float
) -> Tree:
    """The sum of the clipped gradients of single images, see `clipped_total`.

    Args:
      gradient: of the loss of one image, from its leaves without the leading axis.
      images: leaves [B, ...].
      mask: [B] bool, the images that count, which come first. Those after them cost
        next to nothing.
      clip: largest norm of a gradient.
    """
    shapes = jax.eval_shape(gradient, trees.take(images, 0))
    size = _at_once(trees.num_bytes(shapes), len(mask))
    missing = -len(mask) % size

    def pieces(leaf: Array) -> Array:
        leaf = jnp.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)])
        return leaf.reshape(-1, size, *leaf.shape[1:])

    images, counts = jax.tree.map(pieces, (images, mask))

    def add(i: Array, total: Tree) -> Tree:
        some, counted = trees.take((images, counts), i)
        found = clipped_total(jax.vmap(gradient)(some), counted, clip)
        return trees.add(total, found)

    used = -(-jnp.sum(mask) // size)
    return jax.lax.fori_loop(0, used, add, trees.zeros(shapes))


def bytes_at_once(params: Tree) -> int:
    """Bytes of the gradients in `params` of all images that are in memory at once."""
    each = trees.num_bytes(params)
    return _at_once(each, _AT_ONCE) * each


def _at_once(num_bytes: int, count: int) -> int:
    """How many of `count` gradients of `num_bytes` each are in memory at once."""
    most = _AT_ONCE_CPU if programs.platform() == "cpu" else _AT_ONCE
    return max(1, min(most, count, _MOST_BYTES // num_bytes))


def noisy(tree: Tree, key: jax.Array, deviation: Array) -> Tree:
    """`tree` with independent Gaussian noise on each number.

    Args:
      tree: float leaves.
      key: random key, used for nothing else.
      deviation: [] standard deviation of the noise.
    """
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        leaf + deviation * jax.random.normal(prng.at(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)
