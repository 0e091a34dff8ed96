"""What the teacher sees on the clients' generated images, against the clients' labels.

A client cannot know it: the classifier of a client with one class takes everything for
that class. The server can, from generators and label counts alone.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs
from mosaic_jax.core.types import Array, Client, Generators, Struct, Teacher
from mosaic_jax.data import augment
from mosaic_jax.fl import gan
from mosaic_jax.server import distillation, mosaic, refinement
from mosaic_jax.stages import films, sections
from mosaic_jax.stages.base import Context

_log = logging.getLogger(__name__)

# Images of each generator that the teacher is asked about.
NUM_IMAGES = 128
# A class counts as lost if the teacher names it on less than this part of the images
# that should show it, and a client is told if it does so for its classes together.
LOST_BELOW, TOLD_BELOW = 0.1, 0.5
# Columns of the images by class.
REAL, GENERATED = "real", "generated"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What the teacher names on each client's images.

    Attributes:
      number: [C], numbers of the clients.
      alive: [C] bool, False for clients whose generators have collapsed.
      label_count: [C, K], images of each class at each client.
      seen: [C, K] float, share of each class among the teacher's answers on the
        client's generated images; rows sum to 1.
      generated: uint8 [R, n, H, W, D], of the first classes the images that the
        teacher takes for them with most certainty; black where there are fewer.
    """

    number: np.ndarray
    alive: np.ndarray
    label_count: np.ndarray
    seen: np.ndarray
    generated: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """[C, K] float, of the labels of each client; rows sum to 1."""
        return self.label_count / self.label_count.sum(axis=1, keepdims=True)

    @property
    def held(self) -> np.ndarray:
        """[C, K] bool, which classes each client counts as holding."""
        return np.asarray(distillation.holds(self.label_count))

    @property
    def of_own(self) -> np.ndarray:
        """[C], share of each client's images that show as much of a class as it holds.

        The overlap of the two distributions: 1 where they are equal, 0 where the
        teacher names none of the client's classes.
        """
        return np.minimum(self.share, self.seen).sum(axis=1)

    @property
    def of_classes(self) -> np.ndarray:
        """[K], how often a class is seen for once that it should be, capped at 1.

        Over the images of all clients together; NaN for a class that nobody holds.
        """
        share, seen = (each[self.alive].sum(axis=0) for each in (self.share, self.seen))
        with np.errstate(invalid="ignore"):
            return np.where(share > 0, np.minimum(seen / share, 1), np.nan)

    @property
    def lost(self) -> list[int]:
        """Classes that the teacher hardly ever sees."""
        return np.flatnonzero(self.of_classes < LOST_BELOW).tolist()

    def tell(self) -> None:
        """Log what the student cannot learn from these images, by class and client."""
        if self.lost:
            held = self.held[:, self.lost].any(axis=1)
            _log.warning(
                "hardly seen on generated images, on less than %g of their shares of"
                " the labels: classes %s, held by %s",
                LOST_BELOW,
                ", ".join(map(str, self.lost)),
                sections.named(self.number[held].tolist()),
            )
        weak = self.alive & (self.of_own < TOLD_BELOW)
        if weak.any():
            _log.warning(
                "the teacher finds their clients' classes on less than %.0f %% of the"
                " images of %s",
                100 * TOLD_BELOW,
                sections.named(self.number[weak].tolist()),
            )

    @property
    def results(self) -> dict[str, Any]:
        """What a stage's record has of it."""
        return {
            "seen": np.round(self.seen, 4).tolist(),
            "own_classes": np.round(self.of_own, 4).tolist(),
            "lost_classes": self.lost,
        }

    def outcome(self, real: np.ndarray) -> dict[str, Any]:
        """What a stage tells of it: fields of `Outcome`.

        Args:
          real: of `real_images`, for the classes that `generated` has.
        """
        classes = self.of_classes
        known = classes[~np.isnan(classes)]
        number: dict[str, Any] = {
            "card": "classes seen",
            "mean": float(known.mean()),
            "low": float(known.min()),
            "high": float(known.max()),
            "meaning": "How often the teacher names a class on generated images for"
            " once that the clients' labels would have it named, at most 1: mean, least"
            " and most over classes. At 0 a class is lost.",
        }
        return {
            "results": self.results,
            "headline": {"class_coverage": number},
            "clients": {
                "own classes on its images": {
                    int(n): f"{100 * own:.0f} %"
                    for n, own in zip(self.number, self.of_own, strict=True)
                }
            },
            "section": self.section(),
            "pictures": {REAL: real, GENERATED: self.generated},
        }

    def section(self) -> sections.Section:
        """What the teacher names on the first clients' images, and those it does."""
        first = slice(films.NUM_CLIENTS)
        names = ", ".join(map(str, self.lost)) or "none"
        heat = sections.Heat(
            name="coverage",
            values=np.round(self.seen[first], 4).tolist(),
            xlabel="class that the teacher names",
            ylabel="client",
            label="share of generated images",
            caption="What the teacher sees on each client's generated images"
            f" ({NUM_IMAGES} of each). Classes that it hardly ever sees: {names}.",
        )
        shown, every = self.generated.shape[0], self.seen.shape[1]
        which = "each class" if shown == every else f"each of the first {shown} classes"
        grid = sections.Strips(
            name="classes",
            head=("class", REAL, GENERATED),
            names=[f"class {k}" for k in range(len(self.generated))],
            columns=(REAL, GENERATED),
            caption=f"Images of {which} that clients hold, and the generated ones of"
            " all clients that the teacher takes for it with most certainty. Black:"
            " there are no more.",
        )
        return sections.Section("Generators", (heat, grid))


