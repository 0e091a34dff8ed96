"""Pure losses: classification, distillation, and the shaping of client generators.

Logits are unnormalised float32 [B, K]; every result is a scalar in nats unless said
otherwise. `KL(p || q) = sum p log(p / q)`.
"""

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.types import Array, Tree

DIVERGENCES = ("jsd", "logit_mean")


def masked_mean(value: Array, mask: Array | None = None) -> Array:
    """Mean of `value` [B] over the entries where `mask` [B] holds (0 if none does)."""
    if mask is None:
        return jnp.mean(value)
    return jnp.sum(jnp.where(mask, value, 0)) / jnp.maximum(jnp.sum(mask), 1)


def cross_entropy(logits: Array, label: Array, mask: Array | None = None) -> Array:
    """Mean cross-entropy of `logits` [B, K] with integer `label` [B]."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return masked_mean(loss, mask)


def kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(softmax p || softmax q) per sample, [B]."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def jensen_shannon(a_logits: Array, b_logits: Array) -> Array:
    """Jensen-Shannon divergence of the two softmaxes per sample, [B], at most ln 2."""
    log_a, log_b = jax.nn.log_softmax(a_logits), jax.nn.log_softmax(b_logits)
    middle = jnp.logaddexp(log_a, log_b) - jnp.log(2.0)
    # `middle` is the log of a normalised distribution, so softmax leaves it as it is.
    return 0.5 * (kl(log_a, middle) + kl(log_b, middle))


def logit_mean_divergence(a_logits: Array, b_logits: Array) -> Array:
    """Divergence from the softmax of the mean logits to each side, per sample, [B].

    Reference: the published code computes this under the name of a JSD, which it is
    not (the softmax of mean logits is not the mean of softmaxes).
    """
    middle = (a_logits + b_logits) / 2
    return 0.5 * (kl(middle, a_logits) + kl(middle, b_logits))


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
    """Distillation loss of Mosaic (arXiv 2505.19699, distillation objective).

    `alpha T^2 KL(softmax(t/T) || softmax(s/T)) + (1 - alpha) CE(s, argmax t)
    + beta D(s/T, t/T)` with means over the batch.

    Args:
      student_logits: [B, K] float32, unnormalised.
      teacher_logits: [B, K] float32, unnormalised; a constant for the gradient.
      temperature: T > 0.
      alpha: share of the soft target, in [0, 1].
      beta: weight of the divergence D, at least 0.
      divergence: "jsd" (true Jensen-Shannon) or "logit_mean" (published code).
      weight: [B] float32, not negative, or None for all 1; the mean is over it.

    Returns:
      [] float32, nats.

    Raises:
      ValueError: `divergence` is not known.
    """
    if divergence not in DIVERGENCES:
        allowed = " or ".join(DIVERGENCES)
        raise ValueError(f"divergence = {divergence!r}: must be {allowed}")
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    soft = temperature**2 * kl(teacher, student)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(
        student_logits, jnp.argmax(teacher_logits, axis=-1)
    )
    distance = jensen_shannon if divergence == "jsd" else logit_mean_divergence
    loss = alpha * soft + (1 - alpha) * hard + beta * distance(student, teacher)
    if weight is None:
        return jnp.mean(loss)
    return jnp.sum(weight * loss) / jnp.maximum(jnp.sum(weight), 1e-12)


def adversarial(logits: Array, real: bool, mask: Array | None = None) -> Array:
    """Binary cross-entropy of discriminator `logits` [B] against `real`."""
    loss = jax.nn.softplus(-logits if real else logits)
    return masked_mean(loss, mask)


def entropy(logits: Array) -> Array:
    """Mean entropy of softmax(logits): low where the classifier is sure."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


def diversity(logits: Array, target: Array) -> Array:
    """Distance of the batch-mean prediction from the wanted class shares.

    `sum_k pbar_k log(pbar_k / (K q_k))`: for a uniform target q this is the published
    `sum_k pbar_k log pbar_k`, lowest (-ln K) when samples spread over all classes.

    Args:
      logits: [B, K].
      target: q, [K] float32, positive, sums to 1.
    """
    mean = jnp.mean(jax.nn.softmax(logits), axis=0)
    spread = jnp.sum(jax.scipy.special.xlogy(mean, mean))
    return spread - jnp.sum(mean * jnp.log(len(target) * target))


def pairwise_diversity(image: Array, noise: Array, *, power: int) -> Array:
    """`exp(-mean over pairs of d(x_a, x_b) d(z_a, z_b))`: 1 if all are the same.

    Args:
      image: x, [B, ...].
      noise: z, [B, nz]; its d is the mean squared difference.
      power: 1 for mean absolute differences of images (FedFTG), 2 for mean squared
        ones (DFRD).
    """
    flat = image.reshape(len(image), -1)
    on_images = jax.lax.map(
        lambda one: jnp.mean(jnp.abs(flat - one[None]) ** power, axis=1), flat
    )
    on_noise = jnp.mean((noise[:, None] - noise[None]) ** 2, axis=-1)
    return jnp.exp(-jnp.mean(on_images * on_noise))


def statistics_distance(moments: Tree, batch_stats: Tree) -> Array:
    """Distance of a batch's moments from running statistics, over batch-norm layers.

    Sum of ||mean - running mean||_2 + ||var - running var||_2.

    Args:
      moments: the batch's own mean and (biased) variance per layer, a tree like
        `batch_stats`.
      batch_stats: the running statistics that the batch should reproduce.
    """

    # The square root has no gradient at 0, where the statistics agree exactly.
    def distance(a: Array, b: Array) -> Array:
        square = jnp.sum((a - b) ** 2)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    return sum(jax.tree.leaves(jax.tree.map(distance, moments, batch_stats)))
