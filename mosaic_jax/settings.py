"""The frozen, validated settings of a study.

Fields have no defaults here: `configs/base.py` holds them all. `from_mapping` is the
one border between a configuration file and the library; it reports every problem at
once, each with the field, its value and what is allowed.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from mosaic_jax import errors, gating, losses

DATA_SETS = (
    "digits",
    "mnist",
    "fashion_mnist",
    "svhn",
    "cifar10",
    "cifar100",
    "tiny_imagenet",
    "food101",
    "folder",
    "npz",
)
SPLITS = ("iid", "dirichlet_unbalanced", "dirichlet_balanced", "file")
AUGMENTATIONS = ("auto", "none", "crop_flip")
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "cnn")
MAX_INT = MAX_SEED = 2**31 - 1
MAX_SEEDS = 1000
MAX_WIDTH = 4096
NORMS = ("batch", "group")
DTYPES = ("float32", "bfloat16")
LOWERINGS = ("auto", "grouped", "dense", "patches")
HEADS = ("transformer", "linear", "diagonal", "mean")


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a field may be: a phrase for the reader and a test for the program."""

    phrase: str
    test: Callable[[Any], bool]


def _field(phrase: str, test: Callable[[Any], bool]) -> Any:
    return dataclasses.field(metadata={"allowed": Allowed(phrase, test)})


def at_least(low: float) -> Any:
    """A field that must be >= `low`."""
    return _field(f">= {low}", lambda x: x >= low)


def above(low: float) -> Any:
    """A field that must be > `low`."""
    return _field(f"> {low}", lambda x: x > low)


def between(low: float, high: float) -> Any:
    """A field that must be in [low, high]."""
    return _field(f"in [{low}, {high}]", lambda x: low <= x <= high)


def below_one() -> Any:
    """A field that must be in [0, 1)."""
    return _field("in [0, 1)", lambda x: 0 <= x < 1)


def one_of(*names: str) -> Any:
    """A field that must be one of `names`."""
    return _field(f"one of {', '.join(names)}", lambda x: x in names)


def anything() -> Any:
    """A field that may be anything of its type."""
    return _field("any", lambda _: True)


def _is_rates(value: tuple) -> bool:
    return len(value) > 0 and all(type(x) in (int, float) and 0 < x <= 1 for x in value)


def _are_networks(value: tuple) -> bool:
    return len(set(value)) == len(value) and set(value) <= set(NETWORKS)


def _is_shares(value: tuple) -> bool:
    return all(type(x) in (int, float) and x >= 0 for x in value)


@dataclasses.dataclass(frozen=True)
class Data:
    """Data set and its split over clients."""

    name: str = one_of(*DATA_SETS)
    dir: str = anything()
    augmentation: str = one_of(*AUGMENTATIONS)
    split: str = one_of(*SPLITS)
    split_file: str = anything()
    num_clients: int = at_least(1)
    alpha: float = above(0)
    split_seed: int = at_least(0)
    max_images: int = at_least(0)
    validation: float = below_one()


@dataclasses.dataclass(frozen=True)
class Model:
    """The classifier of server and clients, and further networks of clients."""

    name: str = one_of(*NETWORKS)
    others: tuple = _field(f"different ones of {', '.join(NETWORKS)}", _are_networks)
    width: int = between(1, MAX_WIDTH)
    norm: str = one_of(*NORMS)
    dtype: str = one_of(*DTYPES)
    rate: float = _field("in (0, 1]", lambda x: 0 < x <= 1)


@dataclasses.dataclass(frozen=True)
class Local:
    """Local SGD of a client in a federated round."""

    steps: int = at_least(1)
    batch_size: int = at_least(1)
    learning_rate: float = above(0)
    weight_decay: float = at_least(0)