class Best(Struct):
    """Of each of R classes the n images that a teacher takes for it most surely.

    Attributes:
      image: uint8 [R, n, H, W, D], black where there are fewer.
      certainty: [R, n], the teacher's probability of the class; 0 where black.
    """

    image: Array
    certainty: Array

    @classmethod
    def none(cls, num_classes: int, image_shape: tuple[int, ...]) -> "Best":
        """Before any image.

        Args:
          num_classes: R.
          image_shape: (H, W, D).
        """
        shape = num_classes, films.NUM_IMAGES
        return cls(jnp.zeros((*shape, *image_shape), jnp.uint8), jnp.zeros(shape))

    def with_images(self, image: Array, logits: Array, counts: Array) -> "Best":
        """The best of these and of further images.

        Args:
          image: uint8 [B, H, W, D].
          logits: [B, K] of the teacher, K >= R.
          counts: [] bool, whether the images count.
        """
        num_classes, count = self.certainty.shape
        probability = jax.nn.softmax(logits)
        is_named = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
        certainty = (probability * is_named * counts)[:, :num_classes].T
        certainty, place = jax.lax.top_k(
            jnp.concatenate([self.certainty, certainty], axis=1), count
        )

        def chosen(kept: Array, place: Array) -> Array:
            return jnp.concatenate([kept, image])[place]

        found = jax.lax.map(lambda each: chosen(*each), (self.image, place))
        shown = (certainty > 0)[..., None, None, None]
        return Best(jnp.where(shown, found, 0), certainty)


def real_images(context: Context) -> np.ndarray:
    """uint8 [R, n, H, W, D], of the first classes the first images at clients.

    Black where they hold fewer.
    """
    data = context.data.clients
    label = np.asarray(data.images.label)
    held = np.zeros(len(label), bool)
    index, size = np.asarray(data.client.index), np.asarray(data.client.size)
    held[index[np.arange(index.shape[1]) < size[:, None]]] = True
    shape = _num_shown(context), films.NUM_IMAGES, *context.data.info.image_shape
    found = np.zeros(shape, np.uint8)
    for k, place in enumerate(found):
        rows = np.flatnonzero(held & (label == k))[: films.NUM_IMAGES]
        place[: len(rows)] = np.asarray(data.images.image[rows])
    return found


def _num_shown(context: Context) -> int:
    """R, number of classes whose images are shown."""
    return min(context.data.info.num_classes, films.NUM_CLIENTS)


def of_generators(
    context: Context,
    ensemble: mosaic.Ensemble,
    model_gan: gan.Gan,
    teacher: Teacher,
    generators: Generators,
    client: Client,
) -> Coverage:
    """What the teacher names on images of all generators, and tell what is missing.

    Args:
      context: of the stage.
      ensemble: the teacher's networks.
      model_gan: whose generators these are.
      teacher: that names the classes.
      generators: of the clients, [C, ...].
      client: of the clients; only numbers and label counts are read.
    """

    @programs.jit
    def see(teacher: Teacher, generators: Generators, key: Array) -> tuple[Best, Array]:
        def one(best: Best, each: Any) -> tuple[Best, Array]:
            generator, alive, number = each
            image = refinement.drawn(
                model_gan, generator, prng.at(key, number), NUM_IMAGES
            )
            logits = ensemble.logits(teacher, image)
            surest = best.with_images(augment.to_uint8(image), logits, alive)
            return surest, refinement.named(logits)

        numbers = jnp.asarray(client.number)
        rows = generators.model, jnp.asarray(generators.alive), numbers
        none = Best.none(_num_shown(context), context.data.info.image_shape)
        return jax.lax.scan(one, none, rows)

    key = prng.named(context.key, "coverage")
    best, named = see(teacher, generators, key)
    found = Coverage(
        number=np.asarray(client.number),
        alive=np.asarray(generators.alive),
        label_count=np.asarray(client.label_count, float),
        seen=np.asarray(named, float),
        generated=np.asarray(best.image),
    )
    found.tell()
    return found
