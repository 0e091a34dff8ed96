"""mosaic show: the fields of a configuration, with those that are no defaults."""

from mosaic_jax.cli import list as listing
from mosaic_jax.cli import show


def printed(capsys, *words):
    assert show.main(["digits_mosaic", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_field_with_its_value(capsys):
    lines = printed(capsys, "--config.distill.steps=7")
    names = [line[2:].partition(" = ")[0] for line in lines[:-1]]
    assert names == [name for name, _, _ in listing.fields()]
    assert "* distill.steps = 7    (default 1500)" in lines
    assert "  distill.temperature = 1.0" in lines
    differ = sum(line.startswith("* ") for line in lines)
    assert lines[-1].startswith(f"{differ} of {len(names)} fields differ")
    assert printed(capsys, "--config.distill.steps", "7") == lines
    changed = printed(capsys, "--config.distill.steps=7", "--changed")
    assert changed == [line for line in lines if not line.startswith("  ")]


def test_a_field_before_the_configuration(capsys):
    """Its value is no positional argument; a switch has none."""
    for words in (["--config.distill.steps", "7"], ["--config.distill.balanced"]):
        assert show.main([*words, "digits_mosaic", "distill"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(line[2:].startswith("distill.") for line in lines[:-1])
        assert ("* distill.steps = 7    (default 1500)" in lines) == ("7" in words)


def test_a_group(capsys):
    lines = printed(capsys, "distill")
    assert len(lines) > 5
    assert all(line[2:].startswith("distill.") for line in lines[:-1])


def test_what_is_wrong_is_one_line(capsys):
    for words, expected in (
        (["digits_mosaic", "distil"], "did you mean 'distill'?"),
        (["nowhere"], "--config = 'nowhere': must be a file"),
        (["digits_mosaic", "--config.seed=-1"], "seed = -1: must be in [0,"),
        (["digits_mosaic", "--config.distill.stps=1"], "did you mean 'distill.steps'"),
    ):
        assert show.main(words) == 2
        told = capsys.readouterr().err
        assert expected in told and told.count("\n") == 1, told