@dataclasses.dataclass(frozen=True)
class Init:
    """Stage 1: federated averaging from scratch."""

    method: str = anything()
    rounds: int = at_least(1)
    clients_per_round: int = at_least(0)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How much of the network each client holds, where `init.method` cuts it."""

    rule: str = one_of("list", "shares", "formula")
    rates: tuple = _field("numbers in (0, 1], at least one", _is_rates)
    shares: tuple = _field("numbers >= 0", _is_shares)
    rho: float = at_least(0)
    sigma: int = at_least(0)

    def of_clients(self, num_clients: int) -> tuple[float, ...]:
        """The rate of each client: the share of every hidden layer's channels it holds.

        "list": `rates` in turn; "shares": a part `shares[j]` of the clients holds
        `rates[j]`, the first clients the first of them; "formula": `2^-min(sigma,
        floor(rho i / N))` of client i = 1, ..., N (Luo et al., 2023).
        """
        if self.rule == "list":
            turns = range(num_clients)
            return tuple(float(self.rates[i % len(self.rates)]) for i in turns)
        if self.rule == "formula":
            halvings = (
                min(self.sigma, math.floor(self.rho * i / num_clients))
                for i in range(1, num_clients + 1)
            )
            return tuple(0.5**count for count in halvings)
        total, bound, result = sum(self.shares), 0.0, []
        for rate, share in zip(self.rates, self.shares, strict=True):
            bound += share / total * num_clients
            result += [float(rate)] * (round(bound) - len(result))
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class Server:
    """Training of the global model on the server, without data."""

    method: str = anything()
    when: str = one_of("every_round", "once")
    batch_norm: str = one_of("eval", "train")
    rounds: int = at_least(1)
    participants: str = one_of("all", "latest")


@dataclasses.dataclass(frozen=True)
class Generators:
    """Stage 2: one GAN per client."""

    when: str = one_of("after_init", "before_init")
    epochs: int = at_least(0)
    min_steps: int = at_least(0)
    max_steps: int = at_least(0)
    steps: int = at_least(0)
    batch_size: int = at_least(2)
    learning_rate: float = above(0)
    latent_dim: int = between(1, MAX_WIDTH)
    width: int = between(1, MAX_WIDTH)
    entropy_weight: float = at_least(0)
    diversity_weight: float = at_least(0)
    diversity_target: str = one_of("labels", "uniform")
    inversion_weight: float = at_least(0)
    inversion_below: int = at_least(0)
    classifier: str = one_of("client", "fresh")
    classifier_epochs: int = at_least(1)
    classifier_batch_norm: str = one_of("eval", "train")
    value_range: str = one_of("signed", "normalised")
    translate: int = at_least(0)
    ema_decay: float = below_one()
    collapse_below: float = at_least(0)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """Stage 3: more federated rounds."""

    rounds: int = at_least(0)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Stage 4: one expert per class."""

    local_steps: int = at_least(0)
    participants: str = one_of("all", "latest")


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Stage 5: k-means centres per client and class."""

    clusters: int = at_least(1)
    space: str = one_of("expert", "client", "global")
    iterations: int = at_least(0)


@dataclasses.dataclass(frozen=True)
class Meta:
    """Stage 6: the head that fuses the experts."""

    head: str = one_of(*HEADS)
    steps: int = at_least(1)
    batch_size: int = at_least(1)
    learning_rate: float = above(0)
    ema_decay: float = below_one()
    ema_debiased: bool = anything()
    gate: str = one_of(*gating.GATES)
    gate_experts: int = at_least(1)


@dataclasses.dataclass(frozen=True)
class Distill:
    """Stage 7: teacher to student on generated images."""

    source: str = one_of("generated", "validation")
    steps: int = at_least(1)
    samples_per_generator: int = at_least(1)
    weighting: str = one_of("uniform", "size")
    min_confidence: float = below_one()
    augment: str = one_of("none", "data", "translate")
    learning_rate: float = above(0)
    schedule: str = one_of("constant", "cosine")
    temperature: float = above(0)
    alpha: float = between(0, 1)
    beta: float = at_least(0)
    divergence: str = one_of(*losses.DIVERGENCES)
    batch_norm: str = one_of("eval", "train")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Stage 8: federated averaging from the distilled model."""

    rounds: int = at_least(0)
    learning_rate: float = above(0)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the generators give away, measured after the study; changes no result."""

    images: int = _field("0 or >= 2", lambda x: x == 0 or x >= 2)
    reference_steps: int = at_least(1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How and how often models are measured; changes no result."""

    batch_size: int = at_least(1)
    every: int = at_least(1)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the work is laid out; changes results by rounding only."""

    devices: int = at_least(0)
    clients_at_once: int = at_least(0)
    seeds_at_once: int = at_least(0)
    client_state: str = one_of("auto", "device", "host")
    convolution: str = one_of(*LOWERINGS)


@dataclasses.dataclass(frozen=True)
class Log:
    """Checkpoints, progress and TensorBoard; changes no result."""

    every_steps: int = at_least(1)
    checkpoint_seconds: float = at_least(0)
    tensorboard: bool = anything()
    wandb: bool = anything()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a study depends on."""

    method: str = one_of("mosaic", "federated")
    seed: int = between(0, MAX_SEED)
    seeds: int = between(1, MAX_SEEDS)
    compare: str = anything()
    profile: str = anything()
    data: Data = anything()
    model: Model = anything()
    local: Local = anything()
    init: Init = anything()
    budgets: Budgets = anything()
    server: Server = anything()
    methods: dict = anything()
    generators: Generators = anything()
    warmup: Warmup = anything()
    experts: Experts = anything()
    prototypes: Prototypes = anything()
    meta: Meta = anything()
    distill: Distill = anything()
    finetune: Finetune = anything()
    audit: Audit = anything()
    evaluation: Evaluation = anything()
    compute: Compute = anything()
    log: Log = anything()

    @property
    def networks(self) -> tuple[str, ...]:
        """Of clients, dealt to them in turn; the first is the server's as well."""
        return (self.model.name, *self.model.others)

    @property
    def trains_once(self) -> bool:
        """The server trains on the clients of the last round."""
        return self.server.method != "none" and self.server.when == "once"

    @property
    def trains_every_round(self) -> bool:
        """The server trains after every aggregation."""
        return self.server.method != "none" and self.server.when == "every_round"

    @property
    def total_rounds(self) -> int:
        """Federated rounds of all stages."""
        return self.init.rounds + self.warmup.rounds + self.finetune.rounds


