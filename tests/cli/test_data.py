"""mosaic data: bad input is one line and code 2, before any work."""

import pytest

from mosaic_jax.cli import data
from mosaic_jax.data import sources


def one_line(capsys, call):
    """The one line that a program which ends with code 2 tells."""
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_a_file_is_no_folder_of_images(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("x")
    arguments = ["folder", "--data_dir", str(path)]
    told = one_line(capsys, lambda: data.main(arguments))
    assert f"data.dir = {path}: must be a folder of images" in told
    arguments = ["npz", "--data_dir", str(tmp_path)]
    told = one_line(capsys, lambda: data.main(arguments))
    assert f"data.dir = {tmp_path}: must be an npz file" in told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing/counts.png", "must lie in a folder that exists"),
        ("counts.docx", "must end in one of .pdf, .png, .svg"),
        ("counts", "must end in one of"),
        ("folder.png", "must be a file, not a folder"),
    ],
)
def test_outputs_that_cannot_be_are_told_before_work(
    tmp_path, capsys, monkeypatch, name, expected
):
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / name
    arguments = ["digits", "--split", "iid", "--output", str(path)]
    told = one_line(capsys, lambda: data.main(arguments))
    assert f"--output = {path}: {expected}" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_clients", "0"], "data.num_clients = 0: must be in [1, "),
        (["--alpha", "0"], "data.alpha = 0.0: must be in ["),
        (["--alpha", "nan"], "data.alpha = nan: must be in ["),
        (["--seed", "-1"], "seed of the split = -1: must be in [0, "),
    ],
)
def test_splits_that_cannot_be_drawn(tmp_path, capsys, words, expected):
    output = str(tmp_path / "counts.png")
    arguments = ["digits", "--split", "dirichlet_balanced", "--output", output, *words]
    assert expected in one_line(capsys, lambda: data.main(arguments))


@pytest.mark.parametrize(
    "words", [["--split", "file"], ["--split", "iid", "--split_file", "x"]]
)
def test_a_file_of_a_split_comes_with_its_mode(capsys, monkeypatch, words):
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("work has begun"))
    told = one_line(capsys, lambda: data.main(["digits", *words]))
    assert "must be a file with --split file" in told


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def load(*_):
        raise MemoryError("Unable to allocate 3. GiB")

    monkeypatch.setattr(sources, "load", load)
    told = one_line(capsys, lambda: data.main(["digits", "--data_dir", str(tmp_path)]))
    assert told.startswith("error: out of memory: Unable to allocate 3. GiB")


def test_a_picture_is_drawn_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    words = ["digits", "--data_dir", str(tmp_path), "--split", "iid"]
    words += ["--num_clients", "3"]
    assert data.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["class", *map(str, range(10))]
    held = [int(cell) for line in lines[-3:] for cell in line.split()[2:]]
    assert sum(held) == 1437
    assert not list(here.iterdir())
    assert data.main([*words, "--output", "counts.png"]) == 0
    assert [path.name for path in here.iterdir()] == ["counts.png"]
