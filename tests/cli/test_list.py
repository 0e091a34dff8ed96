"""mosaic list: what there is, with every field's default, range and meaning."""

import pytest

from mosaic_jax.cli import list as command
from mosaic_jax.core import schema
from mosaic_jax.data import sources
from mosaic_jax.fl import algorithms, attacks, compression, robust
from mosaic_jax.nn import networks
from mosaic_jax.run import settings


def printed(capsys, *words):
    assert command.main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("data", sources.SOURCES),
        ("methods", ["mosaic", "dense", *algorithms.ALGORITHMS]),
        ("networks", networks.NETWORKS),
        ("rules", robust.RULES),
        ("attacks", attacks.ATTACKS),
        ("compression", compression.COMPRESSORS),
        ("configs", ["digits_mosaic", "baselines", "own_mosaic"]),
    ],
)
def test_names_with_a_line_each(capsys, kind, names):
    lines = printed(capsys, kind).splitlines()
    told = {line.split()[0]: line for line in lines[1:] if line[2] != " "}
    for name in names:
        assert len(told[name].split()) > 2, name
    assert lines[0] == kind
    assert "\n".join(lines) in printed(capsys)


def test_every_field_is_told_with_its_default():
    nested = settings.defaults()
    found = {name: default for name, _, default in command.fields()}
    for name, default in found.items():
        group = nested
        for part in name.split("."):
            group = group[part]
        assert group == default, name

    def leaves(group, prefix=""):
        for name, value in group.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert set(leaves(nested)) == found.keys()


def test_every_field_says_what_it_means():
    for name, field, _ in command.fields():
        assert field.metadata.get("meaning"), name


def test_fields(capsys):
    lines = printed(capsys, "fields", "distill").splitlines()
    at = lines.index("distill.temperature = 1.0")
    assert lines[at + 1].startswith("    > 0; ")
    assert all(line.startswith(("distill.", "    ")) for line in lines)
    assert "methods.fedprox.mu = 0.01\n" in printed(capsys, "fields", "methods")
    assert set(lines) < set(printed(capsys, "fields").splitlines())


def test_defaults_are_allowed():
    for name, field, default in command.fields():
        assert schema.allowed_of(field).test(default), name


def test_an_unknown_group_is_one_line_and_code_2(capsys):
    assert command.main(["fields", "distil"]) == 2
    told = "error: mosaic list fields distil: did you mean 'distill'?\n"
    assert capsys.readouterr().err == told
