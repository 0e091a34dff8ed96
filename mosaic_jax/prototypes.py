"""Class prototypes: k-means centres of a client's features (Mosaic, stage 5)."""

import jax
import jax.numpy as jnp

from mosaic_jax import evaluation, prng
from mosaic_jax.classifier import Classifier
from mosaic_jax.types import Array, Client, LabelledImages, ModelState


def features(
    classifier: Classifier,
    model: ModelState,
    client: Client,
    images: LabelledImages,
    *,
    batch_size: int,
) -> Array:
    """Penultimate features [M, F] of a client's images, `batch_size` at a time."""
    return evaluation.predict(
        lambda x: classifier.features(model, x),
        images.image[client.index],
        batch_size=batch_size,
    )


def cluster_classes(
    key: Array,
    feature: Array,
    client: Client,
    label: Array,
    *,
    num_clusters: int,
    num_steps: int,
) -> tuple[Array, Array]:
    """Cluster the images of each of a client's classes by their features.

    Args:
      key: of all clients.
      feature: [M, F].
      client: whose images they are.
      label: [M] int32.
      num_clusters: k, of a class.
      num_steps: of Lloyd's iterations.

    Returns:
      Cluster of each image within its class, [M] int32, k past the client's last
      image; which clusters exist, [K, k] bool.
    """
    mine = jnp.arange(len(label)) < client.size

    def one_class(found: Array, k: Array) -> tuple[Array, Array]:
        mask = mine & (label == k)
        cluster, held = kmeans(
            prng.at(key, client.number, k),
            feature,
            mask,
            num_clusters=num_clusters,
            num_steps=num_steps,
        )
        return jnp.where(mask, cluster, found), held

    nobody = jnp.full(len(label), num_clusters, jnp.int32)
    return jax.lax.scan(one_class, nobody, jnp.arange(len(client.label_count)))


def centres(
    feature: Array, label: Array, cluster: Array, *, num_classes: int, num_clusters: int
) -> Array:
    """Means [K, k, F] of `feature` [M, F] over the clusters of `cluster_classes`."""

    def one_class(k: Array) -> Array:
        member = jax.nn.one_hot(cluster, num_clusters) * (label == k)[:, None]
        return cluster_means(feature, member)[0]

    return jax.lax.map(one_class, jnp.arange(num_classes))


def kmeans(
    key: Array, feature: Array, mask: Array, *, num_clusters: int, num_steps: int
) -> tuple[Array, Array]:
    """Assign the masked rows to clusters by Lloyd's iterations after k-means++ seeds.

    With fewer than `num_clusters` rows all belong to one cluster: its centre is the
    mean, as published.

    Args:
      key: typed key.
      feature: [M, F] float32.
      mask: [M] bool, rows that take part.
      num_clusters: k.
      num_steps: Lloyd iterations.

    Returns:
      Cluster of each row [M] int32, and which clusters exist [k] bool.
    """
    count = jnp.sum(mask)

    def distance(centres: Array) -> Array:
        cross = feature @ centres.T
        square = jnp.sum(feature**2, 1)[:, None] + jnp.sum(centres**2, 1)[None]
        return jnp.maximum(square - 2 * cross, 0)

    def seed(i, centres):
        # Centres not drawn yet lie at infinity.
        drawn = jnp.arange(num_clusters)[None] < i
        near = jnp.min(jnp.where(drawn, distance(centres), jnp.inf), 1)
        near = jnp.where(i == 0, 1.0, near)
        # The floor keeps a draw possible where all rows coincide.
        log_p = jnp.where(mask, jnp.log(near + 1e-12), -jnp.inf)
        row = jax.random.categorical(jax.random.fold_in(key, i), log_p)
        return centres.at[i].set(feature[row])

    centres = jnp.zeros((num_clusters, feature.shape[1]), feature.dtype)
    centres = jax.lax.fori_loop(0, num_clusters, seed, centres)

    def lloyd(_, centres):
        member = jax.nn.one_hot(jnp.argmin(distance(centres), 1), num_clusters)
        mean, held = cluster_means(feature, member * mask[:, None])
        return jnp.where(held[:, None], mean, centres)

    centres = jax.lax.fori_loop(0, num_steps, lloyd, centres)
    cluster = jnp.argmin(distance(centres), 1)
    cluster = jnp.where(count < num_clusters, 0, cluster)
    held = jnp.zeros(num_clusters, bool).at[cluster].max(mask)
    return cluster, held


def cluster_means(feature: Array, member: Array) -> tuple[Array, Array]:
    """Means [k, F] of rows [M, F] by 0/1 membership [M, k], and which are not empty."""
    count = jnp.sum(member, axis=0)
    return member.T @ feature / jnp.maximum(count, 1)[:, None], count > 0
