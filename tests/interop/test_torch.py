"""The published networks' known answers hold through `interop.torch`."""

import functools

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from mosaic_jax.core import errors, tensor_files
from mosaic_jax.core.types import Batch, ModelState
from mosaic_jax.fl import training
from mosaic_jax.interop import torch as interop
from mosaic_jax.nn import losses, state_dicts
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.lenet import FedAvgCNN, LeNet5
from mosaic_jax.nn.mobilenet import MobileNetV2
from mosaic_jax.nn.vit import ViT
from tests import golden


def close(ours, theirs, rtol=1e-4):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-5)


def answer(module, variables, inputs, **how):
    """Of a network that does not train."""
    run = functools.partial(module.apply, train=False, **how)
    return jax.jit(run)(variables, inputs)


@pytest.fixture(scope="module")
def resnet18():
    return interop.load("resnet18", golden.state_dict("resnet18", 7))


def test_resnet18_in_eval_mode(resnet18):
    module, variables = resnet18
    image = golden.images(8)
    close(
        answer(module, variables, image),
        golden.OUTPUTS["resnet18/eval_logits"],
    )
    close(
        answer(module, variables, image, method="features"),
        golden.OUTPUTS["resnet18/eval_features"],
    )


def test_resnet18_one_sgd_step_and_running_statistics(resnet18):
    module, variables = resnet18
    # Signed images that this classifier's normalisation leaves as they are.
    classifier = Classifier(module, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = ModelState(variables["params"], variables["batch_stats"])
    tx = training.sgd(0.01, 1e-4)
    batch = Batch(golden.images(8), np.arange(4), np.ones(4, bool))
    after, _, loss = jax.jit(
        lambda model: training.sgd_step(
            classifier, tx, model, tx.init(model.params), batch
        )
    )(model)
    close(loss, golden.OUTPUTS["resnet18/train_loss"])
    saved = interop.save("resnet18", after.variables)
    for key in golden.OUTPUTS.files:
        if key.startswith("resnet18/after_step/"):
            name = key.removeprefix("resnet18/after_step/")
            close(saved[name].reshape(-1)[:2000], golden.OUTPUTS[key].reshape(-1))


def test_generator():
    module, variables = interop.load("generator", golden.state_dict("generator", 11))
    image = answer(module, variables, golden.noise(12))
    close(image.transpose(0, 3, 1, 2), golden.OUTPUTS["generator/eval_images"])


def test_discriminator():
    state = golden.state_dict("discriminator", 13)
    module, variables = interop.load("discriminator", state)
    logits = answer(module, variables, golden.images(14))
    close(jax.nn.sigmoid(logits), golden.OUTPUTS["discriminator/eval_prob"])


def test_meta_head():
    module, variables = interop.load("meta", golden.state_dict("meta10", 31))
    logits = answer(module, variables, golden.OUTPUTS["meta10/expert_logits"])
    close(logits, golden.OUTPUTS["meta10/logits_from_features"])


def test_distillation_loss_and_gradient():
    student, teacher = golden.OUTPUTS["kd/student"], golden.OUTPUTS["kd/teacher"]

    def loss(student):
        return losses.distillation(
            student,
            teacher,
            temperature=1.0,
            alpha=0.8,
            beta=1.0,
            divergence="logit_mean",
        )

    value, gradient = jax.value_and_grad(loss)(student)
    close(value, golden.OUTPUTS["kd/loss"])
    close(gradient, golden.OUTPUTS["kd/grad_student"])
    close(
        np.mean(losses.logit_mean_divergence(student, teacher)),
        golden.OUTPUTS["kd/reference_jsd"],
    )


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        ("resnet18", "resnet18"),
        ("generator", "generator"),
        ("discriminator", "discriminator"),
        ("meta", "meta10"),
    ],
)
def test_save_undoes_load(network, shapes):
    state = golden.state_dict(shapes, 3)
    _, variables = interop.load(network, state)
    saved = interop.save(network, variables)
    kept = {n for n in state if n not in interop.UNUSED}
    assert saved.keys() == kept
    for name in kept:
        np.testing.assert_array_equal(saved[name], state[name])


