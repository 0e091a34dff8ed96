"""Robust rules: what the server makes of a round's uploads, some of which are hostile.

Rules see everything that clients send, statistics of batch-norm included, and count
clients, not images: who says that it has many images must not weigh more. They need
the uploads one by one. These are m times the memory of one; whatever a rule computes on
the way, such as sorted coordinates, is of one chunk of coordinates at a time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mosaic_jax.core import schema, trees
from mosaic_jax.core.registry import Registry, build, subclass_of
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.fl import uploads
from mosaic_jax.fl.uploads import Rule

# Entries of a chunk, of all uploads together: 4 MB in float32.
CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Mean(Rule):
    """The mean, weighted as the algorithm says: one attacker moves it anywhere."""

    needs_each = False
    is_told = False

    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """Where attackers must know each other's updates; else uploads are summed."""
        del attackers
        return trees.weighted_mean(upload, weight)

    def most_attackers(self, clients: int) -> int:
        """It does not ask."""
        return clients


@dataclasses.dataclass(frozen=True)
class Median(Rule):
    """The median of every coordinate (Yin et al., ICML 2018)."""

    is_told = False

    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """Of an even number of uploads the mean of the two in the middle."""
        del attackers
        count = jnp.sum(weight > 0)

        def middle(part: Array) -> Array:
            ordered = _ascending(part, weight)
            return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2

        return _by_chunk(middle, upload)

    def most_attackers(self, clients: int) -> int:
        """Fewer than half."""
        return (clients - 1) // 2


