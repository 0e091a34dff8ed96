"""A user's folder of images, from files to a report."""

import json

import numpy as np
import pytest
from PIL import Image

from mosaic_jax.cli import data as program
from mosaic_jax.cli import launch
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 60 PNGs: bright on the left, on the right, everywhere."""
    root, np_rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for name in ("left", "right", "both"):
        (root / name).mkdir()
        for i in range(60):
            image = np_rng.randint(0, 100, (18, 18))
            columns = {"left": slice(0, 9), "right": slice(9, 18), "both": slice(0, 18)}
            image[:, columns[name]] += 150
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_study_of_own_images(folder, tmp_path):
    config = tiny.config(
        data__name="folder",
        data__dir=str(folder),
        data__validation=0.0,
        meta__gate_experts=1,
        # Mosaic on other data than the library's: tests/run/test_study.py.
        method="federated",
        warmup__rounds=0,
    )
    assert launch.run(config.to_dict(), tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert np.array(summary["partition"]["label_counts"]).shape == (3, 3)
    assert np.array(summary["partition"]["label_counts"]).sum() == 3 * 48
    assert 0 <= summary["test_accuracy"]["final"] <= 1
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_summary_and_picture_without_training(folder, tmp_path, capsys):
    picture = tmp_path / "counts.png"
    arguments = ["folder", "--data_dir", str(folder), "--output", str(picture)]
    arguments += ["--split", "iid", "--num_clients", "4"]
    assert program.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "folder: 3 classes, 16 x 16 x 1" in shown
    assert "train     144 images, 48 to 48 of a class" in shown
    assert "4 clients, 36 to 36 images" in shown
    assert picture.stat().st_size > 1000
    assert program.main(["folder", "--data_dir", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
