"""What a running study has written so far, as plain data for a page that draws it."""

import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mosaic_jax.core import errors, files
from mosaic_jax.report import glossary
from mosaic_jax.run import store

# Most points of a line, rows of clients, and rows of images.
MOST_POINTS, MOST_CLIENTS, MOST_ROWS = 200, 60, 20
# Of a row of metrics.jsonl, what it is of.
_PLACE = {"stage", "loop", "step", "time"}
# Damage, or a file that is being written: the next look finds it whole.
_UNREADABLE = (OSError, ValueError, KeyError, errors.CheckpointError)


def studies(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Run directories in `workdir`: itself, or its methods, cells and seeds."""
    if (workdir / "config.json").exists():
        return [workdir]
    found = [*workdir.glob("*/config.json"), *workdir.glob("*/*/config.json")]
    return sorted(path.parent for path in found)


def name_of(workdir: pathlib.Path, path: pathlib.Path) -> str:
    """What tells a study from the others: its folder in `workdir`."""
    return str(path.relative_to(workdir)) if path != workdir else path.name


def overview(workdir: pathlib.Path, path: pathlib.Path) -> dict[str, Any]:
    """A study in a row: what it is, where it stands, and its last test accuracy.

    Args:
      workdir: that is watched.
      path: the study's run directory in it.
    """
    progress, settings = _json(path / "progress.json"), _settings(path)
    accuracy = _accuracy(path, settings)
    rows = [row for row in _rows(path) if "test_accuracy" in row]
    latest = list(accuracy.values())[-1:] or [row["test_accuracy"] for row in rows[-1:]]
    done = progress.get("stages_done", [])
    return {
        "name": name_of(workdir, path),
        "what": _title(settings),
        "state": progress.get("state", "starting"),
        "doing": progress.get("doing", ""),
        "why": progress.get("why", ""),
        "stages": progress.get("stages", done),
        "done": done,
        "stage": progress.get("stage", ""),
        "step": progress.get("step", 0),
        "num_steps": progress.get("num_steps", 0),
        "seconds_left": progress.get("study_seconds_left"),
        "age": _age(path / "progress.json"),
        "test_accuracy": latest[0] if latest else None,
        "report": str(path / "report.html") if (path / "report.html").exists() else "",
    }


def detail(path: pathlib.Path) -> dict[str, Any]:
    """All that is drawn of one study: accuracies, curves, clients and images."""
    settings = _settings(path)
    return {
        "accuracy": _accuracy(path, settings),
        "curves": _curves(_rows(path), settings),
        "clients": _clients(path),
        "pictures": [
            {"stage": file.parts[len(path.parts) + 1], "age": file.stat().st_mtime_ns}
            for file in _picture_files(path)
        ],
    }


def picture(path: pathlib.Path, number: int) -> bytes:
    """PNG of what a stage draws: a row for each client, one image beside the other.

    Args:
      path: run directory of the study.
      number: of the stage among the "pictures" of `detail`.

    Raises:
      IndexError: there is no such stage, or it draws nothing.
    """
    arrays = files.read_arrays(_picture_files(path)[number])
    # The last moment of a film; rows of single images are for the report.
    films = [a for a in arrays.values() if a.ndim == 5 and a.dtype == np.uint8]
    rows = [np.concatenate(list(row), axis=1) for row in films[-1][:MOST_ROWS]]
    pixels = np.concatenate(rows)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.save(buffer, format="png")
    return buffer.getvalue()


def _json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's content, {} where it is missing or being written."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _age(path: pathlib.Path) -> float | None:
    """Seconds since a file was written or renewed; None where it is missing."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return None


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return _json(path / "config.json").get("settings", {})


def _title(settings: Mapping[str, Any]) -> str:
    try:
        data, seed = settings["data"], settings["seed"]
        where = f"{data['name']}, {data['num_clients']} clients, seed {seed}"
        return f"{glossary.method(settings)} on {where}"
    except KeyError:
        return ""


def _accuracy(path: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracies so far, by the models' names as people read them."""
    found = _json(path / "summary.json").get("test_accuracy", {})
    try:
        return {glossary.model(name, settings): value for name, value in found.items()}
    except KeyError:
        return found


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without one that is being written."""
    try:
        lines = (path / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append(row if row.keys() >= _PLACE else {})
        except (ValueError, AttributeError, RecursionError):
            continue
    return [row for row in rows if row]


def _curves(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Of each loop, its accuracies and its other measures, each a drawing."""
    loops: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        loops.setdefault((row["stage"], row["loop"]), []).append(row)
    result = []
    for (stage, loop), found in loops.items():
        # Counted from the end: the newest row is always one of them.
        kept = found[::-1][:: -(-len(found) // MOST_POINTS)][::-1]
        title = f"{glossary.stage(stage, settings) if settings else stage}: {loop}"
        names = sorted(found[-1].keys() - _PLACE)
        accuracies = [name for name in names if name.endswith("_accuracy")]
        for group in (accuracies, [n for n in names if n not in accuracies]):
            lines = {
                name.replace("_", " "): [row.get(name) for row in kept]
                for name in group
            }
            if lines:
                steps = [row["step"] for row in kept]
                result.append({"title": title, "step": steps, "lines": lines})
    return result


def _clients(path: pathlib.Path) -> list[list[int]]:
    """Images of each class of the first clients, [C][K]."""
    return _json(path / "split.json").get("label_counts", [])[:MOST_CLIENTS]


def _picture_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Films of stages: of one that runs as it is now, of a finished one its last."""
    last = [*path.glob(f"stages/generators*/*/{store.PICTURES}")]
    over = {file.parent for file in last}
    now = path.glob(f"stages/*/*/{store.CHECKPOINTS}/{store.PICTURES}")
    found = [*last, *(file for file in now if file.parents[1] not in over)]
    return sorted(found, key=lambda file: (file.parts[len(path.parts) + 1], str(file)))


def safely(read: Any, *arguments: Any) -> Any:
    """What `read` returns, None where a file is missing or being written."""
    try:
        return read(*arguments)
    except (*_UNREADABLE, IndexError):
        return None
