"""What a stage returns is what it said, or nothing of it is saved."""

import pytest

from mosaic_jax.core import errors
from mosaic_jax.run import settings, study
from mosaic_jax.run.runner import Experiment
from mosaic_jax.stages.base import Link, Outcome, Stage
from tests import running, tiny

OWN = "tests.own_parts"
FEDERATED = {
    "method": "federated",
    "init__rounds": 1,
    "warmup__rounds": 1,
    "finetune__rounds": 0,
    "evaluation__every": 1,
}


def study_of(stages, **methods):
    mapping = tiny.config(**FEDERATED, stages=stages).to_dict()
    mapping["methods"] |= methods
    return settings.from_mapping(mapping)


class Watched:
    """In the place of a mirror: what is new there whenever something was saved."""

    url = "memory://bucket/run"

    def __init__(self, folder):
        self.folder, self.found = folder, []

    def saved(self):
        done = len(list(self.folder.glob("stages/*/*/done.json")))
        seals = list(self.folder.glob("stages/*/*/checkpoints/*/*/seal.json"))
        self.found.append(("seal.json" if seals else "done.json", done))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("other", "returned the artifacts ['global_model']: must be"),
        ("more", "returned the artifacts ['global_model', 'number']: must be"),
        ("shape", "its template: number: saved float32[3], expected float32[]"),
        ("headline", "headline 'x' has ['mean']: must have high, low, mean, meaning"),
        ("results", "results, models and headline must be what JSON holds"),
    ],
)
def test_something_else_is_told_and_not_saved(tmp_path, how, expected):
    watched = Watched(tmp_path)
    settings = study_of((f"{OWN}:Breaks",), Breaks={"how": how})
    work = Experiment(settings, tmp_path, mirror=watched)
    with pytest.raises(errors.MosaicError) as error:
        work.run()
    assert str(error.value).startswith("stage 'breaks': ")
    assert expected in str(error.value)
    assert [stage.name for stage in work.finished()] == ["init"]
    assert not list(tmp_path.glob("stages/breaks/*/done.json"))
    # A copy is kept up to date: a checkpoint, and the finished stage.
    assert watched.found == [("seal.json", 0), ("done.json", 1)]


def test_a_template_that_lacks_an_artifact(tmp_path):
    found = study.build(study_of((f"{OWN}:Untold",)))
    link = next(link for link in found.chain if link.name == "untold")
    with pytest.raises(errors.ConfigError, match="must have 'number'"):
        found.template(link)


def test_stages_that_follow_the_same_one_keep_their_order():
    found = study.build(study_of((f"{OWN}:First", f"{OWN}:Second")))
    assert [link.name for link in found.chain] == ["init", "first", "second", "warmup"]


def test_models_are_kept_for_whatever_stage_needs_them():
    kept = study.build(study_of((f"{OWN}:First",)))
    init = kept.chain[0]
    assert "client_models" in init.provides(kept.settings)
    plain = study.build(study_of(()))
    assert "client_models" not in init.provides(plain.settings)


def test_what_comes_with_the_server_method_is_read_with_it():
    mapping = tiny.config(
        **FEDERATED | {"server__method": "fedftg", "stages": (f"{OWN}:Judges",)}
    ).to_dict()
    found = study.build(settings.from_mapping(mapping))
    link = next(link for link in found.chain if link.name == "judges")
    assert "server.batch_norm" in link.reads(found.settings)
    # A stage that declares no algorithm is not told that clients hold all.
    link = next(link for link in found.chain if link.name == "judges")
    with pytest.raises(AttributeError, match=r"init\.method"):
        found.blueprint(link).rates  # noqa: B018


def test_names_of_another_networks_findings_have_its_name():
    class Found(Stage):
        name = "found"

        def run(self, context):
            yield from ()
            return Outcome(
                artifacts={"model": 1},
                models={"found": {}, "final": {}},
                headline={"n": {}},
            )

    found = running.drive(Link(Found(), suffix="@net").run(None, {}))
    assert set(found.artifacts) == {"model@net"}
    # The study's answer is the server's network.
    assert set(found.models) == {"found@net"}
    assert set(found.headline) == {"n@net"}
