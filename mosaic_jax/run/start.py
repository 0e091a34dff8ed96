"""What the server's network starts from, where that is not random: `model.start`.

A file, or a model of a finished run, is compared with the network name by name and
shape by shape. Only a head for other classes may be unlike: then it starts at random.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from mosaic_jax.core import errors, files, prng, schema, tensor_files
from mosaic_jax.data.dataset import Info
from mosaic_jax.nn import state_dicts
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.networks import Model
from mosaic_jax.nn.state_dicts import Entry, Path, Table
from mosaic_jax.run import mirror, store, summary, trained

_log = logging.getLogger(__name__)

Shape = tuple[int, ...]
# Counters of PyTorch's batch-norm, which nothing here reads.
_UNUSED = "num_batches_tracked"
# Mismatches that are told one by one.
_MOST_TOLD = 10


def load(model: Model, classifier: Classifier, info: Info) -> dict[str, np.ndarray]:
    """Arrays that take the place of random ones, by their path "params/.../kernel".

    Args:
      model: settings of the network.
      classifier: of the server.
      info: properties of the images.

    Returns:
      float32, of the network's shapes; none, {}, where it starts at random.

    Raises:
      ConfigError: there is no such file or run, or its names, shapes or values are not
        those of the network; one line for each.
    """
    if not model.start:
        return {}
    told = f"model.start = {model.start!r}"
    try:
        arrays = _read(model.start)
    except errors.MosaicError as error:
        raise errors.ConfigError(f"{told}: {error}") from error
    initial = jax.eval_shape(lambda: classifier.init(prng.root(0), info.image_shape))
    flat: Any = flax.traverse_util.flatten_dict(initial.variables)
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    table = _table(model.name, shapes, arrays)
    torch = any(entry.kind != "same" for entry in table)
    if model.name == "mlp" and torch and info.channels > 1:
        raise errors.ConfigError(
            f"{told}: must be a run, or have arrays by this library's own names, for"
            " the network 'mlp' and colour images: PyTorch has their pixels in another"
            " order"
        )
    head = classifier.head_paths(info.image_shape)
    found, anew, problems = _fitted(table, shapes, arrays, head)
    if problems:
        left = len(problems) - _MOST_TOLD
        more = [f"{left} more"] if left > 0 else []
        lines = [*problems[:_MOST_TOLD], *more]
        raise errors.ConfigError("\n".join(f"{told}: {line}" for line in lines))
    if anew:
        classes = info.num_classes
        _log.warning(
            "%s: %s are of other classes than the %d here: they start at random",
            told,
            ", ".join(anew),
            classes,
        )
    _log.info("%s: the network %r starts from it", told, model.name)
    return found


def is_of_run(start: str, workdir: pathlib.Path | str) -> bool:
    """Whether `model.start` names a model of the run directory, or URL, `workdir`."""
    if isinstance(workdir, str):
        return workdir in (start, start.rpartition(":")[0])
    places = {
        pathlib.Path(start).resolve(),
        pathlib.Path(start.rpartition(":")[0]).resolve(),
    }
    return bool(start) and workdir.is_dir() and workdir.resolve() in places


def _read(start: str) -> dict[str, np.ndarray]:
    """Arrays by name of a file or a finished run.

    Raises:
      MosaicError: there is none, or it is damaged or of another kind.
    """
    path, _, name = start.rpartition(":")
    if files.is_url(start):
        url, name = (path, name) if files.is_url(path) else (start, "")
        found = mirror.finished_stages(url, url)
        return _of_run(found, name or trained.FINAL)
    if pathlib.Path(start).exists() or not path:
        path, name = start, ""
    root = pathlib.Path(path)
    if root.is_dir():
        return _of_run(root, name or trained.FINAL)
    return tensor_files.read(pathlib.Path(start))


def _of_run(root: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """Arrays of the model called `name` of the run directory `root`.

    Raises:
      MosaicError: it is no finished run, is damaged, or has no such model.
    """
    stages = summary.read(root / "summary.json").stages
    folders = {
        stage: store.directory_of(root, stage, fingerprint)
        for stage, fingerprint in stages.items()
    }
    records = {stage: store.read_record(path) for stage, path in folders.items()}
    places = trained.places(records)
    if name not in places:
        raise errors.ConfigError(
            f"{root} has no model {name!r}: {schema.near(name, list(places))}"
        )
    stage, artifact = places[name]
    finished = store.FinishedStage(stage, folders[stage], records[stage])
    return {
        path.removeprefix(f"{artifact}/"): np.asarray(leaf)
        for path, leaf in finished.arrays((artifact,)).items()
    }


def _table(
    network: str, shapes: Mapping[Path, Any], arrays: Mapping[str, np.ndarray]
) -> Table:
    """The layout that has most names in common with those of the arrays."""
    return max(
        state_dicts.layouts(network, shapes),
        key=lambda table: len({entry.name for entry in table} & arrays.keys()),
    )


def _fitted(
    table: Table,
    shapes: Mapping[Path, Shape],
    arrays: Mapping[str, np.ndarray],
    head: frozenset[Path],
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Arrays as they are here, names of those of other classes, and what is wrong."""
    found: dict[str, np.ndarray] = {}
    anew, problems = [], []
    for entry in table:
        wanted = entry.to_torch(np.zeros(shapes[entry.path], np.float32)).shape
        if entry.name not in arrays:
            problems.append(f"{entry.name!r} is missing")
            continue
        array = arrays[entry.name]
        if array.shape != wanted:
            if entry.path in head and _is_of_classes(entry, array.shape, wanted):
                anew.append(repr(entry.name))
            else:
                problems.append(
                    f"{entry.name!r} has the shape {array.shape}: must be {wanted}"
                )
        elif not _are_numbers(array):
            problems.append(f"{entry.name!r} must have finite numbers")
        else:
            here = entry.to_jax(array, shapes[entry.path])
            found["/".join(entry.path)] = np.asarray(here, np.float32)
    known = {entry.name for entry in table}
    problems += [
        f"{name!r} is not in the network"
        for name in sorted(arrays.keys() - known)
        if not name.endswith(_UNUSED)
    ]
    return found, anew, problems


def _is_of_classes(entry: Entry, found: Shape, wanted: Shape) -> bool:
    """Whether shapes in a file differ in the number of classes alone."""
    # Which is the last axis here, and so the first where axes are turned round.
    kept = slice(None, -1) if entry.kind == "same" else slice(1, None)
    return len(found) == len(wanted) and found[kept] == wanted[kept]


def _are_numbers(array: np.ndarray) -> bool:
    # bfloat16 is no floating type of NumPy's own.
    return array.dtype.kind != "c" and bool(np.isfinite(array.astype(np.float32)).all())
