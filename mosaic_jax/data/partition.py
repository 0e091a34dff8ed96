"""Splits of a labelled data set over clients (in host memory, with NumPy only)."""

import csv
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from mosaic_jax.core import errors, files
from mosaic_jax.data import limits

MIN_SIZE = 10
MAX_TRIES = 1000


def split(
    labels: np.ndarray, *, mode: str, num_clients: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Divide images over clients (Dirichlet splits as by Hsu et al., 2019).

    Args:
      labels: [N] integers, 0..K-1.
      mode: a name of `MODES`: "iid" (equal random parts), "dirichlet_unbalanced" (each
        class is divided in proportions from Dir(alpha) over the clients; a client that
        already has N / num_clients images gets no more; drawn again until each has at
        least 10), or "dirichlet_balanced" (each client draws N / num_clients images
        without replacement, with class weights from Dir(alpha)).
      num_clients: C >= 1.
      alpha: Dirichlet concentration, > 0; the smaller, the more the clients differ.
      seed: of NumPy's legacy RandomState, with which the published splits were made.

    Returns:
      C disjoint arrays of image numbers.

    Raises:
      DataError: there is no such split; the message says which setting to change.
    """
    labels = np.asarray(labels)
    if num_clients > len(labels):
        raise errors.DataError(
            f"data.num_clients = {num_clients}: must be <= {len(labels)}, the number of"
            " training images"
        )
    for field, value, least, most in (
        ("data.num_clients", num_clients, 1, np.inf),
        ("data.alpha", alpha, np.finfo(float).tiny, np.finfo(float).max),
        ("seed of the split", seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise errors.DataError(f"{field} = {value}: must be in [{least}, {most}]")
    if mode not in MODES:
        known = ", ".join(MODES)
        raise errors.DataError(f"data.split = {mode!r}: must be one of {known}")
    return MODES[mode](labels, num_clients, alpha, np.random.RandomState(seed))


def read(
    path: str | pathlib.Path, *, num_images: int, num_clients: int
) -> list[np.ndarray]:
    """Read a split from a file: numbers of training images for each client.

    The file is JSON with a list of lists under "clients", such as the `split.json` of a
    run directory, or CSV with the columns client and index. Clients of a CSV are
    numbered in the order of their names, numerically if all names are numbers.

    Args:
      path: of the file.
      num_images: N; image numbers must be below it.
      num_clients: C, that the file must have.

    Returns:
      C disjoint arrays of image numbers.

    Raises:
      DataError: the file cannot be read, the number of clients differs, a client is
        empty, or an image number is out of range or repeated.
    """
    path = pathlib.Path(path)
    try:
        # Excel's "CSV UTF-8" begins with a byte order mark.
        text = limits.read(path).decode("utf-8-sig")
        clients = _csv(text) if path.suffix.lower() == ".csv" else _json(text)
        parts = [np.array(part, dtype=object) for part in clients]
        if not all(type(i) is int for part in parts for i in part.ravel()):
            raise ValueError("image numbers must be integers")
        parts = [part.astype(np.int64).reshape(-1) for part in parts]
    except Exception as error:  # parsers raise many kinds
        raise errors.DataError(
            f"data.split_file = {str(path)!r}: cannot be read: {errors.reason(error)}"
        ) from error
    field = f"data.split_file = {str(path)!r}"
    if len(parts) != num_clients:
        raise errors.DataError(
            f"{field}: has {len(parts)} clients: must be data.num_clients ="
            f" {num_clients}"
        )
    for i, part in enumerate(parts):
        if not len(part):
            raise errors.DataError(f"{field}: client {i} has no images")
    every = np.concatenate(parts)
    if every.min() < 0 or every.max() >= num_images:
        raise errors.DataError(
            f"{field}: image numbers {every.min()}..{every.max()}: must be"
            f" 0..{num_images - 1}"
        )
    number, count = np.unique(every, return_counts=True)
    if count.max() > 1:
        raise errors.DataError(
            f"{field}: image {number[count.argmax()]} is there {count.max()} times"
        )
    return parts


def _json(text: str) -> list[list[int]]:
    content = json.loads(text)
    # The split of a run has a checksum.
    if files.CHECKSUM in content:
        content = files.unseal(content)
    return content["clients"]


def _csv(text: str) -> list[list[int]]:
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not {"client", "index"} <= set(rows[0]):
        raise ValueError("must have the columns client and index")
    clients: dict[str, list[int]] = {}
    for row in rows:
        clients.setdefault(row["client"], []).append(int(row["index"]))
    numbers = all(name.isdigit() for name in clients)
    return [clients[name] for name in sorted(clients, key=int if numbers else str)]


def _iid(
    labels: np.ndarray, num_clients: int, alpha: float, np_rng: np.random.RandomState
) -> list[np.ndarray]:
    """Equal random parts, whatever `alpha`."""
    del alpha
    return np.array_split(np_rng.permutation(len(labels)), num_clients)


def _unbalanced(
    labels: np.ndarray, num_clients: int, alpha: float, np_rng: np.random.RandomState
) -> list[np.ndarray]:
    limit = len(labels) / num_clients
    if limit < MIN_SIZE:
        raise errors.DataError(
            f"data.num_clients = {num_clients}: must be <= {len(labels) // MIN_SIZE}"
            f" for data.split = 'dirichlet_unbalanced', which gives each client at"
            f" least {MIN_SIZE} of the {len(labels)} images"
        )
    classes = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
    for _ in range(MAX_TRIES):
        clients = [[] for _ in range(num_clients)]
        size = np.zeros(num_clients, int)
        for members in classes:
            members = members.copy()
            np_rng.shuffle(members)
            share = np_rng.dirichlet(np.full(num_clients, alpha))
            share = share * (size < limit)
            # With a tiny alpha all the mass may sit on clients that are full.
            if not share.sum() > 0:
                break
            cuts = (np.cumsum(share / share.sum()) * len(members)).astype(int)[:-1]
            for client, part in enumerate(np.split(members, cuts)):
                clients[client].append(part)
                size[client] += len(part)
        else:
            if size.min() >= MIN_SIZE:
                return [np.concatenate(parts) for parts in clients]
    raise errors.DataError(
        f"data.alpha = {alpha}: no split with {MIN_SIZE} images for each of"
        f" {num_clients} clients in {MAX_TRIES} tries; raise data.alpha or lower"
        " data.num_clients"
    )


def _balanced(
    labels: np.ndarray, num_clients: int, alpha: float, np_rng: np.random.RandomState
) -> list[np.ndarray]:
    num_classes = labels.max() + 1
    left = np.ones(len(labels), bool)
    clients = []
    for _ in range(num_clients):
        class_weight = np_rng.dirichlet(np.full(num_classes, alpha))
        # With a tiny alpha every gamma variate may round to 0; the limit is one class.
        if np.isnan(class_weight).any():
            class_weight = np.eye(num_classes)[np_rng.randint(num_classes)]
        count = np.bincount(labels, minlength=num_classes)
        weight = class_weight[labels] / count[labels]
        # Clients get their full number of images even if their classes are used up.
        weight = np.where(left, np.maximum(weight, 1e-12), 0)
        share = len(labels) // num_clients
        drawn = np_rng.choice(
            len(labels), share, replace=False, p=weight / weight.sum()
        )
        left[drawn] = False
        clients.append(drawn)
    return clients


# (labels [N], number of clients, alpha, random numbers) -> image numbers per client.
MODES: dict[str, Callable[..., list[np.ndarray]]] = {
    "iid": _iid,
    "dirichlet_unbalanced": _unbalanced,
    "dirichlet_balanced": _balanced,
}


def label_counts(
    labels: np.ndarray, parts: list[np.ndarray], num_classes: int
) -> np.ndarray:
    """Count the images of each class at each client.

    Args:
      labels: [N] int, 0..K-1.
      parts: image numbers of each of C clients.
      num_classes: K.

    Returns:
      [C, K] int.
    """
    return np.stack([np.bincount(labels[p], minlength=num_classes) for p in parts])


def digest(parts: list[np.ndarray]) -> str:
    """Hex sha256 of a split: the clients' image numbers, in order."""
    result = hashlib.sha256()
    for part in parts:
        result.update(f"{len(part)};".encode())
        result.update(np.ascontiguousarray(part, np.int64).data)
    return result.hexdigest()
