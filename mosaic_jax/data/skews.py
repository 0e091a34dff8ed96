"""Splits by classes per client and by numbers of images (NumPy only)."""

import numpy as np

from mosaic_jax.core import errors

# Images that each client has at least where sizes are drawn, if there are so many.
LEAST = 10


def pathological(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    classes_per_client: int,
) -> list[np.ndarray]:
    """Clients with a fixed number of classes, which share their images evenly.

    Each client takes the classes that the fewest clients before it took, drawn at
    random among equals. A class that no client takes is left out.

    Args:
      labels: [N] integers, 0..K-1.
      num_clients: C.
      np_rng: draws classes and images.
      classes_per_client: at most K.

    Raises:
      DataError: there are fewer classes.
    """
    known = np.unique(labels)
    if classes_per_client > len(known):
        raise errors.DataError(
            f"data.classes_per_client = {classes_per_client}: must be <= {len(known)},"
            " the number of classes"
        )
    holders: list[list[int]] = [[] for _ in known]
    for client in range(num_clients):
        taken = [len(one) for one in holders]
        order = np.lexsort((np_rng.rand(len(known)), np.array(taken)))
        for k in order[:classes_per_client]:
            holders[k].append(client)
    clients: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label, members in zip(known, holders, strict=True):
        images = np_rng.permutation(np.flatnonzero(labels == label))
        parts = np.array_split(images, max(len(members), 1))
        for client, part in zip(members, parts, strict=False):
            clients[client].append(part)
    return [np.concatenate(parts) for parts in clients]


def shards(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    classes_per_client: int,
) -> list[np.ndarray]:
    """Equal random shards of the images in the order of their classes.

    So do McMahan et al. (2017), with two shards for each client: a client has that
    many classes at most, unless a class ends within one of its shards.

    Args:
      labels: [N] integers, 0..K-1.
      num_clients: C.
      np_rng: draws shards, and the order of the images of a class.
      classes_per_client: shards for each client.

    Raises:
      DataError: there are more shards than images.
    """
    count = num_clients * classes_per_client
    if count > len(labels):
        raise errors.DataError(
            f"data.classes_per_client = {classes_per_client}: must be <="
            f" {len(labels) // num_clients} for data.split = 'shards', {len(labels)}"
            f" images and {num_clients} clients"
        )
    order = np.lexsort((np_rng.rand(len(labels)), labels))
    parts = np.array_split(order, count)
    dealt = np_rng.permutation(count).reshape(num_clients, classes_per_client)
    return [np.concatenate([parts[i] for i in mine]) for mine in dealt]


def by_column(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    group: np.ndarray,
) -> list[np.ndarray]:
    """One client for each group of images, such as those of a writer or a hospital.

    Where there are more groups than clients, clients are drawn among the groups, as the
    users of LEAF (Caldas et al., 2018) are; the images of all others are left out.

    Args:
      labels: [N] integers; they do not matter.
      num_clients: C.
      np_rng: draws groups.
      group: [N] integers or text; clients are in the order of their groups.

    Raises:
      DataError: there are fewer groups than clients.
    """
    known, of = np.unique(group, return_inverse=True)
    if num_clients > len(known):
        raise errors.DataError(
            f"data.num_clients = {num_clients}: must be <= {len(known)}, the number of"
            " groups among the training images"
        )
    drawn = np.sort(np_rng.permutation(len(known))[:num_clients])
    order = np.argsort(of, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(of, minlength=len(known)))[:-1])
    return [parts[i] for i in drawn]


def quantity(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    sigma: float,
) -> list[np.ndarray]:
    """Random images in numbers whose logarithm is normally distributed.

    Args:
      labels: [N] integers; they do not matter.
      num_clients: C.
      np_rng: draws numbers and images.
      sigma: standard deviation of the logarithm; 0: all have the same number.
    """
    least = min(LEAST, len(labels) // num_clients)
    share = np.exp(sigma * np_rng.randn(num_clients))
    share /= share.sum()
    spare = len(labels) - num_clients * least
    # Whole images, so that none is left over.
    cuts = (np.cumsum(share) * spare).round().astype(int)
    cuts += least * np.arange(1, num_clients + 1)
    return np.split(np_rng.permutation(len(labels)), cuts[:-1])
