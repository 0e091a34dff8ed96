"""Splits of a labelled data set over clients (in host memory, with NumPy only)."""

import csv
import hashlib
import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mosaic_jax.core import errors, files, schema
from mosaic_jax.core.registry import Registry
from mosaic_jax.data import limits, skews

MIN_SIZE = 10
MAX_TRIES = 1000


def split(
    labels: np.ndarray,
    *,
    mode: str,
    num_clients: int,
    seed: int,
    group: np.ndarray | None = None,
    **fields: float,
) -> list[np.ndarray]:
    """Divide images over clients (Dirichlet splits as by Hsu et al., 2019).

    Args:
      labels: [N] integers, 0..K-1.
      mode: a name of `MODES`, or "package.module:function" of a user's own, which is
        `(labels, num_clients, np_rng) -> list of C arrays of image numbers`.
      num_clients: C >= 1.
      seed: of NumPy's legacy RandomState, with which the published splits were made.
      group: [N] integers or text, whose each image is; a mode that names `group` gets
        it. None: it is not known, and a mode without a default for it is refused.
      fields: settings of the split; a mode gets those that it names, such as `alpha`,
        Dirichlet concentration, > 0: the smaller, the more the clients differ.

    Returns:
      C disjoint arrays of image numbers.

    Raises:
      ConfigError: there is no such mode.
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
        (
            "data.alpha",
            fields.get("alpha", 1.0),
            np.finfo(float).tiny,
            np.finfo(float).max,
        ),
        ("seed of the split", seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise errors.DataError(f"{field} = {value}: must be in [{least}, {most}]")
    function = MODES.find(mode)
    named = inspect.signature(function).parameters
    own: dict[str, Any] = {
        name: value for name, value in fields.items() if name in named
    }
    if "group" in named:
        if group is None and named["group"].default is inspect.Parameter.empty:
            raise errors.DataError(
                f"data.split = {mode!r}: needs to know whose each training image is:"
                " must be in data.column, or in the arrays that are given"
            )
        own["group"] = group
    np_rng = np.random.RandomState(seed)
    if mode in MODES:
        parts = function(labels, num_clients, np_rng, **own)
    else:
        parts = _of_user(mode, lambda: function(labels, num_clients, np_rng, **own))
    return _checked(parts, f"data.split = {mode!r}", len(labels), num_clients)


def _of_user(mode: str, draw: Callable[[], Any]) -> list[np.ndarray]:
    """What a user's function returns, which may return or raise anything."""
    try:
        parts = [np.asarray(part) for part in draw()]
    except errors.MosaicError:
        raise
    except Exception as error:
        raise errors.DataError(
            f"data.split = {mode!r}: {type(error).__name__}: {errors.reason(error)}"
        ) from error
    for i, part in enumerate(parts):
        if part.ndim != 1 or (part.size and part.dtype.kind not in "iu"):
            raise errors.DataError(
                f"data.split = {mode!r}: client {i} has {part.dtype} of shape"
                f" {part.shape}: must have image numbers, integers [n]"
            )
    return [part.astype(np.int64) for part in parts]


def _checked(
    parts: list[np.ndarray], field: str, num_images: int, num_clients: int
) -> list[np.ndarray]:
    """`parts`, if they are a split.

    Raises:
      DataError: they are not; the message begins with `field`.
    """
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
    return _checked(parts, field, num_images, num_clients)


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
    labels: np.ndarray, num_clients: int, np_rng: np.random.RandomState
) -> list[np.ndarray]:
    """Equal random parts."""
    return np.array_split(np_rng.permutation(len(labels)), num_clients)


def _unbalanced(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    alpha: float,
) -> list[np.ndarray]:
    """Each class is divided in proportions from Dir(alpha) over the clients.

    A client that already has N / num_clients images gets no more; drawn again until
    each has at least 10.
    """
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


def _mixed(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    alpha: float,
    iid_share: float,
) -> list[np.ndarray]:
    """A share of the images evenly at random, the rest in proportions from Dir(alpha).

    Each class of the rest is divided as in `_unbalanced`, without its bounds on sizes.
    """
    order = np_rng.permutation(len(labels))
    cut = max(num_clients, round(iid_share * len(labels)))
    clients = [[part] for part in np.array_split(order[:cut], num_clients)]
    rest = order[cut:]
    for k in np.unique(labels):
        members = rest[labels[rest] == k]
        share = np_rng.dirichlet(np.full(num_clients, alpha))
        if np.isnan(share).any():  # with a tiny alpha every variate may round to 0
            share = np.eye(num_clients)[np_rng.randint(num_clients)]
        cuts = (np.cumsum(share) * len(members)).round().astype(int)[:-1]
        for client, part in zip(clients, np.split(members, cuts), strict=True):
            client.append(part)
    return [np.concatenate(parts) for parts in clients]


def _balanced(
    labels: np.ndarray,
    num_clients: int,
    np_rng: np.random.RandomState,
    *,
    alpha: float,
) -> list[np.ndarray]:
    """Each client draws N / num_clients images, with class weights from Dir(alpha)."""
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


def _is_function(found: Any) -> bool:
    return callable(found) and not isinstance(found, type)


# (labels [N], number of clients, random numbers) -> image numbers per client; settings
# by name.
MODES: Registry[Callable[..., list[np.ndarray]]] = Registry(
    "data.split",
    {
        "iid": _iid,
        "dirichlet_unbalanced": _unbalanced,
        "dirichlet_balanced": _balanced,
        "dirichlet_mixed": _mixed,
        "pathological": skews.pathological,
        "shards": skews.shards,
        "quantity": skews.quantity,
        "by_column": skews.by_column,
    },
    schema.Allowed(
        "a function of labels, number of clients and random numbers to a list of arrays"
        " of image numbers",
        _is_function,
    ),
)


def own_test_sets(
    label_count: np.ndarray, test_label: np.ndarray, seed: int
) -> np.ndarray:
    """Test images for each client, in the proportions of its training classes.

    Each client has as many as if all were dealt, but a hundred at least; clients share
    images. Within a client an image is there twice only where its class has too few.
    Classes without test images are left out of a client's proportions.

    Args:
      label_count: [C, K] int, training images of each class at each client.
      test_label: [T] int.
      seed: of the draws.

    Returns:
      [C, M'] int, numbers of test images.

    Raises:
      DataError: there is no test image of any class of a client.
    """
    np_rng = np.random.RandomState(seed)
    num_clients, num_classes = label_count.shape
    size = max(len(test_label) // num_clients, min(100, len(test_label)))
    classes = [np.flatnonzero(test_label == k) for k in range(num_classes)]
    counted = label_count * np.array([len(images) > 0 for images in classes])[None]
    result = np.empty((num_clients, size), int)
    for client, count in enumerate(counted):
        if not count.sum():
            raise errors.DataError(
                f"data.client_test = 'own': client {client} has no class of which there"
                " are test images"
            )
        wanted = size * count / count.sum()
        quota = np.floor(wanted).astype(int)
        # Those with the largest remainders; ties by class.
        order = np.argsort(quota - wanted, kind="stable")
        quota[order[: size - quota.sum()]] += 1
        drawn = [
            np.resize(np_rng.permutation(images), n)
            for images, n in zip(classes, quota, strict=True)
            if n
        ]
        result[client] = np.concatenate(drawn)
    return result


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
