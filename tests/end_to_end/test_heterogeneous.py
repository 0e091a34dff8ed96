"""Clients with parts of a network, and with networks of their own, end to end."""

import json

import jax
import numpy as np
import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors, prng, trees
from mosaic_jax.run.runner import Experiment
from tests import running, tiny

pytestmark = pytest.mark.slow

KEY = prng.root(0)

FIELDS = {
    "model__name": "cnn",
    "model__width": 4,
    "init__rounds": 2,
    "warmup__rounds": 1,
    "finetune__rounds": 1,
    "evaluation__every": 1,
    "experts__local_steps": 0,
    "budgets__rates": (1.0, 0.5),
}
METHODS = ("fedavg@smallest", "heterofl", "mosaic+heterofl")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("heterogeneous")
    config = tiny.config(compare=",".join(METHODS), **FIELDS).to_dict()
    assert launch.run(config, workdir) == 0
    return workdir, json.loads((workdir / "comparison.json").read_text())


def test_smaller_models_send_less(compared):
    workdir, found = compared
    summary = json.loads((workdir / "mosaic+heterofl" / "summary.json").read_text())
    wide, narrow = summary["budgets"]
    assert (wide["rate"], wide["clients"]) == (1.0, [0, 2])
    assert (narrow["rate"], narrow["clients"]) == (0.5, [1])
    # Four rounds; a client of half the width sends about a quarter.
    sent = 4 * (2 * wide["bytes"] + narrow["bytes"])
    assert summary["communication_bytes"]["up"]["models"] == sent
    assert narrow["bytes"] < 0.35 * wide["bytes"]
    assert narrow["flops"] < 0.4 * wide["flops"]
    # The smallest budget's network for everyone.
    sent = found["methods"]["fedavg@smallest"]["bytes_up"]["models"]
    assert sent == 4 * 3 * narrow["bytes"]


def test_accuracy_by_rate_is_in_table_and_picture(compared):
    workdir, found = compared
    assert tuple(found["methods"]) == METHODS
    for name in METHODS[1:]:
        rates = found["methods"][name]["rate_accuracy"]
        assert set(rates) == {"1.0", "0.5"}
        # All of the network is the global model.
        assert rates["1.0"] == found["methods"][name]["test_accuracy"]
    assert "rate_accuracy" not in found["methods"]["fedavg@smallest"]
    assert (workdir / "figures" / "rates.png").exists()
    assert "its part of rate 0.5" in (workdir / "comparison.html").read_text()


def test_generators_have_the_size_of_the_budget(compared):
    workdir, _ = compared
    config = tiny.study(init__method="heterofl", **FIELDS)
    study = Experiment(config, workdir / "mosaic+heterofl")
    running.check_templates(study)
    generators = running.artifacts(study)["generators"]["client_generators"]
    kernel = np.asarray(generators.model.params["convs_1"]["kernel"])
    # The client of rate 0.5 has the first half of the channels; kernels: [.., out, in].
    assert np.all(kernel[1][..., kernel.shape[-2] // 2 :, :] == 0)
    assert np.all(kernel[1][..., : kernel.shape[-2] // 2, : kernel.shape[-1] // 2] != 0)
    assert np.all(kernel[0] != 0)


# By its import path, as a user's own network: one convolution with batch-norm.
OTHER = "tests.tiny:Net"


@pytest.fixture(scope="module")
def architectures(tmp_path_factory):
    fields = FIELDS | {"model__others": (OTHER,), "model__width": 2}
    study = Experiment(tiny.study(**fields), tmp_path_factory.mktemp("architectures"))
    return study, study.run()


def test_each_architecture_forms_experts_and_one_head_fuses_all(architectures):
    study, summary = architectures
    running.check_templates(study)
    made = running.artifacts(study)
    teacher = made["meta"]["teacher"]
    assert set(teacher.experts) == {"cnn", OTHER}
    num_classes = study.data.info.num_classes
    for experts in teacher.experts.values():
        assert experts.present.shape == (num_classes,)
    kernel = teacher.meta_params["fc"]["kernel"]
    assert kernel.shape == (2 * num_classes * num_classes, num_classes)
    prototypes = made["prototypes"]["prototypes"]
    assert set(np.asarray(prototypes.client).tolist()) == {0, 1, 2}
    assert prototypes.logits.shape[1:] == (2 * num_classes, num_classes)
    # Clients 0 and 2 have the server's network, client 1 the other.
    for name, count in (("client_models", 2), (f"client_models@{OTHER}", 1)):
        stage = "warmup" + name.removeprefix("client_models")
        found = made[stage][name].model
        assert found.params["fc"]["kernel"].shape[0] == count
    assert {"teacher", "distilled", "final"} <= set(summary.test_accuracy)
    student = made["finetune"]["final_model"]
    assert set(student.params) == set(teacher.gate.params)


def test_clients_of_other_architectures_keep_their_images(architectures):
    """The split is that of a study with one network."""
    study, _ = architectures
    alone = tiny.study(**FIELDS | {"model__width": 2, "model__name": OTHER})
    assert study.data.sha256 == Experiment(alone, study.workdir / "x").data.sha256


def test_clients_of_other_architectures_keep_their_batches(architectures):
    """A round from one model leaves each client where a round of all clients does."""
    study, _ = architectures
    everyone = study.placement.context(running.link_of(study, "init"))
    classifier = tiny.classifier(study.data.info.num_classes)
    model = classifier.init(KEY, study.data.info.image_shape)

    def first_round(context):
        program = tiny.rounds(
            context.axis, network=classifier, augmentation="crop_flip"
        )
        state = program.initial_state(model, KEY)
        return jax.jit(program.run)(context.clients, KEY, state, 0)[0].client_model

    expected = first_round(everyone)
    kernel = expected.params["fc"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1]) and not np.allclose(
        kernel[0], kernel[2]
    )
    for place, name in enumerate(study.study.networks):
        members = np.arange(3)[place::2]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            first_round(everyone.for_network(name)),
            trees.take(expected, members),
        )
    assert place == 1


def test_a_finished_study_of_architectures_runs_nothing(architectures):
    study, summary = architectures
    again = Experiment(study.settings, study.workdir)
    assert again.run().test_accuracy == summary.test_accuracy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model__others": ("resnet17",)},
            "model.others = ('resnet17',): must be different ones of resnet18,"
            " resnet34, resnet50, resnet101, resnet152, cnn, mlp",
        ),
        (
            {"model__others": ("resnet18",)},
            "model.others = ('resnet18',): must not have model.name = 'resnet18' again",
        ),
        (
            {"model__others": ("cnn",), "meta__gate": "global_topk"},
            "meta.gate = 'global_topk': must be 'none' where clients have different"
            " networks, model.others = ('cnn',)",
        ),
        (
            {"model__others": ("cnn",), "init__method": "heterofl"},
            "model.others = ('cnn',): must be () for init.method = 'heterofl', whose"
            " clients hold parts of one network",
        ),
        (
            {"model__norm": "group", "init__method": "fedrolex"},
            "model.norm = 'group': must be batch for init.method = 'fedrolex', whose"
            " clients lack channels of a group",
        ),
        (
            {"model__rate": 0.5, "init__method": "fedrolex"},
            "model.rate = 0.5: must be 1 for init.method = 'fedrolex': budgets say what"
            " clients hold",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, changes, expected):
    with pytest.raises(errors.ConfigError) as error:
        Experiment(tiny.study(**{"model__name": "resnet18"} | changes), tmp_path)
    assert str(error.value) == expected
