"""Every named config and variant: valid, and what its docstring promises."""

import importlib
import pathlib
import re

import numpy as np
import pytest

from mosaic_jax import server, stages
from mosaic_jax.cli import compared, run
from mosaic_jax.configs import base, cifar10_mosaic
from mosaic_jax.core import errors, registry, schema
from mosaic_jax.data import federated, partition, sources
from mosaic_jax.data.dataset import Arrays
from mosaic_jax.fl import algorithms
from mosaic_jax.run import methods, settings, variants
from mosaic_jax.run import study as studies

FOLDER = pathlib.Path(base.__file__).parent
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"base"})
# What every config for two cores has in common.
TWO_CORES = {
    "model.width": 8,
    "local.batch_size": 32,
    "local.learning_rate": 0.05,
    "init.rounds": 40,
    "warmup.rounds": 0,
    "generators.epochs": 0,
    "generators.steps": 500,
    "generators.batch_size": 32,
    "generators.learning_rate": 1e-3,
    "generators.diversity_weight": 0.0,
    "generators.inversion_weight": 0.0,
    "generators.ema_decay": 0.99,
    "prototypes.clusters": 30,
    "meta.steps": 4000,
    "distill.pool": 512,
    "distill.own_classes": True,
    "distill.balanced": True,
    "distill.steps": 200,
    "distill.learning_rate": 1e-3,
    "distill.schedule": "cosine",
    "finetune.rounds": 6,
    "finetune.learning_rate": 0.01,
    "server.rounds": 30,
    "audit.reference_steps": 100,
    "methods.fedprox.mu": 1.0,
    "methods.fedrs.alpha": 0.9,
    "methods.feddf.steps": 7,
    "methods.feddf.samples_per_generator": 16,
    "methods.dense.batch_size": 64,
    "methods.dense.width": 16,
    "methods.coboosting.batch_size": 64,
    "methods.coboosting.width": 16,
    "methods.coboosting.student_learning_rate": 0.002,
    "methods.fedftg.iterations": 3,
    "methods.fedftg.width": 16,
    "methods.fedftg.student_steps": 2,
    "methods.fedftg.student_learning_rate": 0.003,
    "methods.dfrd.iterations": 3,
    "methods.dfrd.generator_steps": 1,
    "methods.dfrd.student_steps": 2,
    "methods.dfrd.student_learning_rate": 0.003,
    "methods.dfrd.width": 32,
    "methods.dfrd.generator_learning_rate": 1e-3,
}
DIGITS = TWO_CORES | {
    "data.name": "digits",
    "data.validation": 0.125,
    "generators.width": 16,
    "distill.samples_per_generator": 16,
    "evaluation.every": 3,
}
FASHION_MNIST = {
    "data.name": "fashion_mnist",
    "data.validation": 0.05,
    "generators.diversity_weight": 0.0,
    "generators.inversion_weight": 0.0,
    "generators.epochs": 50,
    "init.rounds": 100,
    "warmup.rounds": 10,
    "finetune.rounds": 10,
    "finetune.learning_rate": 1e-3,
}
CIFAR100 = {
    "data.name": "cifar100",
    "local.steps": 20,
    "init.rounds": 1000,
    "prototypes.clusters": 60,
    "meta.gate_experts": 100,
    "distill.learning_rate": 1e-5,
}
PAPER = {
    "generators.discriminator": "classifier",
    "generators.entropy_weight": 1.0,
    "prototypes.space": "client",
    "meta.head": "transformer",
    "meta.gate": "global_topk",
    "warmup.rounds": 41,
    "finetune.rounds": 39,
}
PUBLISHED = {
    "generators.augment": True,
    "generators.min_steps": 0,
    "generators.inversion_weight": 0.0,
    "generators.collapse_below": 0.0,
    "compat.generators_first": True,
    "compat.fresh_classifier": True,
    "compat.classifier_batch_norm": "train",
    "compat.diversity_target": "uniform",
    "compat.value_range": "normalised",
    "compat.ema_debiased": False,
    "prototypes.space": "global",
    "prototypes.gathered": "every_round",
    "meta.head": "transformer",
    "distill.divergence": "logit_mean",
    "finetune.max_drop": 1.0,
    "warmup.rounds": 41,
    "finetune.rounds": 39,
}
# By alpha, as the comments of the published code tell it.
LENGTHS = {
    "": {"data.alpha": 0.01, "meta.steps": 30 * 5, "distill.steps": 1500},
    "_0.1": {"data.alpha": 0.1, "meta.steps": 50 * 5, "distill.steps": 2500},
    "_1.0": {"data.alpha": 1.0, "meta.steps": 50 * 5, "distill.steps": 2500},
}
ORIGINAL = {
    form + end: fields | lengths
    for form, fields in {"paper": PAPER, "published": PUBLISHED}.items()
    for end, lengths in LENGTHS.items()
}


