"""A study as objects: the data, networks and algorithms that its settings name."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from clu import parameter_overview

from mosaic_jax import server, stages
from mosaic_jax.core import errors, provenance, registry, schema, trees
from mosaic_jax.core.types import Tree
from mosaic_jax.data import canaries, federated
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.sources import Info
from mosaic_jax.fl import algorithms, attacks, optimizers
from mosaic_jax.fl.accounting import Plan
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.fl.sending import Sending
from mosaic_jax.nn import losses, networks
from mosaic_jax.nn.adapted import Adapted
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run import callbacks, checks, images, private, start
from mosaic_jax.run import settings as composed
from mosaic_jax.run.callbacks import Callback
from mosaic_jax.run.settings import Settings
from mosaic_jax.server.base import ServerTraining, Task
from mosaic_jax.stages import federation as rounds
from mosaic_jax.stages.base import Blueprint, Link

# Raised whenever the same settings give another result; part of every fingerprint.
FORMAT = 10
# Parts of `Sending`, and the settings that name them.
SENDING = {
    "rule": "aggregation.rule",
    "attack": "attack.name",
    "compressor": "compression.name",
}
# A stage and its fingerprint.
Planned = tuple[Link, str]


@dataclasses.dataclass(frozen=True)
class Study:
    """A study before it runs, in host memory.

    Attributes:
      settings: of the study.
      data: images and their split.
      networks: classifiers by name; the server's is the first.
      algorithm: of the federated rounds.
      server: training on the server; None: there is none.
      chain: the stages in their order.
      sending: what becomes of uploads in rounds.
      callbacks: a user's code that is called while it runs.
      privacy: the noise of a private study; None: it is not private.
      start: arrays by path in place of random ones of the server's network.
    """

    settings: Settings
    data: StudyData
    networks: dict[str, Classifier]
    algorithm: Algorithm
    server: ServerTraining | None
    chain: tuple[Link, ...]
    sending: Sending = Sending()
    callbacks: tuple[Callback, ...] = ()
    privacy: Plan | None = None
    start: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def classifier(self) -> Classifier:
        """The server's network."""
        return self.networks[self.settings.model.name]

    @functools.cached_property
    def task(self) -> Task:
        """The properties of the study that training on the server depends on."""
        info = self.data.info
        return Task(
            classifier=self.classifier,
            image_shape=info.image_shape,
            num_classes=info.num_classes,
            augmentation=info.augmentation,
            lowering=self.settings.compute.convolution,
            batch_norm=self.settings.server.batch_norm,
            num_clients=self.data.clients.num_clients,
        )

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of parameters of the server's network."""
        params = self.blueprint(self.chain[0]).model.params
        return int(parameter_overview.count_parameters(params))

    def blueprint(self, link: Link) -> Blueprint:
        """The study restricted to what the stage of `link` declares that it reads."""
        reads = link.reads(self.settings)
        return Blueprint(
            settings=composed.view(self.settings, reads),
            data=self.data,
            networks=self.networks,
            name=self.settings.model.name,
            algorithm=_shown(self.algorithm, "init.method", reads),
            server=_shown(self.server, "server.method", reads),
            task=_shown(self.task, "server.method", reads),
            provides=link.stage.provides(self.settings),
            trains_every_round=self.settings.trains_every_round
            and schema.is_covered("server.method", reads),
            sending=dataclasses.replace(
                self.sending,
                **{
                    part: _shown(component, field, reads)
                    for part, field, component in self._of_sending()
                },
            ),
            privacy=self.privacy,
            start=self.start if link.stage.makes_model else {},
        )

    def _of_sending(self) -> Iterator[tuple[str, str, schema.Group]]:
        """Parts of `sending` in use: name, setting that names it, component."""
        for part, field in SENDING.items():
            component = getattr(self.sending, part)
            if component != getattr(Sending(), part):
                yield part, field, component

    def template(self, link: Link) -> dict[str, Tree]:
        """Shapes and types of each artifact that the stage of `link` provides.

        Raises:
          ConfigError: the stage tells none of one.
        """
        shapes = link.template(self.blueprint(link))
        provides = link.provides(self.settings)
        for name in provides:
            if name not in shapes:
                raise errors.ConfigError(
                    f"stage {link.name!r}: template has {list(shapes)}: must have"
                    f" {name!r}, which the stage provides"
                )
        return {name: shapes[name] for name in provides}

    @functools.cached_property
    def flops(self) -> dict[str, float]:
        """FLOPs of every stage by name; 0: not known."""
        return {link.name: link.flops(self.blueprint(link)) for link in self.chain}

    def plan(self) -> list[Planned]:
        """The stages with their fingerprints.

        A fingerprint is a digest of all that the stage can see: the settings that it
        declares, the code of the components that these name, the data, and the
        fingerprints of the stages whose artifacts it needs.

        Raises:
          ConfigError: a stage needs an artifact that no stage before it provides.
        """
        producer: dict[str, str] = {}
        result = []
        for link in self.chain:
            needs = link.needs(self.settings)
            missing = [name for name in needs if name not in producer]
            if missing:
                raise errors.ConfigError(
                    f"stage {link.name!r} needs {missing[0]!r}: must be provided by a"
                    f" stage before it, which provide {', '.join(producer)}"
                )
            visible = {
                "format": FORMAT,
                "stage": link.name,
                "settings": self.blueprint(link).settings.content(),
                "components": self._components(link),
                "data": self.data.content_sha256,
                "needs": {name: producer[name] for name in needs},
            }
            if self.privacy is not None:
                # The noise of each stage depends on what all of them tell.
                visible["privacy"] = dataclasses.asdict(self.privacy)
            if self.start and link.stage.makes_model and not link.suffix:
                visible["start"] = trees.digest(dict(self.start))
            if ends := callbacks.in_fingerprint(self.callbacks, link.name):
                visible["callbacks"] = ends
            fingerprint = schema.digest(visible)[:16]
            provides = link.provides(self.settings)
            producer |= {name: fingerprint for name in provides}
            result.append((link, fingerprint))
        return result

    def _components(self, link: Link) -> dict[str, Any]:
        """Fields and code of the components that a stage may use, for a fingerprint."""
        reads = link.reads(self.settings)
        result: dict[str, Any] = {
            name: _code(network.module) for name, network in self.networks.items()
        }
        if schema.is_covered("init.method", reads):
            result["algorithm"] = provenance.of_component(self.algorithm)
        if schema.is_covered("server.method", reads) and self.server is not None:
            result["server"] = provenance.of_component(self.server)
        for part, field, component in self._of_sending():
            if schema.is_covered(field, reads):
                result[part] = provenance.of_component(component)
        divergence = self.settings.distill.divergence
        if ":" in divergence and schema.is_covered("distill.divergence", reads):
            loss = losses.DIVERGENCES.find(divergence)
            result["divergence"] = provenance.code_digest(loss)
        optimizer = self.settings.local.optimizer
        if ":" in optimizer and schema.is_covered("local.optimizer", reads):
            # Optax's own change with its version, a user's with their code.
            result["optimizer"] = (
                optax.__version__
                if optimizer.startswith("optax:")
                else provenance.code_digest(optimizers.OPTIMIZERS.find(optimizer))
            )
        if provenance.is_users(type(link.stage)):
            result["stage"] = provenance.of_component(link.stage)
        return result

    def identity(self, link: Link, fingerprint: str) -> dict[str, Any]:
        """What the files of a stage belong to; it is saved with them and checked."""
        return {
            "study": self.data.content_sha256[:16],
            "stage": link.name,
            "fingerprint": fingerprint,
            "seed": self.settings.seed,
            # What the models are of: the fingerprint has it too, with all the rest.
            "network": code_of(self.classifier),
        }


