"""The settings of a study, composed of the groups of fields that its parts declare.

Each package declares the fields that it reads, with defaults, ranges and meanings.
`from_mapping` is the only border between a configuration file and the library. It
reports all problems at once, each with the field, its value and what is allowed.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mosaic_jax.core import errors, schema
from mosaic_jax.core.registry import Registry, group_of
from mosaic_jax.data.settings import Data
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.attacks import ATTACKS, Attackers
from mosaic_jax.fl.budgets import Budgets
from mosaic_jax.fl.compression import COMPRESSORS, Compression
from mosaic_jax.fl.privacy import Privacy
from mosaic_jax.fl.robust import RULES, Aggregation
from mosaic_jax.fl.training import Local
from mosaic_jax.nn import conv
from mosaic_jax.nn.networks import Model, with_dtype
from mosaic_jax.run.trackers import TRACKERS
from mosaic_jax.server import METHODS
from mosaic_jax.stages.audit import Audit
from mosaic_jax.stages.compat import Compat
from mosaic_jax.stages.distill import Distill
from mosaic_jax.stages.experts import Experts
from mosaic_jax.stages.finetune import Finetune
from mosaic_jax.stages.generators import Generators
from mosaic_jax.stages.init import Init
from mosaic_jax.stages.leakage import Leakage
from mosaic_jax.stages.meta import Meta
from mosaic_jax.stages.prototype_rounds import PrototypeRounds, stages_of
from mosaic_jax.stages.prototypes import Prototypes
from mosaic_jax.stages.refine import Refine
from mosaic_jax.stages.server import Server
from mosaic_jax.stages.warmup import Warmup

MAX_SEED = schema.MAX_INT
MAX_SEEDS = 1000
# Settings, or groups of them, that cannot change a result, each with the reason. Every
# stage may read them; they are in no fingerprint.
NEUTRAL: Mapping[str, str] = {
    "seeds": "says how many studies there are; each seed is a study of its own",
    "compare": "says which studies are run; each method is a study of its own",
    "profile": "records how long operations take",
    "data.dir": "says where images lie; the images themselves count",
    "data.in_memory": "says where images lie; the images themselves count",
    "model.start": "says where arrays lie; the arrays themselves count",
    "evaluation": "says how and how often models are measured; training is the same",
    "compute": "lays the work out; results differ by rounding only",
    "log": "says what is shown, and how often a run is saved",
}
# Settings that every stage reads: they set its random stream and its networks.
ALWAYS = ("seed", "model")
# Components whose fields are in the group `methods`.
COMPONENTS: tuple[Registry[Any], ...] = (
    ALGORITHMS,
    METHODS,
    RULES,
    ATTACKS,
    COMPRESSORS,
)


@dataclasses.dataclass(frozen=True)
class Evaluation(schema.Group):
    """How and how often models are measured; changes no result."""

    batch_size: int = schema.at_least(1, default=256, meaning="images in a step")
    every: int = schema.at_least(
        1, default=10, meaning="rounds between evaluations of the global model"
    )


@dataclasses.dataclass(frozen=True)
class Compute(schema.Group):
    """How the work is laid out; changes results by rounding only."""

    devices: int = schema.at_least(
        0,
        default=0,
        meaning="devices that clients are dealt to; 0: all there are, of a CPU one, and"
        " more are made of its cores",
    )
    clients_at_once: int = schema.at_least(
        0, default=0, meaning="clients batched on a device; 0: as memory allows"
    )
    seeds_at_once: int = schema.at_least(
        0, default=0, meaning="seeds in one program; 0: as memory allows, one on CPUs"
    )
    client_state: str = schema.one_of(
        ("auto", "device", "host"),
        default="auto",
        meaning="where clients' states and models lie between rounds",
    )
    images: str = schema.one_of(
        ("auto", "device", "host"),
        default="auto",
        meaning="where training images lie; host: devices have those of the clients"
        " whose turn it is, auto: host where memory is short",
    )
    convolution: str = schema.one_of(
        conv.LOWERINGS, default="auto", meaning="see docs/performance.md"
    )
    join_seconds: int = schema.at_least(
        1,
        default=300,
        meaning="that processes of one study wait for each other to come",
    )
    silent_seconds: float = schema.at_least(
        2,
        default=20.0,
        meaning="without a sign of life after which a process counts as lost, and the"
        " others end",
    )


def _are_trackers(names: tuple) -> bool:
    known = all(
        isinstance(name, str) and (name in TRACKERS or ":" in name) for name in names
    )
    return known and len(set(names)) == len(names)


@dataclasses.dataclass(frozen=True)
class Log(schema.Group):
    """Checkpoints, progress and trackers; changes no result."""

    every_steps: int = schema.at_least(1, default=50, meaning="steps between log lines")
    checkpoint_seconds: float = schema.at_least(
        0, default=60.0, meaning="least time between checkpoints within a stage"
    )
    grace_seconds: float = schema.above(
        0,
        default=10.0,
        meaning="after a signal to stop, in which the state is saved: about so long, or"
        " one step",
    )
    trackers: tuple = schema.field(
        ("tensorboard",),
        f"different ones of {', '.join(TRACKERS)} or 'package.module:Class'",
        _are_trackers,
        "programs that are sent what is measured",
    )


@dataclasses.dataclass(frozen=True)
class Settings(schema.Group):
    """Everything that a study depends on."""

    method: str = schema.one_of(
        ("mosaic", "federated"),
        default="mosaic",
        meaning="federated: rounds of init.method, trained on by server.method",
    )
    seed: int = schema.between(
        0, MAX_SEED, default=0, meaning="random seed of everything, the split included"
    )
    seeds: int = schema.between(
        1, MAX_SEEDS, default=1, meaning="studies with seeds seed, seed + 1, ..."
    )
    compare: str = schema.anything(
        default="",
        meaning="methods by comma, all, heterogeneous: each on equal terms",
    )
    profile: str = schema.anything(
        default="",
        meaning="name of a stage, to trace some of its steps for Perfetto",
    )
    stages: tuple = schema.field(
        (),
        "different ones of 'package.module:Class'",
        lambda value: (
            all(isinstance(path, str) and ":" in path for path in value)
            and len(set(value)) == len(value)
        ),
        "your own stages, each run after the one that it names",
    )
    methods: dict = dataclasses.field(
        default_factory=dict,
        metadata={"meaning": "fields of components, by the component's name"},
    )
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    local: Local = dataclasses.field(default_factory=Local)
    privacy: Privacy = dataclasses.field(default_factory=Privacy)
    init: Init = dataclasses.field(default_factory=Init)
    budgets: Budgets = dataclasses.field(default_factory=Budgets)
    aggregation: Aggregation = dataclasses.field(default_factory=Aggregation)
    attack: Attackers = dataclasses.field(default_factory=Attackers)
    compression: Compression = dataclasses.field(default_factory=Compression)
    server: Server = dataclasses.field(default_factory=Server)
    generators: Generators = dataclasses.field(default_factory=Generators)
    warmup: Warmup = dataclasses.field(default_factory=Warmup)
    experts: Experts = dataclasses.field(default_factory=Experts)
    prototypes: Prototypes = dataclasses.field(default_factory=Prototypes)
    meta: Meta = dataclasses.field(default_factory=Meta)
    refine: Refine = dataclasses.field(default_factory=Refine)
    distill: Distill = dataclasses.field(default_factory=Distill)
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    audit: Audit = dataclasses.field(default_factory=Audit)
    leakage: Leakage = dataclasses.field(default_factory=Leakage)
    compat: Compat = dataclasses.field(default_factory=Compat)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    compute: Compute = dataclasses.field(default_factory=Compute)
    log: Log = dataclasses.field(default_factory=Log)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the clients' networks, dealt in turn; the first is the server's."""
        return (self.model.name, *self.model.others)

    @property
    def trains_once(self) -> bool:
        """Whether the server trains on the clients' models once, after the rounds."""
        return self.server.method != "none" and self.server.when == "once"

    @property
    def trains_every_round(self) -> bool:
        """Whether the server trains after every aggregation."""
        return self.server.method != "none" and self.server.when == "every_round"

    @property
    def exchanges_prototypes(self) -> bool:
        """Whether clients send class prototypes and no models."""
        return ALGORITHMS.find(self.init.method).exchanges == "prototypes"

    @property
    def sends_whole_uploads(self) -> bool:
        """Whether clients do local SGD on the whole network and send its upload."""
        algorithm = ALGORITHMS.find(self.init.method)
        whole = algorithm.holdings is Algorithm.holdings
        return whole and not self.exchanges_prototypes

    @property
    def clients_in_round(self) -> int:
        """The least number of participants in a round of a federation.

        The clients of each network are a federation of their own.
        """
        each = self.data.num_clients // len(self.networks)
        return self.init.clients_per_round or each

    @property
    def prototype_rounds(self) -> list[PrototypeRounds]:
        """The stages of a study in which they do."""
        return stages_of(self)

    @property
    def total_rounds(self) -> int:
        """Number of federated rounds of all stages."""
        return self.init.rounds + self.warmup.rounds + self.finetune.rounds

    def problems(self, study: Any) -> Iterator[str]:
        """Contradictions among the fields that are in no group."""
        del study
        if self.seed + self.seeds > MAX_SEED + 1:
            yield (
                f"seeds = {self.seeds}: must be <= {MAX_SEED + 1 - self.seed} for"
                f" seed = {self.seed}"
            )
        if (
            self.method != "mosaic"
            and self.model.others
            and not self.exchanges_prototypes
        ):
            yield (
                f"method = {self.method!r}: must be 'mosaic' where clients have"
                f" different networks, model.others = {self.model.others}, and"
                f" init.method = {self.init.method!r} averages models"
            )