def in_each_form(fields, **others):
    """The variants of a study of full size: with these fields in each."""
    return {
        variant: fields | changes
        for variant, changes in ({"default": {}} | others | ORIGINAL).items()
    }


TINY_IMAGENET = CIFAR100 | {"data.name": "tiny_imagenet", "meta.gate_experts": 200}
FOOD101 = CIFAR100 | {"data.name": "food101", "meta.gate_experts": 101}
RESNET50 = {"model.name": "resnet50"}
FASHION_MNIST_SMALL = TWO_CORES | {
    "data.name": "fashion_mnist",
    "data.max_images": 6000,
    "data.validation": 0.1,
    "generators.width": 8,
    "generators.steps": 3000,
    "generators.ema_decay": 0.995,
    "distill.pool": 1024,
    "distill.samples_per_generator": 16,
    "distill.steps": 300,
    "evaluation.every": 20,
    "finetune.learning_rate": 1e-3,
}
OWN = TWO_CORES | {
    "data.name": "folder",
    "data.dir": "images",
    "data.alpha": 0.1,
    "data.split_seed": 0,
    "generators.width": 16,
    "distill.samples_per_generator": 16,
    "meta.gate_experts": 1,
}
# Config and variant to every field in which it differs from configs/base.py.
PROMISED = {
    "digits_mosaic": {
        "default": DIGITS,
        "architectures": DIGITS | {"model.others": ("cnn",), "finetune.rounds": 0},
    },
    "own_mosaic": {"default": OWN},
    "fashion_mnist_mosaic": {"default": FASHION_MNIST, "small": FASHION_MNIST_SMALL},
    "mnist_mosaic": {
        "default": FASHION_MNIST | {"data.name": "mnist"},
        "small": FASHION_MNIST_SMALL | {"data.name": "mnist"},
    },
    "cifar10_mosaic": in_each_form({}),
    "svhn_mosaic": in_each_form({"data.name": "svhn"}),
    "cifar100_mosaic": in_each_form(CIFAR100, resnet50=RESNET50),
    "tiny_imagenet_mosaic": in_each_form(TINY_IMAGENET, resnet50=RESNET50),
    "food101_mosaic": in_each_form(FOOD101, resnet50=RESNET50),
}
STUDIES = [f"{name}:{variant}" for name, of in PROMISED.items() for variant in of]
# Variants of the comparisons: METHOD, or METHOD:VARIANT of the Mosaic config.
EVERY_METHOD = sorted(
    {
        *methods.COMPARED,
        *methods.HETEROGENEOUS,
        *methods.LISTS,
        *algorithms.ALGORITHMS,
        *server.METHODS,
        "dfrd+heterofl",
    }
)
COMPARISONS = ("baselines", "heterogeneous")
DATASETS = [name.removesuffix("_mosaic") for name in PROMISED]


def get(config):
    """The ConfigDict of NAME or NAME:VARIANT, as the command line makes it."""
    name, _, variant = config.partition(":")
    module = importlib.import_module(f"mosaic_jax.configs.{name}")
    return module.get_config(variant) if variant else module.get_config()


def flat(config):
    """Nested fields by their full names."""

    def walk(mapping, path):
        for name, value in mapping.items():
            if isinstance(value, dict):
                yield from walk(value, f"{path}{name}.")
            else:
                yield path + name, value

    return dict(walk(config.to_dict(), ""))


