"""The code in docs/library.md runs as it is written, from top to bottom."""

import pathlib
import re
import sys
import types

import numpy as np
import pytest

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "library.md"


def my_data():
    """Three classes of brightness: training and test images with labels."""
    label = np.arange(150) % 3
    noise = np.random.RandomState(0).rand(150, 16, 16)
    image = (label[:, None, None] + noise) / 3
    return image[30:], label[30:], image[:30], label[:30]


@pytest.mark.slow
def test_the_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = types.ModuleType("notebook_of_the_document")
    notebook.my_data = my_data
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), vars(notebook))
    assert notebook.result.summary.test_accuracy["final"] > 1 / 3
    assert (tmp_path / "runs" / "first" / "report.html").exists()
