"""The program that writes reports."""

from mosaic_jax.cli import report as command
from mosaic_jax.report import page
from tests.report import saved


def test_one_run(folder, capsys):
    assert command.main([str(folder / "few")]) == 0
    assert capsys.readouterr().out == f"{folder / 'few' / 'report.html'}\n"


def test_one_run_to_a_page_elsewhere(folder, tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    assert command.main([str(folder / "few"), "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text().startswith("<!doctype html>")
    assert list((path.parent / "figures").glob("*.png"))


def test_several_runs(folder, capsys, monkeypatch):
    monkeypatch.setattr(page, "write", lambda path, **_: (path / "report.html").touch())
    paths = [str(folder / name) for name in ("few", "seeds")]
    output = folder / "compare.html"
    assert command.main([*paths, "-o", str(output)]) == 0
    assert 'href="few/report.html"' in output.read_text()
    assert "| seeds | 80.0 |" in capsys.readouterr().out


def test_a_run_that_is_not_finished(tmp_path, capsys):
    saved.write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert command.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "summary.json: is missing" in error


def test_no_run_at_all(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err