def variants_of(name):
    """Those that a Mosaic config knows, from what it says to a wrong one."""
    module = importlib.import_module(f"mosaic_jax.configs.{name}")
    with pytest.raises(ValueError, match="unknown variant; known: default") as caught:
        module.get_config("no such variant")
    return str(caught.value).partition("known: ")[2].split(", ")


def variants_in_docstring(name):
    doc = importlib.import_module(f"mosaic_jax.configs.{name}").__doc__
    return re.findall(rf"configs/{name}\.py:?(\S*)", doc)


def test_every_file_and_variant_has_promises():
    names = [name for name in NAMES if name not in COMPARISONS]
    assert {name: variants_of(name) for name in names} == {
        name: list(of) for name, of in PROMISED.items()
    }


@pytest.mark.parametrize("config", STUDIES)
def test_a_study_differs_from_the_defaults_as_promised_and_nowhere_else(config):
    name, _, variant = config.partition(":")
    defaults, found = flat(base.get_config()), flat(get(config))
    assert found.keys() == defaults.keys()
    differing = {field: v for field, v in found.items() if v != defaults[field]}
    promised = PROMISED[name][variant].items()
    assert differing == {field: v for field, v in promised if v != defaults[field]}


@pytest.mark.parametrize("name", PROMISED)
def test_a_study_without_a_variant_is_the_default(name):
    assert get(name) == get(f"{name}:default")


def test_defaults_have_the_sizes_of_the_published_study():
    study = settings.from_mapping(base.get_config().to_dict())
    assert (study.data.num_clients, study.model.name) == (10, "resnet18")
    assert study.init.rounds == 300
    assert study.total_rounds == 300 + 80


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_docstrings_name_known_variants(name):
    found = variants_in_docstring(name)
    assert found, "a config tells how it is run"
    for variant in found:
        if name in COMPARISONS:
            dataset, _, rest = variant.partition(":")
            method, _, size = rest.partition(":")
            assert not method or method in EVERY_METHOD
            assert not size or size in variants_of(f"{dataset}_mosaic")
        else:
            assert not variant or variant in variants_of(name)


@pytest.mark.parametrize("config", STUDIES)
def test_every_study_is_valid(config):
    mapping = get(config).to_dict()
    found = schema.to_mapping(settings.from_mapping(mapping))
    assert mapping["model"]["dtype"] == "auto"
    assert found["model"].pop("dtype") == "float32"  # on a CPU
    del mapping["model"]["dtype"]
    assert found == mapping


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_comparison_is_valid_and_on_equal_terms(name, dataset):
    variants = {"", *variants_of(f"{dataset}_mosaic")} - {"architectures"}
    for variant in sorted(variants):
        end = f":{variant}" if variant else ""
        mosaic = settings.from_mapping(get(f"{dataset}_mosaic{end}").to_dict())
        for method in EVERY_METHOD:
            config = f"{name}:{dataset}:{method}{end}"
            study = settings.from_mapping(get(config).to_dict())
            for term in ("data", "local", "seed", "total_rounds", "generators", "meta"):
                assert getattr(study, term) == getattr(mosaic, term), (config, term)
            if "@smallest" not in method:
                assert study.model == mosaic.model, config
            component(study)


def component(study):
    """The federated algorithm of a study; its fields are checked."""
    return registry.build(algorithms.ALGORITHMS, study.init.method, study.methods)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_have_defaults(name):
    given = {"baselines": "fedavg", "heterogeneous": "mosaic+heterofl"}[name]
    assert get(name) == get(f"{name}:digits") == get(f"{name}:digits:{given}")
    assert get(f"{name}:digits:{given}") == get(f"{name}:digits:{given}:default")
    with pytest.raises(ValueError, match="iris: unknown data set; known: cifar10, "):
        get(f"{name}:iris")