def from_mapping(mapping: Mapping[str, Any]) -> Settings:
    """Settings from a nested mapping; fields that it leaves out have their defaults.

    Raises:
      ConfigError: the settings have problems; one line for each, such as
        "distill.temperature = -1.0: must be > 0".
    """
    study = schema.check(Settings, mapping)
    fields = dataclasses.fields(study)
    groups = [study, *(getattr(study, field.name) for field in fields)]
    problems = [
        line
        for group in groups
        if isinstance(group, schema.Group)
        for line in group.problems(study)
    ]
    if problems:
        raise errors.ConfigError("\n".join(problems))
    # From here on the type is known, so that no result of another one is ever reused.
    return dataclasses.replace(study, model=with_dtype(study.model))


def defaults() -> dict[str, Any]:
    """Default value of every field, nested; components' fields are in "methods"."""
    methods = {
        group: schema.defaults(component) for group, component in components().items()
    }
    return schema.defaults(Settings) | {"methods": methods}


def components() -> dict[str, type]:
    """The library's components that have fields, by their group in `methods`."""
    return {
        group_of(name, component): component
        for registry in COMPONENTS
        for name, component in registry.items()
        if schema.settings_of(component)
    }


def view(study: Settings, reads: Collection[str]) -> schema.View:
    """The settings restricted to what a stage may read.

    Args:
      study: the settings.
      reads: dotted names of the fields and groups that the stage declares.

    Raises:
      UndeclaredError: a name is neither a field nor a group.
    """
    declared = {*ALWAYS, *reads}
    known = {name for name, _ in schema.leaves(study)}
    for name in sorted(declared):
        if not any(schema.is_covered(field, {name}) for field in known):
            raise schema.UndeclaredError(f"{name}: no such setting")
    return schema.View(study, declared, neutral=NEUTRAL)