def build(
    settings: Settings,
    data: StudyData | None = None,
    called: Sequence[Callback] = (),
) -> Study:
    """The study that the settings describe.

    Args:
      settings: of the study.
      data: images and split, in place of those that the settings name.
      called: a user's callbacks.

    Raises:
      ConfigError: a name is not known, or parts of the study contradict each other.
      DataError: the data are missing or cannot be split.
    """
    checks.names(settings)
    algorithm = registry.build(
        algorithms.ALGORITHMS, settings.init.method, settings.methods
    )
    name, method = settings.server.method, None
    if name != "none":
        method = registry.build(server.METHODS, name, settings.methods)
    chain, sending = stages.chain(settings), _sending(settings)
    parts = [sending.rule, sending.attack, sending.compressor]
    parts += [algorithm, method, *(link.stage for link in chain)]
    checks.problems(settings, parts)
    if method and method.teaches_clients and isinstance(algorithm, PartialTraining):
        raise errors.ConfigError(
            f"init.method = {settings.init.method!r}: must train whole networks for"
            f" server.method = {name!r}, which teaches their heads"
        )
    if settings.privacy.epsilon:
        private.check(settings, algorithm, chain)
    images.check(settings, chain, sending)
    checks.attackers(sending)
    data = data or federated.load(settings.data, settings.seed)
    data = _planted(_attacked(data, settings), settings)
    classifiers = build_networks(settings, data.info)
    if settings.method == "mosaic":
        checks.mosaic(settings, data.info, classifiers)
    if settings.privacy.epsilon:
        private.check_statistics(settings, data.info, classifiers)
    if sending.attack or sending.compressor or settings.privacy.of_clients:
        checks.reference(settings, algorithm, classifiers[settings.model.name], data)
    if sending.rule.needs_each or sending.compressor:
        checks.own_sending(
            settings, sending, algorithm, classifiers[settings.model.name], data
        )
    plan = None
    if settings.privacy.epsilon:
        plan = private.plan(settings, data, chain)
        sending = dataclasses.replace(sending, private=plan.of_clients)
        if plan.of_clients is None:
            data = private.hidden(data, plan, settings.seed)
    study = Study(
        settings=settings,
        data=data,
        privacy=plan,
        start=start.load(settings.model, classifiers[settings.model.name], data.info),
        networks=classifiers,
        algorithm=algorithm,
        server=method,
        chain=chain,
        sending=sending,
        callbacks=callbacks.check(
            called,
            [link.name for link in chain],
            parts=isinstance(algorithm, PartialTraining),
            held_out=data.held_out,
        ),
    )
    if not data.info.is_usual:
        # Counted on abstract networks, where generators refuse what they cannot draw.
        study.flops  # noqa: B018
    return study