@pytest.mark.parametrize("method", [*EVERY_METHOD, "mosaic+heterofl"])
def test_a_method_changes_settings_as_it_changes_a_config(method):
    if method in methods.LISTS:
        return
    study = settings.from_mapping(get("digits_mosaic").to_dict())
    found = methods.with_method(study, method)
    assert found == settings.from_mapping(get(f"baselines:digits:{method}").to_dict())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fedavg", ("federated", "fedavg", "none", "every_round", 1.0)),
        ("fedavg_decay", ("federated", "fedavg", "none", "every_round", 1.0)),
        ("fedprox", ("federated", "fedprox", "none", "every_round", 1.0)),
        ("dense", ("federated", "fedavg", "dense", "once", 1.0)),
        ("dfrd+heterofl", ("federated", "heterofl", "dfrd", "every_round", 1.0)),
        ("mosaic", ("mosaic", "fedavg", "none", "every_round", 1.0)),
        ("mosaic+fedrolex", ("mosaic", "fedrolex", "none", "every_round", 1.0)),
        ("heterofl", ("federated", "heterofl", "none", "every_round", 1.0)),
        ("fedavg@smallest", ("federated", "fedavg", "none", "every_round", 0.25)),
    ],
)
def test_methods(method, expected):
    study = settings.from_mapping(get(f"heterogeneous:digits:{method}").to_dict())
    assert expected == (
        study.method,
        study.init.method,
        study.server.method,
        study.server.when,
        study.model.rate,
    )


@pytest.mark.parametrize("form", variants.FIELDS)
def test_a_form_of_mosaic_settles_every_mechanism(form):
    """Whatever the study has, and nothing of its sizes; total rounds stay."""
    values = variants.FIELDS[form]
    for config in ("cifar10_mosaic:published", "cifar10_mosaic:paper"):
        study = settings.from_mapping(get(config).to_dict())
        found = schema.to_mapping(methods.with_method(study, f"mosaic:{form}"))
        expected = methods.changed(schema.to_mapping(study), values)
        assert found == expected
    digits = settings.from_mapping(get("digits_mosaic").to_dict())
    found = methods.with_method(digits, f"mosaic:{form}")
    assert found.total_rounds == digits.total_rounds == 46
    # 40 times 41 / 341: there is no warm-up to gather prototypes in.
    rounds = {"paper": (40, 0, 6), "published": (35, 5, 6)}[form]
    assert rounds == (found.init.rounds, found.warmup.rounds, found.finetune.rounds)
    assert found.meta.steps == digits.meta.steps
    assert found.generators.width == digits.generators.width


def test_forms_may_be_compared_and_train_their_clients_otherwise():
    names = "fedavg,mosaic,mosaic:paper,mosaic:published,mosaic:paper+fedprox"
    words = ["--config", str(FOLDER / "baselines.py:digits:all")]
    given = run.parse([*words, f"--config.compare={names}"])
    study = settings.from_mapping(given.config.to_dict())
    found = {name: compared.study_of_method(study, name) for name in names.split(",")}
    assert found["mosaic"].generators.discriminator == "network"
    assert found["mosaic:paper"].generators.discriminator == "classifier"
    assert found["mosaic:published"].prototypes.gathered == "every_round"
    assert found["mosaic:paper+fedprox"].init.method == "fedprox"
    assert found["mosaic:paper+fedprox"].meta.gate == "global_topk"


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("mosaic:papre", "compare = 'mosaic:papre': ':papre' must be one of :paper, "),
        ("mosaic:paper_decay", "must be without '_decay'"),
        ("fedavg@smallest_decay", "'@smallest_decay' must be '@smallest'"),
        ("fedavg@largest", "'@largest' must be '@smallest'"),
        ("mosaic_decay", "must be without '_decay'"),
        ("dense_decay", "must be without '_decay'"),
        ("fedavg+moon", "'+moon' must stand after mosaic or a method on the server"),
    ],
)
def test_names_of_methods_that_say_nothing(method, told):
    study = settings.from_mapping(get("digits_mosaic").to_dict())
    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        methods.changes(study, method)


