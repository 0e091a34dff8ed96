"""Class prototypes: k-means centres of a client's features (Mosaic, stage 5)."""

import jax
import jax.numpy as jnp

from mosaic_jax.core import prng
from mosaic_jax.core.types import Array, Client, LabelledImages, ModelState
from mosaic_jax.fl import evaluation
from mosaic_jax.nn.classifier import Classifier


def features(
    classifier: Classifier,
    model: ModelState,
    client: Client,
    images: LabelledImages,
    *,
    batch_size: int,
) -> Array:
    """Penultimate features of a client's images.

    Args:
      classifier: the network.
      model: its variables.
      client: whose images are taken, with the padding of its index.
      images: of all clients.
      batch_size: images in a batch.

    Returns:
      [M, F] float32.
    """
    return evaluation.predict(
        lambda x: classifier.features(model, x),
        images.image[client.index],
        batch_size=batch_size,
    )


def cluster_classes(
    key: Array,
    feature: Array,
    label: Array,
    mask: Array,
    *,
    num_classes: int,
    num_clusters: int,
    num_steps: int,
) -> tuple[Array, Array]:
    """Cluster the images of each of a client's classes by their features.

    Args:
      key: random key of the client.
      feature: [M, F] float32, of its images.
      label: [M] int32, classes of the images.
      mask: [M] bool, False for entries that only pad the others.
      num_classes: K.
      num_clusters: k, clusters of a class.
      num_steps: Lloyd iterations.

    Returns:
      The cluster of each image within its class, [M] int32, k for padding; and which
      clusters are not empty, [K, k] bool.
    """

    def one_class(found: Array, k: Array) -> tuple[Array, Array]:
        of_class = mask & (label == k)
        cluster, held = kmeans(
            prng.at(key, k),
            feature,
            of_class,
            num_clusters=num_clusters,
            num_steps=num_steps,
        )
        return jnp.where(of_class, cluster, found), held

    padding = jnp.full(len(label), num_clusters, jnp.int32)
    return jax.lax.scan(one_class, padding, jnp.arange(num_classes))


def centres(
    feature: Array, label: Array, cluster: Array, *, num_classes: int, num_clusters: int
) -> Array:
    """Centres of the clusters that `cluster_classes` found.

    Args:
      feature: [M, F] float32, of the client's images and the padding of its index.
      label: [M] int32, classes of the images.
      cluster: [M] int32, of each image within its class.
      num_classes: K.
      num_clusters: k, clusters of a class.

    Returns:
      [K, k, F] float32, 0 for empty clusters.
    """

    def one_class(k: Array) -> Array:
        member = jax.nn.one_hot(cluster, num_clusters) * (label == k)[:, None]
        return cluster_means(feature, member)[0]

    return jax.lax.map(one_class, jnp.arange(num_classes))


def kmeans(
    key: Array, feature: Array, mask: Array, *, num_clusters: int, num_steps: int
) -> tuple[Array, Array]:
    """K-means with k-means++ seeds (Arthur and Vassilvitskii, 2007).

    Fewer than `num_clusters` rows make one cluster, whose centre is their mean, as in
    the published code.

    Args:
      key: random key.
      feature: [M, F] float32.
      mask: [M] bool, rows to cluster.
      num_clusters: k.
      num_steps: Lloyd iterations.

    Returns:
      Cluster of each row, [M] int32, and which clusters are not empty, [k] bool.
    """
    count = jnp.sum(mask)

    def distance(centres: Array) -> Array:
        cross = feature @ centres.T
        square = jnp.sum(feature**2, 1)[:, None] + jnp.sum(centres**2, 1)[None]
        return jnp.maximum(square - 2 * cross, 0)

    def seed(i, centres):
        # Centres that are not drawn yet are at infinity.
        drawn = jnp.arange(num_clusters)[None] < i
        near = jnp.min(jnp.where(drawn, distance(centres), jnp.inf), 1)
        near = jnp.where(i == 0, 1.0, near)
        # The constant keeps a draw possible if all rows are the same.
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
    """Means [k, F] of clusters of rows [M, F], and which are not empty, [k] bool.

    `member` [M, k] is 1 where a row belongs to a cluster, else 0.
    """
    count = jnp.sum(member, axis=0)
    return member.T @ feature / jnp.maximum(count, 1)[:, None], count > 0
