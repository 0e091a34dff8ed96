"""Each kind of block that a stage can show."""

import re

import numpy as np
import pytest

from mosaic_jax.core import errors
from mosaic_jax.report import blocks, html
from mosaic_jax.stages.sections import Heat, Scatter, Strips, Table, Text
from tests.report import saved


def draw(folder, *shown, **pictures):
    """HTML of the blocks, all with the same pictures."""
    pairs = [(block, pictures) for block in shown]
    return blocks.section(pairs, html.FigureFolder(folder))


def drawn(folder):
    return sorted(path.name for path in folder.iterdir())


def images(*shape):
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def strips(*columns, names=("a", "b"), name="rows"):
    return Strips(name, ("row", *columns), names, columns, "Rows of images.")


def test_text_and_table(tmp_path):
    table = Table(("of", "value"), [("a", "1 < 2")], "Numbers")
    text = draw(tmp_path, Text("It is < that."), table)
    assert text.startswith("<p>It is &lt; that.</p>")
    assert '<th scope="row">a</th><td>1 &lt; 2</td>' in text
    assert 'aria-label="Numbers"' in text
    assert drawn(tmp_path) == []


def test_neighbouring_figures_stand_side_by_side(tmp_path):
    scatter = Scatter("points", [1, 10], [0.5, 2.0], "x", "y", 0.5, "Points.")
    shown = [saved.heat("one", [[0.0, 1.0]]), scatter, Text("Between.")]
    text = draw(tmp_path, *shown, saved.heat("two", [[None, 1.0]]))
    parts = re.split(r"<p>Between.</p>", text)
    assert [part.count('<div class="figures">') for part in parts] == [1, 1]
    assert [part.count("<figure ") for part in parts] == [2, 1]
    assert drawn(tmp_path) == ["one.png", "points.png", "two.png"]


def test_images_lie_in_their_row_and_column(tmp_path):
    single, several = images(2, 8, 8, 3), images(2, 5, 8, 8, 1)
    text = draw(tmp_path, strips("single", "several"), single=single, several=several)
    labels = re.findall(r'<img[^>]* alt="(.*?)"', text)
    assert labels == ["a, single", "a, several", "b, single", "b, several"]
    # Five side by side are wider than high, and have the room for it.
    assert text.count('class="strip"') == 2
    assert "<p>Rows of images.</p>" in text
    assert drawn(tmp_path) == ["rows.png"]


def test_missing_pictures_are_logged_and_left_out(tmp_path, caplog):
    text = draw(tmp_path, strips("a", "b"), Text("After."), a=images(2, 8, 8, 3))
    assert text == "<p>After.</p>"
    assert "no pictures 'b'; the report is without 'rows'" in caplog.text


@pytest.mark.parametrize(
    "block",
    [
        Table(("a", "b"), [("1", "2"), ("3",)], "Of unlike rows."),
        Heat("h", [[1.0], [1.0, 2.0]], "x", "y", "z", "Of unlike rows."),
        Scatter("s", [1], [1, 2], "x", "y", 0.5, "Of unlike lengths."),
        strips("image", names=("more", "rows", "than", "images")),
        strips("image", names=("a", "b"), name="../elsewhere"),
        strips("vector"),
    ],
    ids=["table", "heat", "scatter", "strips", "name", "no image"],
)
def test_what_cannot_be_drawn_is_one_error(tmp_path, block):
    pictures = {"image": images(2, 8, 8, 3), "vector": np.zeros((2, 3))}
    with pytest.raises(errors.MosaicError) as told:
        draw(tmp_path / "figures", block, **pictures)
    assert "\n" not in str(told.value)
    assert drawn(tmp_path) == ["figures"]