def from_mapping(mapping: Mapping[str, Any]) -> Settings:
    """Check a nested mapping and freeze it.

    Raises:
      ConfigError: one line per problem, such as
        "distill.temperature = -1.0: must be > 0".
    """
    problems: list[str] = []
    result = _build(Settings, mapping, "", problems)
    if not problems:
        problems = _contradictions(result)
    if problems:
        raise errors.ConfigError("\n".join(problems))
    return result


def check(cls: type, mapping: Mapping[str, Any], path: str) -> Any:
    """A dataclass whose fields are made by `at_least` and its like, from a mapping.

    Raises:
      ConfigError: one line per problem, with names under `path`.
    """
    problems: list[str] = []
    result = _build(cls, mapping, f"{path}.", problems)
    if problems:
        raise errors.ConfigError("\n".join(problems))
    return result


def check_one(known: Mapping[str, type], name: str, methods: Mapping[str, Any]) -> Any:
    """`check` every one of `known` whose fields are in `methods`; returns `name`'s.

    None if `name` is not known.
    """
    chosen = {name} & known.keys()
    checked = {
        each: check(known[each], methods.get(each, {}), f"methods.{each}")
        for each in sorted(chosen | methods.keys() & known.keys())
    }
    return checked.get(name)


def to_mapping(settings: Any) -> dict[str, Any]:
    """Nested plain dict of the settings, or of a part of them."""
    return dataclasses.asdict(settings)