@dataclasses.dataclass(frozen=True)
class TrimmedMean(Rule):
    """The mean of every coordinate without its extremes (Yin et al., ICML 2018).

    Of f attackers the f smallest and the f largest values are left out; where so many
    uploads are lost that none would remain, as many as leave one or two.
    """

    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """The plain mean of what is left."""
        count = jnp.sum(weight > 0)
        cut = jnp.minimum(attackers, (count - 1) // 2)

        def inner(part: Array) -> Array:
            place = jnp.arange(len(part))[:, None]
            kept = (place >= cut) & (place < count - cut)
            total = jnp.sum(jnp.where(kept, _ascending(part, weight), 0), axis=0)
            return total / (count - 2 * cut)

        return _by_chunk(inner, upload)

    def most_attackers(self, clients: int) -> int:
        """Fewer than half."""
        return (clients - 1) // 2


@dataclasses.dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the uploads nearest to others (Blanchard et al., NeurIPS 2017).

    The score of an upload is the sum of its squared distances to the m - f - 2 nearest
    others, of m uploads and f attackers; where uploads are lost, m is what arrived, and
    at least one neighbour counts.
    """

    selected: int = schema.at_least(
        0, default=0, meaning="uploads that the mean is of; 0: all but f"
    )

    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """The plain mean of the uploads with the least scores."""
        counts = weight > 0
        score = krum_scores(upload, counts, attackers)
        selected = self.selected or jnp.maximum(jnp.sum(counts) - attackers, 1)
        rank = jnp.argsort(_by_score(score, counts))
        # One at least; none beyond it whose distances are infinite.
        chosen = (rank == 0) | ((rank < selected) & jnp.isfinite(score))
        chosen = chosen.astype(jnp.float32)
        return _by_chunk(lambda part: trees.weighted_mean(part, chosen), upload)

    def most_attackers(self, clients: int) -> int:
        """By m >= 2 f + 3."""
        return (clients - 3) // 2

    def problems(self, study: Any) -> Iterator[str]:
        """More selected than there are honest clients in a round."""
        clients, known = study.clients_in_round, study.aggregation.attackers
        if self.selected > clients - known:
            yield (
                f"methods.multi_krum.selected = {self.selected}: must be <="
                f" {clients - known}, the {clients} clients of a round but"
                f" aggregation.attackers = {known}"
            )


@dataclasses.dataclass(frozen=True)
class Krum(Rule):
    """The one upload that is nearest to others (Blanchard et al., NeurIPS 2017).

    That of the least score, see `MultiKrum`.
    """

    def combine(self, upload: Tree, weight: Array, attackers: int) -> Tree:
        """An upload as it was sent."""
        counts = weight > 0
        score = krum_scores(upload, counts, attackers)
        return trees.take(upload, _by_score(score, counts)[0])

    def most_attackers(self, clients: int) -> int:
        """By m >= 2 f + 3."""
        return (clients - 3) // 2


def krum_scores(upload: Tree, counts: Array, attackers: int) -> Array:
    """Krum's score [m] of each upload; infinite for those that do not count.

    Args:
      upload: leaves [m, ...].
      counts: [m] bool.
      attackers: f.
    """
    square = squared_distances(upload)
    usable = counts[None] & counts[:, None] & ~jnp.eye(len(counts), dtype=bool)
    # An upload that is not finite is far from all.
    square = jnp.where(usable & jnp.isfinite(square), square, jnp.inf)
    near = jnp.maximum(jnp.sum(counts) - attackers - 2, 1)
    nearest = jnp.arange(len(counts))[None] < near
    score = jnp.sum(jnp.where(nearest, jnp.sort(square), 0), axis=1)
    # Of a single upload, which has no others, the score is 0.
    alone = jnp.sum(counts) == 1
    return jnp.where(counts, jnp.where(alone, 0, score), jnp.inf)


def _by_score(score: Array, counts: Array) -> jax.Array:
    """Uploads [m] by ascending score; those that do not count come last.

    Args:
      score: [m], the result of `krum_scores`.
      counts: [m] bool.
    """
    return jnp.lexsort((score, ~counts))


def squared_distances(upload: Tree) -> Array:
    """Squared Euclidean distances [m, m] float32 of uploads, leaves [m, ...].

    By differences, as a matrix product would lose what nearby uploads differ in.
    """

    def add(total: Array, first: Array | int, part: Array) -> Array:
        del first
        part = part.astype(jnp.float32)
        return total + jnp.sum((part[:, None] - part[None]) ** 2, axis=-1)

    leaves = jax.tree.leaves(upload)
    total = jnp.zeros((len(leaves[0]),) * 2)
    for leaf in leaves:
        total = _over_chunks(add, total, leaf)
    return total


def _by_chunk(function: Callable[[Array], Array], upload: Tree) -> Tree:
    """What `function` makes of m values of each coordinate, from [m, c] to [c]."""

    def of_leaf(leaf: Array) -> Array:
        def write(found: Array, first: Array | int, part: Array) -> Array:
            new = function(part).astype(found.dtype)
            return jax.lax.dynamic_update_slice(found, new, (first,))

        found = jnp.zeros(leaf[0].size, leaf.dtype)
        return _over_chunks(write, found, leaf).reshape(leaf.shape[1:])

    return jax.tree.map(of_leaf, upload)


def _over_chunks(
    step: Callable[[Array, Array | int, Array], Array], carry: Array, leaf: Array
) -> Array:
    """Fold `step` over chunks of the coordinates of a leaf [m, ...].

    Args:
      step: from the carry, the number of the chunk's first coordinate, and the chunk
        [m, c] to the new carry.
      carry: before the first chunk.
      leaf: of m uploads.
    """
    array = leaf.reshape(len(leaf), -1)
    size = max(CHUNK // len(array), 1)
    count, rest = divmod(array.shape[1], size)

    def body(i: Array, carry: Array) -> Array:
        first = i * size
        part = jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)
        return step(carry, first, part)

    if count:
        carry = jax.lax.fori_loop(0, count, body, carry)
    return step(carry, count * size, array[:, count * size :]) if rest else carry


def _ascending(part: Array, weight: Array) -> Array:
    """The values [m, c] of each coordinate in order, those that do not count last.

    NaN is sorted behind all numbers, so that an attacker's counts as the largest.
    """
    return jnp.sort(jnp.where((weight > 0)[:, None], part, jnp.nan), axis=0)


RULES: Registry[type[Rule]] = Registry(
    "aggregation.rule",
    {
        "mean": Mean,
        "median": Median,
        "trimmed_mean": TrimmedMean,
        "krum": Krum,
        "multi_krum": MultiKrum,
    },
    subclass_of(Rule),
)


@dataclasses.dataclass(frozen=True)
class Aggregation(schema.Group):
    """How the server combines the uploads of a round."""

    rule: str = schema.component(
        RULES, default="mean", meaning="what the algorithm gets in place of the mean"
    )
    attackers: int = schema.at_least(
        0,
        default=1,
        meaning="f, hostile uploads of a round that the rule must withstand; of"
        " trimmed_mean: values left out at each end",
    )

    def build(self, methods: dict[str, Any]) -> Rule:
        """The rule, with its fields from `methods`.

        Raises:
          ConfigError: it is unknown, or a field of it is wrong.
        """
        return build(RULES, self.rule, methods)

    def withstands(self, study: Any) -> int:
        """Attackers in a round of the study that the rule is to withstand."""
        rule = self.build(study.methods)
        most = rule.most_attackers(study.clients_in_round)
        return self.attackers if rule.is_told else most

    def problems(self, study: Any) -> Iterator[str]:
        """More attackers than the rule withstands; uploads that are not alike."""
        rule = self.build(study.methods)
        if not rule.needs_each:
            return
        told = f"aggregation.rule = {self.rule!r}"
        yield from uploads.problems(study, told, "mean")
        clients = study.clients_in_round
        most = rule.most_attackers(clients)
        if most < 0:
            yield f"{told}: must be another for {clients} clients in a round: too few"
        elif self.attackers > most:
            yield (
                f"aggregation.attackers = {self.attackers}: must be <= {most} for"
                f" {told} and {clients} clients in a round"
            )