def _sending(settings: Settings) -> Sending:
    """The rule, the attack and the compression that the settings name.

    Raises:
      ConfigError: one is unknown, or has a wrong field.
    """
    count = settings.data.num_clients
    attack = settings.attack.build(settings.methods)
    return Sending(
        rule=settings.aggregation.build(settings.methods),
        withstands=settings.aggregation.withstands(settings),
        attack=attack if attack and attack.changes_updates else None,
        num_attackers=settings.attack.number(count),
        num_clients=count,
        clients_in_round=settings.clients_in_round,
        compressor=settings.compression.build(settings.methods),
    )


def _attacked(data: StudyData, settings: Settings) -> StudyData:
    """The data as they are where some clients attack."""
    attack = settings.attack.build(settings.methods)
    if attack is None:
        return data
    key, count = rounds.rounds_key(settings), data.clients.num_clients
    drawn = attacks.drawn(key, count, settings.attack.number(count))
    return federated.attacked(data, np.asarray(drawn), attack.labels)


def _planted(data: StudyData, settings: Settings) -> StudyData:
    """The data as they are where canaries are planted."""
    if not settings.leakage.canaries:
        return data
    drawn = canaries.draw(
        settings.leakage.canaries,
        data.clients.num_clients,
        data.info.image_shape,
        data.info.num_classes,
        settings.seed,
    )
    return federated.planted(data, drawn)


def build_networks(settings: Settings, info: Info) -> dict[str, Classifier]:
    """The classifiers of a study by name; the server's is the first.

    Args:
      settings: of the study.
      info: properties of its images.

    Raises:
      ConfigError: a network is unknown, or a user's own does not work on the images.
    """
    model, lowering = settings.model, settings.compute.convolution
    return {
        name: build_network(name, model, lowering, info) for name in settings.networks
    }


def build_network(
    name: str, model: networks.Model, lowering: str, info: Info
) -> Classifier:
    """One of the classifiers of a study.

    Args:
      name: of the network.
      model: settings of its shape.
      lowering: `compute.convolution`.
      info: properties of the images.

    Raises:
      ConfigError: the network is unknown, or a user's own does not work on the images.
    """
    module = networks.build_classifier(
        name,
        info.num_classes,
        info.image_shape,
        width=model.width,
        dtype=model.dtype,
        lowering=lowering,
        norm=model.norm,
        rate=model.rate,
    )
    classifier = Classifier(module, info.mean, info.std)
    if ":" in name or not info.is_usual:
        checks.network(name, classifier, info)
    return classifier


def code_of(network: Classifier) -> str:
    """Hex sha256 of a network's code, and of the fields of a user's own module."""
    return schema.digest(_code(network.module))


def _code(module: networks.Module) -> Any:
    """Of a network, for a fingerprint."""
    if isinstance(module, Adapted):
        adapter = provenance.code_digest(type(module))
        return [adapter, provenance.description(module.of_user)]
    return provenance.code_digest(type(module))


def _shown(component: Any, field: str, reads: tuple[str, ...]) -> Any:
    """The component that `field` names, if the stage `reads` that field."""
    if schema.is_covered(field, reads):
        return component
    return provenance.Undeclared(field)
