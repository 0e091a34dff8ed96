"""Whether generators are fit to teach: what can be told of them without data."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, sharing
from mosaic_jax.core.errors import MosaicError
from mosaic_jax.core.types import Array, Generators, ModelState
from mosaic_jax.fl import gan, parallel
from mosaic_jax.stages import measures, sections
from mosaic_jax.stages.base import Context

_log = logging.getLogger(__name__)

# Images of each generator that are looked at.
NUM_IMAGES = 64
# Told of a generator: images paler than this part of the clients' median contrast,
FAINT_BELOW = 0.5
# images nearer to each other than this part of their usual distance,
COPIES_BELOW = 0.1
# moments further from the running ones than so many times the clients' median.
FAR_ABOVE = 2.0
COLLAPSED = "collapsed"


@dataclasses.dataclass(frozen=True)
class Health:
    """What is told of the generators, [C] each.

    Attributes:
      number: of the clients.
      deviation: mean over pixels, on a scale of 2, of the deviation over images; near 0
        the generator has collapsed.
      contrast: mean over images of the deviation over pixels.
      nearest: see the function of this name; near 0 they are copies of a few.
      moments: mean over channels of the distance of the client's classifier's
        batch-norm means from their running ones, in running deviations; 0 for networks
        without batch-norm.
      collapse_below: deviation below which a generator counts as collapsed.
    """

    number: np.ndarray
    deviation: np.ndarray
    contrast: np.ndarray
    nearest: np.ndarray
    moments: np.ndarray
    collapse_below: float

    @property
    def alive(self) -> np.ndarray:
        """[C] bool, False for generators that collapsed."""
        return self.deviation >= self.collapse_below

    @property
    def found(self) -> dict[str, np.ndarray]:
        """Which generators each complaint is about, [C] bool."""
        # Where all have collapsed there is nothing to compare with.
        usual = self.alive if self.alive.any() else ~self.alive
        contrast = np.median(self.contrast[usual])
        moments = np.median(self.moments[usual])
        return {
            COLLAPSED: ~self.alive,
            "low contrast": self.contrast < FAINT_BELOW * contrast,
            "near-copies": self.nearest < COPIES_BELOW,
            "unlike what the classifier knows": self.moments > FAR_ABOVE * moments,
        }

    def tell(self) -> None:
        """Log what is wrong, a line for each complaint."""
        for word, of in self.found.items():
            if of.any():
                clients = sections.named(self.number[of].tolist())
                left_out = ", left out" if word == COLLAPSED else ""
                _log.warning("generators of %s: %s%s", clients, word, left_out)

    @property
    def status(self) -> dict[int, str]:
        """A line on each generator, by its client's number."""
        found = self.found
        return {
            number: ", ".join(word for word, of in found.items() if of[i]) or "kept"
            for i, number in enumerate(self.number.tolist())
        }


def of_generators(
    context: Context,
    model_gan: gan.Gan,
    generators: ModelState,
    classifiers: ModelState,
    collapse_below: float,
) -> Health:
    """Look at images of all generators, and tell what is wrong.

    Args:
      context: of the stage.
      model_gan: whose generators these are.
      generators: of the clients, [C, ...].
      classifiers: the clients' own, [C, ...].
      collapse_below: deviation below which a generator counts as collapsed.

    Raises:
      MosaicError: all have collapsed.
    """

    @programs.jit
    def look(generators: ModelState, classifiers: ModelState, key: Array) -> dict:
        z = jax.random.normal(key, (NUM_IMAGES, model_gan.latent_dim))
        z = sharing.spread(z)
        return parallel.expert_map(
            lambda generator, classifier: measure(model_gan, generator, classifier, z),
            generators,
            classifiers,
        )

    key = prng.named(context.key, "collapse")
    found = jax.device_get(look(generators, classifiers, key))
    health = Health(
        number=np.asarray(context.data.clients.client.number),
        collapse_below=collapse_below,
        **{name: np.asarray(value) for name, value in found.items()},
    )
    health.tell()
    check_alive(Generators(generators, jnp.asarray(health.alive)), collapse_below)
    return health


def measure(
    model_gan: gan.Gan, generator: ModelState, classifier: ModelState, z: Array
) -> dict[str, Array]:
    """The numbers of `Health` for one generator, [] each.

    Args:
      model_gan: whose generator this is.
      generator: of one client.
      classifier: the client's own.
      z: [n, nz] noise, n > 1.
    """
    image = model_gan.sample(generator, z)
    return {
        "deviation": jnp.mean(jnp.std(image, axis=0)),
        "contrast": jnp.mean(jnp.std(image, axis=(1, 2, 3))),
        "nearest": nearest(image.reshape(len(z), -1)),
        "moments": moments_distance(model_gan, classifier, image),
    }


def nearest(points: Array) -> Array:
    """Median distance of `points` [n, d] to the nearest other one, relative, [].

    It is told as a share of the root mean square distance of two of them, so that it is
    in [0, 1] or a little more; 0 where all are equal.
    """
    count = len(points)
    square, _ = measures.nearest(points, points, ~jnp.eye(count, dtype=bool))
    mean = 2 * jnp.sum(jnp.var(points, axis=0)) * count / (count - 1)
    return jnp.median(jnp.sqrt(square)) / jnp.sqrt(jnp.maximum(mean, 1e-12))


def moments_distance(model_gan: gan.Gan, classifier: ModelState, image: Array) -> Array:
    """How far the means before batch-norm lie from running ones, in deviations, [].

    0 for networks without the batch-norm of `nn.norm`.

    Args:
      model_gan: with the network.
      classifier: of one client.
      image: signed images [n, H, W, D] of its generator.
    """
    network, (_, *shape) = model_gan.classifier, image.shape
    if not network.sows_moments((shape[0], shape[1], shape[2])):
        return jnp.zeros(())
    _, moments = network.logits_and_moments(classifier, image)
    apart = [
        jnp.abs(here["mean"] - usual["mean"]) / jnp.sqrt(usual["var"] + 1e-5)
        for here, usual in zip(
            _layers(moments), _layers(classifier.batch_stats), strict=True
        )
    ]
    return jnp.mean(jnp.concatenate(apart))


def _layers(tree: dict) -> list[dict[str, Array]]:
    """The moments of each batch-norm layer, in the order of their names."""
    if "mean" in tree:
        return [tree]
    return [layer for name in sorted(tree) for layer in _layers(tree[name])]


def check_alive(generators: Generators, collapse_below: float) -> None:
    """Check that there are generators to draw images.

    Args:
      generators: of the clients.
      collapse_below: the setting by which one counts as collapsed.

    Raises:
      MosaicError: all have collapsed.
    """
    if not bool(generators.alive.any()):
        raise MosaicError(
            "generators: all have collapsed: train them longer (generators.epochs or"
            " generators.steps) or lower generators.collapse_below ="
            f" {collapse_below}"
        )
