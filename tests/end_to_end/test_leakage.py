"""Studies that are attacked, from settings to summary and report."""

import json

import pytest

from mosaic_jax.report import page
from mosaic_jax.run import summary
from mosaic_jax.run.runner import Experiment
from tests import running, tiny

ATTACKED = {
    "method": "federated",
    "model__name": "mlp",
    "init__rounds": 2,
    "leakage__images": 32,
    "leakage__canaries": 16,
    "leakage__shadows": 4,
}


def test_a_study_is_attacked(tmp_path):
    found = Experiment(tiny.study(**ATTACKED), tmp_path).run()
    assert {(row["attack"], row["client"]) for row in found.leakage} == {
        (attack, client) for attack in ("loss", "LiRA") for client in (None, 0, 1, 2)
    }
    assert all(row["epsilon_claimed"] is None for row in found.leakage)
    assert "no epsilon is claimed" in page.write(tmp_path).read_text().lower()


@pytest.mark.slow
def test_a_private_study_with_canaries(tmp_path):
    work = Experiment(tiny.study(**ATTACKED, privacy__epsilon=8.0), tmp_path)
    found = work.run()
    assert summary.read(tmp_path / "summary.json") == found
    rows = {(row["attack"], row["client"]): row for row in found.leakage}
    assert set(rows) == {
        (attack, client) for attack in ("loss", "LiRA") for client in (None, 0, 1, 2)
    }
    for (_, client), row in rows.items():
        assert row["canaries"] == (48 if client is None else 16)
        assert 7.6 < row["epsilon_claimed"] <= 8.0
        assert 0 <= row["epsilon_lower"] <= row["epsilon_reach"] < 8
        assert row["members"] == row["others"] > 0
    text = page.write(tmp_path).read_text()
    assert ">Attacks</h2>" in text and "epsilon claimed" in text
    assert "epsilon at most 8 is claimed" in text
    # It told the server nothing, so that it needs no noise.
    assert set(found.privacy["by_payload"]) == {"models"}


@pytest.mark.slow
def test_an_attack_that_is_broken_off_goes_on(tmp_path):
    fields = {
        **ATTACKED,
        "local__steps": 6,
        "leakage__inversion_steps": 6,
        "leakage__inversion_images": 2,
    }
    whole = Experiment(tiny.study(**fields), tmp_path / "whole").run()
    broken = Experiment(tiny.study(**fields), tmp_path / "broken")
    # Rounds save once each and the evaluations; then the shadows' first chunk.
    running.stop_after(broken, 3)
    again = Experiment(tiny.study(**fields), tmp_path / "broken").run()
    assert again.leakage == whole.leakage

    def inverted(root):
        (path,) = (root / "stages" / "leakage").glob("*/done.json")
        return json.loads(path.read_text())["results"]["inverted"]

    assert inverted(tmp_path / "broken") == inverted(tmp_path / "whole") != []


@pytest.mark.slow
def test_mosaic_is_attacked_by_all_that_is_sent(tmp_path):
    work = Experiment(
        tiny.study(
            leakage__images=32,
            leakage__shadows=4,
            leakage__shadow_generators=True,
            leakage__inversion_steps=4,
            model__others=("resnet18",),
        ),
        tmp_path,
    )
    found = work.run()
    told = {(row["payload"], row["attack"]) for row in found.leakage}
    assert told == {
        ("models", "loss"),
        ("models", "LiRA"),
        ("generators", "nearest image"),
        ("generators", "LiRA"),
        ("prototypes", "nearest prototype"),
    }
    assert {row["client"] for row in found.leakage} == {None, 0, 1, 2}
    running.check_templates(work)
    assert "found by its gradient" in page.write(tmp_path).read_text()