@pytest.mark.parametrize("base", ["fedavg", "dense", "scaffold"])
@pytest.mark.parametrize("name", ["mosaic", "fedavg", "dense"])
def test_methods_are_named_by_what_they_change_of_mosaic(base, name):
    study = settings.from_mapping(get(f"baselines:digits:{base}").to_dict())
    told = "method = 'federated': must be 'mosaic' where a method is named"
    with pytest.raises(errors.ConfigError, match=told):
        methods.with_method(study, name)


@pytest.mark.parametrize("method", ["fedavg", "dfrd"])
def test_a_decaying_method_ends_as_mosaic_does(method):
    mosaic = settings.from_mapping(get("fashion_mnist_mosaic").to_dict())
    plain, decaying = (
        settings.from_mapping(get(f"baselines:fashion_mnist:{name}").to_dict())
        for name in (method, f"{method}_decay")
    )
    assert decaying.finetune == mosaic.finetune
    assert decaying.warmup == mosaic.warmup
    assert plain.finetune.rounds == 0
    assert [link.name for link in stages.chain(decaying)][-1] == "finetune"


@pytest.mark.parametrize("dataset", DATASETS)
def test_rates_of_heterogeneous_clients(dataset):
    thirds = [4, 3, 3], [1.0, 0.5, 0.25]
    fifths = [2] * 5, [1.0, 0.5, 0.25, 0.125, 0.0625]
    variants = {"": thirds if dataset == "digits" else fifths}
    if dataset == "fashion_mnist":
        variants |= {":mosaic+heterofl:small": thirds}
    for variant, (counts, rates) in variants.items():
        config = get(f"heterogeneous:{dataset}{variant}")
        study = settings.from_mapping(config.to_dict())
        assert study.method == "mosaic" and study.init.method == "heterofl"
        found = study.budgets.of_clients(study.data.num_clients)
        assert [found.count(rate) for rate in rates] == counts


@pytest.mark.parametrize("name", ["cifar100", "tiny_imagenet", "food101", "digits"])
def test_the_gate_may_keep_as_many_experts_as_there_are_classes(name):
    study = settings.from_mapping(get(f"{name}_mosaic").to_dict())
    assert study.meta.gate_experts == sources.SOURCES[name].info.num_classes


def test_half_of_the_clients_have_another_network():
    study = settings.from_mapping(get("digits_mosaic:architectures").to_dict())
    assert study.networks == ("resnet18", "cnn")


def test_most_digits_clients_hold_one_or_two_classes():
    study = settings.from_mapping(get("digits_mosaic").to_dict())
    _, arrays = sources.load("digits", study.data.dir)
    clients = partition.split(
        arrays.train_label,
        mode=study.data.split,
        num_clients=study.data.num_clients,
        alpha=study.data.alpha,
        seed=study.seed + study.data.split_seed,
    )
    held = [len(np.unique(arrays.train_label[numbers])) for numbers in clients]
    assert len(held) == 10
    assert sum(count <= 2 for count in held) > 5


def test_operations_of_the_cifar10_study():
    """As many as its docstring says, to the digit that it gives."""
    module = importlib.import_module("mosaic_jax.configs.cifar10_mosaic")
    told = re.search(r"About (\S+) floating-point operations", module.__doc__)[1]
    study = settings.from_mapping(get("cifar10_mosaic").to_dict())
    info = sources.SOURCES["cifar10"].info

    def images(count):
        label = np.arange(count, dtype=np.int32) % info.num_classes
        return np.zeros((count, *info.image_shape), np.uint8), label

    data = federated.build(
        study.data, study.seed, info, Arrays(*images(50_000), *images(10_000))
    )
    found = studies.Study(
        settings=study,
        data=data,
        networks=studies.build_networks(study, info),
        algorithm=component(study),
        server=None,
        chain=stages.chain(study),
    ).flops
    assert f"{sum(found.values()):.0e}".replace("+", "") == told


def test_published_studies_count_epochs_alone():
    assert cifar10_mosaic.get_config().generators.min_steps == 2000
    published = cifar10_mosaic.get_config("published").generators
    assert (published.min_steps, published.max_steps) == (0, 0)