def digest(value: Any) -> str:
    """sha256 of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def near(name: str, known: list[str]) -> str:
    """The known name that looks like `name`, else all of them, as a hint."""
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"did you mean '{match[0]}'?"
    return f"known: {', '.join(known)}"


def _build(cls: type, mapping: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{path[:-1]} = {mapping!r}: must be a group of fields")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in mapping:
        if name not in fields:
            hint = near(str(name), list(fields))
            problems.append(f"{path}{name}: unknown field, {hint}")
    values = {}
    for name, field in fields.items():
        full = path + name
        if name not in mapping:
            problems.append(f"{full}: missing")
        elif dataclasses.is_dataclass(field.type):
            values[name] = _build(field.type, mapping[name], f"{full}.", problems)
        else:
            values[name] = _check(field, mapping[name], full, problems)
    return cls(**values) if len(values) == len(fields) else None


def _check(field: dataclasses.Field, value: Any, full: str, problems: list[str]) -> Any:
    wanted = field.type
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        kind = type(value).__name__
        problems.append(f"{full} = {value!r}: must be {wanted.__name__}, not {kind}")
        return value
    if wanted is int and abs(value) > MAX_INT:
        problems.append(f"{full} = {value!r}: must be in [-{MAX_INT}, {MAX_INT}]")
        return value
    if wanted is float and not math.isfinite(value):
        problems.append(f"{full} = {value!r}: must be finite")
        return value
    allowed: Allowed = field.metadata["allowed"]
    if not allowed.test(value):
        problems.append(f"{full} = {value!r}: must be {allowed.phrase}")
    return value


def _contradictions(settings: Settings) -> list[str]:
    problems = []
    if settings.seed + settings.seeds > MAX_SEED + 1:
        problems.append(
            f"seeds = {settings.seeds}: must be <= {MAX_SEED + 1 - settings.seed} for"
            f" seed = {settings.seed}"
        )
    if settings.method == "mosaic" and settings.server.method != "none":
        problems.append(
            f"server.method = {settings.server.method!r}: must be none for method ="
            " 'mosaic', which trains the global model itself"
        )
    if settings.init.clients_per_round > settings.data.num_clients:
        problems.append(
            f"init.clients_per_round = {settings.init.clients_per_round}: must be <="
            f" data.num_clients = {settings.data.num_clients}"
        )
    problems += _contradictions_of_generators(settings)
    problems += _contradictions_of_networks(settings)
    if (settings.data.split == "file") != bool(settings.data.split_file):
        problems.append(
            f"data.split_file = {settings.data.split_file!r}: must be a path for"
            " data.split = 'file', and '' otherwise"
        )
    budgets = settings.budgets
    if budgets.rule == "shares" and (
        len(budgets.shares) != len(budgets.rates) or sum(budgets.shares) <= 0
    ):
        problems.append(
            f"budgets.shares = {budgets.shares}: must be {len(budgets.rates)} numbers,"
            " one for each of budgets.rates, and not all 0"
        )
    if settings.distill.source == "validation" and settings.data.validation == 0:
        problems.append(
            "data.validation = 0.0: must be > 0 for distill.source = 'validation'"
        )
    return problems


def _contradictions_of_generators(settings: Settings) -> list[str]:
    problems = []
    generators = settings.generators
    if (generators.epochs == 0) == (generators.steps == 0):
        problems.append(
            f"generators.steps = {generators.steps}: must be 0 where"
            f" generators.epochs = {generators.epochs} is not, and the other way round"
        )
    if 0 < generators.max_steps < generators.min_steps:
        problems.append(
            f"generators.max_steps = {generators.max_steps}: must be 0, for no bound,"
            f" or >= generators.min_steps = {generators.min_steps}"
        )
    if generators.when == "before_init" and generators.classifier != "fresh":
        problems.append(
            "generators.classifier = 'client': must be fresh for generators.when ="
            " 'before_init', when no client model exists"
        )
    if generators.when == "before_init" and generators.inversion_weight > 0:
        problems.append(
            f"generators.inversion_weight = {generators.inversion_weight}: must be 0"
            " for generators.when = 'before_init', when no global model exists"
        )
    if settings.model.norm == "group" and generators.inversion_weight > 0:
        problems.append(
            f"generators.inversion_weight = {generators.inversion_weight}: must be 0"
            " for model.norm = 'group', which has no statistics to match"
        )
    return problems


def _contradictions_of_networks(settings: Settings) -> list[str]:
    """What studies with several networks cannot do."""
    others = settings.model.others
    if not others:
        return []
    problems = []
    if settings.model.name in others:
        problems.append(
            f"model.others = {others}: must not have model.name ="
            f" {settings.model.name!r} again"
        )
    if len(settings.networks) > settings.data.num_clients:
        problems.append(
            f"model.others = {others}: must be fewer than data.num_clients ="
            f" {settings.data.num_clients}"
        )
    for name, value, allowed in (
        ("method", settings.method, "mosaic"),
        ("prototypes.space", settings.prototypes.space, "expert"),
        ("meta.gate", settings.meta.gate, "none"),
        ("init.clients_per_round", settings.init.clients_per_round, 0),
    ):
        if value != allowed:
            problems.append(
                f"{name} = {value!r}: must be {allowed!r} where clients have different"
                f" networks, model.others = {others}"
            )
    return problems