@pytest.mark.parametrize("network", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_deeper_resnets_fit_the_table(network):
    from mosaic_jax.nn import resnet

    module = resnet.ResNet(7, network, 4)
    variables = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
    )
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), variables)
    _, loaded = interop.load(network, interop.save(network, variables), 7)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)


def test_bad_state_dicts_are_named():
    state = golden.state_dict("resnet18", 7)
    with pytest.raises(errors.CheckpointError, match="3 classes|num_classes = 3"):
        interop.load("resnet18", state, 3)
    del state["layer2.0.conv1.weight"]
    with pytest.raises(
        errors.CheckpointError, match="'layer2.0.conv1.weight' is missing"
    ):
        interop.load("resnet18", state)
    with pytest.raises(errors.ConfigError, match="network = 'vgg'"):
        interop.load("vgg", state)


def test_files_are_read_as_mappings_are(tmp_path):
    state = golden.state_dict("discriminator", 13)
    tensor_files.write(tmp_path / "d.safetensors", state)
    _, variables = interop.load("discriminator", tmp_path / "d.safetensors")
    _, expected = interop.load("discriminator", state)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


# Small forms of networks, as torchvision and timm write them down.
SMALL = {
    "mobilenetv2": (
        MobileNetV2(10, 16, stages=((1, 16, 1, 1), (6, 24, 2, 2))),
        41,
    ),
    "vit": (ViT(10, 4, depth=2), 42),
    "lenet5": (LeNet5(10), 43),
    "fedavg_cnn": (FedAvgCNN(10, 4), 44),
}


@pytest.mark.parametrize("name", SMALL)
def test_other_networks_answer_as_those_of_torch(name):
    module, seed = SMALL[name]
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
    )
    flat = flax.traverse_util.flatten_dict(dict(shapes))
    state = golden.state_dict(name, seed)
    variables = flax.traverse_util.unflatten_dict(
        {
            entry.path: entry.to_jax(state[entry.name], flat[entry.path].shape)
            for entry in state_dicts.layouts(name, flat)[0]
        }
    )
    image = golden.images(8)
    close(answer(module, variables, image), golden.OUTPUTS[f"{name}/eval_logits"])
    if name == "mobilenetv2":
        train = functools.partial(module.apply, train=True, mutable=["batch_stats"])
        logits, _ = jax.jit(train)(variables, image)
        close(logits, golden.OUTPUTS[f"{name}/train_logits"], rtol=1e-3)
    saved = interop.save(name, variables)
    assert saved.keys() == state.keys()
    for entry in state:
        np.testing.assert_array_equal(saved[entry], state[entry])


def test_parameter_counts():
    def count(module, *inputs):
        variables = jax.eval_shape(
            lambda: module.init(jax.random.key(0), *inputs, train=False)
        )
        return sum(x.size for x in jax.tree.leaves(variables["params"]))

    from mosaic_jax.nn import dcgan, meta, resnet

    image = np.zeros((1, 32, 32, 3))
    assert count(resnet.ResNet(10), image) == 11_173_962
    assert count(resnet.ResNet(100, "resnet50"), image) == 23_705_252
    assert count(dcgan.Generator(), np.zeros((1, 100))) == 3_573_824
    assert count(dcgan.Discriminator(), image) == 2_759_424
    # The published class also holds 110 numbers that it never uses.
    assert count(meta.TransformerHead(10), np.zeros((1, 10, 10))) == 948_316 - 110


def test_optax_sgd_is_pytorch_sgd():
    params = {"w": np.float32(2.0)}
    tx = training.sgd(0.1, 0.5)
    update, _ = tx.update({"w": np.float32(1.0)}, tx.init(params), params)
    assert optax.apply_updates(params, update)["w"] == pytest.approx(2 - 0.1 * 2)
