"""What a study says before it runs and when it is done."""

import shlex

import pytest

from mosaic_jax.cli import telling
from mosaic_jax.report import glossary
from mosaic_jax.run import programs, settings
from mosaic_jax.run.runner import Experiment
from tests import tiny


def test_the_opening(tmp_path):
    works = [Experiment(tiny.study(seed=seed), tmp_path / str(seed)) for seed in (3, 4)]
    told = telling.opening_lines(works, tmp_path)
    count = works[0].data.label_count
    images = len(works[0].data.held_out["validation"].label)
    assert told[0].startswith(f"digits: 10 classes of 16 x 16 x 1; {count.sum()} train")
    assert told[0].endswith(f" training, {images} validation, 360 test images")
    assert told[1].startswith("3 clients, split dirichlet_unbalanced at alpha 1: ")
    assert f" {count.sum(1).min()} to {count.sum(1).max()} images" in told[1]
    assert told[1].endswith("; seeds 3 to 4")
    assert told[2].startswith("cnn, ") and " parameters, float32, on " in told[2]
    assert told[3].startswith("Mosaic: init, generators, experts, prototypes, meta, ")
    assert " TFLOP to compute: about " in told[4]
    assert told[5].startswith(
        f"everything goes to {tmp_path}; mosaic watch {tmp_path} "
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.4, "about 1 to 2 s"),
        (20, 60, "about 20 to 60 s"),
        (30, 300, "about 1 to 5 min"),
        (7200, 21600, "about 120 to 360 min"),
    ],
)
def test_expected_time(low, high, expected):
    assert telling._about(low, high) == expected


def test_what_to_type_next(tmp_path):
    command = ["launch.py", "--config", "a.py", "--workdir=old", "--config.seed=3"]
    study = tiny.study(distill__steps=7)
    first, second = telling.following(study, str(tmp_path), command)
    assert first == (
        f"python launch.py --config a.py --config.seed=3 --workdir {tmp_path}-other"
        f" --reuse_from {tmp_path} --config.distill.steps=14"
    )
    assert second.startswith(f"python -m mosaic_jax report {tmp_path} {tmp_path}-other")
    federated = tiny.study(method="federated", seed=3)
    first, second = telling.following(
        federated, str(tmp_path), ["/bin/mosaic", "run", "x"]
    )
    assert first.startswith("mosaic run x --workdir ")
    assert first.endswith(" --config.seed=4")
    assert second.startswith("mosaic report ")
    assert telling.following(study, str(tmp_path), []) == []
    spaced = tmp_path / "my study"
    first, second = telling.following(study, str(spaced), command)
    words = shlex.split(first)
    assert words[words.index("--workdir") + 1] == f"{spaced}-other"
    assert words[words.index("--reuse_from") + 1] == str(spaced)
    assert shlex.split(second)[4:6] == [str(spaced), f"{spaced}-other"]
    # Its local folder is a copy, which may be deleted.
    (only,) = telling.following(study, "s3://a/b", command)
    assert "--workdir s3://a/b-other --reuse_from s3://a/b " in only


def test_words_of_a_command_line():
    words = ["--config", "a", "-workdir", "b", "--workdir=c", "--workdirs", "d"]
    assert programs.without(words, ["workdir"]) == ["--config", "a", "--workdirs", "d"]


@pytest.mark.parametrize(
    ("changes", "method", "first"),
    [
        ({}, "Mosaic", "FedAvg"),
        ({"init__method": "fedrolex"}, "Mosaic over FedRolex", "FedRolex"),
        ({"method": "federated", "init__method": "fedprox"}, "FedProx", "FedProx"),
        ({"method": "federated", "server__method": "dfrd"}, "DFRD", "FedAvg"),
    ],
)
def test_methods_and_models_have_their_names(changes, method, first):
    study = tiny.study(**changes)
    for found in (study, settings.from_mapping(tiny.config(**changes).to_dict())):
        assert glossary.method(found) == method
        assert glossary.model("init", found) == first
    assert glossary.model("init@cnn", study) == f"{first} (cnn)"
    assert glossary.model("teacher", study) == "teacher"
