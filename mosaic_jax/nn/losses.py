"""Pure losses: classification, distillation, and the shaping of client generators.

Logits are unnormalised float32 [B, K]; every result is a scalar in nats unless said
otherwise. `KL(p || q) = sum p log(p / q)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import schema, trees
from mosaic_jax.core.registry import Registry
from mosaic_jax.core.types import Array, Tree


def masked_mean(value: Array, mask: Array | None = None) -> Array:
    """Mean of `value` [B] where `mask` [B] holds; 0 where it never does. None: all."""
    if mask is None:
        return jnp.mean(value)
    return jnp.sum(jnp.where(mask, value, 0)) / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(logits: Array, label: Array, mask: Array | None = None) -> Array:
    """Mean cross-entropy with integer labels.

    Args:
      logits: [B, K].
      label: [B] int32, 0..K-1.
      mask: [B] bool, entries that count; None: all.
    """
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return masked_mean(loss, mask)


def kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(softmax p || softmax q) of logits [B, K], per sample, [B]."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def jensen_shannon(a_logits: Array, b_logits: Array) -> Array:
    """Jensen-Shannon divergence of two softmaxes, per sample, [B], at most ln 2."""
    log_a, log_b = jax.nn.log_softmax(a_logits), jax.nn.log_softmax(b_logits)
    middle = jnp.logaddexp(log_a, log_b) - jnp.log(2.0)
    # `middle` is the log of a normalised distribution, so softmax leaves it as it is.
    return 0.5 * (kl(log_a, middle) + kl(log_b, middle))


def logit_mean_divergence(a_logits: Array, b_logits: Array) -> Array:
    """Mean divergence of the softmax of the mean logits from both softmaxes, [B].

    Reference: the published code calls this the Jensen-Shannon divergence, which has
    the mean of the softmaxes instead.
    """
    middle = (a_logits + b_logits) / 2
    return 0.5 * (kl(middle, a_logits) + kl(middle, b_logits))


def _is_divergence(found: Any) -> bool:
    logits = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    return jax.eval_shape(found, logits, logits).shape == (2,)


# (logits [B, K], logits [B, K]) -> [B], nats.
DIVERGENCES: Registry[Callable[[Array, Array], Array]] = Registry(
    "distill.divergence",
    {"jsd": jensen_shannon, "logit_mean": logit_mean_divergence},
    schema.Allowed("a function of two logits [B, K] that returns [B]", _is_divergence),
)


def distillation(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    divergence: str,
    weight: Array | None = None,
) -> Array:
    """Distillation objective of Mosaic (arXiv 2505.19699).

    The mean over the batch of `alpha T^2 KL(softmax(t/T) || softmax(s/T)) +
    (1 - alpha) CE(s, argmax t) + beta D(s/T, t/T)` for student s and teacher t.

    Args:
      student_logits: [B, K] float32, unnormalised.
      teacher_logits: [B, K] float32, unnormalised; no gradient flows through them.
      temperature: T > 0.
      alpha: weight of the soft targets, in [0, 1].
      beta: weight of the divergence D, at least 0.
      divergence: "jsd" (true Jensen-Shannon), "logit_mean" (published code), or the
        import path "package.module:function" of another one.
      weight: [B] float32, not negative, of the samples in the mean; None: all 1.

    Returns:
      [] float32, nats.

    Raises:
      ConfigError: `divergence` is unknown or cannot be imported.
    """
    distance = DIVERGENCES.find(divergence)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    soft = temperature**2 * kl(teacher, student)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(
        student_logits, jnp.argmax(teacher_logits, axis=-1)
    )
    loss = alpha * soft + (1 - alpha) * hard + beta * distance(student, teacher)
    if weight is None:
        return jnp.mean(loss)
    return jnp.sum(weight * loss) / jnp.maximum(jnp.sum(weight), 1e-12)


def adversarial(logits: Array, real: bool, mask: Array | None = None) -> Array:
    """Binary cross-entropy of a discriminator (Goodfellow et al., 2014).

    Args:
      logits: [B], positive for real.
      real: what the loss wants the samples to be taken for.
      mask: [B] bool, entries that count; None: all.
    """
    loss = jax.nn.softplus(-logits if real else logits)
    return masked_mean(loss, mask)


def entropy(logits: Array) -> Array:
    """Mean entropy of the softmax of logits [B, K]; low for confident predictions."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def diversity(logits: Array, target: Array) -> Array:
    """Distance of the mean prediction over the batch from target class frequencies.

    `sum_k pbar_k log(pbar_k / (K q_k))`. For a uniform target q this is the published
    `sum_k pbar_k log pbar_k`, whose minimum -ln K has equally many samples per class.

    Args:
      logits: [B, K].
      target: q, [K] float32, positive, sums to 1.
    """
    mean = jnp.mean(jax.nn.softmax(logits), axis=0)
    spread = jnp.sum(jax.scipy.special.xlogy(mean, mean))
    return spread - jnp.sum(mean * jnp.log(len(target) * target))


def pairwise_diversity(image: Array, noise: Array, *, power: int) -> Array:
    """Diversity loss `exp(-mean over pairs of d(x_a, x_b) d(z_a, z_b))`, in (0, 1].

    Args:
      image: x, [B, ...].
      noise: z, [B, nz]; its distance d is the mean squared difference.
      power: of the differences of images in their distance d: 1 for the mean absolute
        difference (FedFTG), 2 for the mean squared one (DFRD).
    """
    flat = image.reshape(len(image), -1)
    on_images = jax.lax.map(
        lambda one: jnp.mean(jnp.abs(flat - one[None]) ** power, axis=1), flat
    )
    on_noise = jnp.mean((noise[:, None] - noise[None]) ** 2, axis=-1)
    return jnp.exp(-jnp.mean(on_images * on_noise))


def statistics_distance(moments: Tree, batch_stats: Tree) -> Array:
    """Distance of a batch's moments from running statistics (Yin et al., 2020).

    The sum over batch-norm layers of `||mean - running mean||_2 + ||var - running
    var||_2`.

    Args:
      moments: mean and biased variance of the batch per layer, a tree like
        `batch_stats`.
      batch_stats: the running statistics that the batch should reproduce.
    """

    # The gradient of the square root is infinite at 0, where statistics agree exactly.
    def distance(a: Array, b: Array) -> Array:
        square = jnp.sum((a - b) ** 2)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    return trees.total(jax.tree.map(distance, moments, batch_stats))
