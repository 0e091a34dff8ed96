"""What is checked of a study before any work: its names, and parts that must fit."""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from mosaic_jax import server, stages
from mosaic_jax.core import errors, prng, registry, schema, trees
from mosaic_jax.core.types import Tree
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.sources import Info
from mosaic_jax.fl import algorithms, attacks, compression, optimizers, robust, uploads
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.fl.sending import Sending
from mosaic_jax.nn import losses, networks
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run import settings as composed
from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)


def components(settings: Settings) -> dict[str, type]:
    """The library's components and the study's own ones, by their group in `methods`.

    Raises:
      ConfigError: one cannot be imported, is of another kind, or shares its group.
    """
    known = composed.components()
    named = [
        (algorithms.ALGORITHMS, settings.init.method),
        (server.METHODS, settings.server.method),
        (robust.RULES, settings.aggregation.rule),
        (attacks.ATTACKS, settings.attack.name),
        (compression.COMPRESSORS, settings.compression.name),
        *((stages.STAGES, path) for path in settings.stages),
    ]
    for kinds, path in named:
        if ":" in path:
            registry.add(known, path, kinds.find(path))
    return known


def names(settings: Settings) -> None:
    """Check what the settings name, and the fields of components that have no use here.

    Raises:
      ConfigError: a name is unknown or of the wrong kind, a field is wrong, or a group
        of fields belongs to no component.
    """
    for name in settings.networks:
        networks.NETWORKS.find(name)
    if settings.method == "mosaic":
        losses.DIVERGENCES.find(settings.distill.divergence)
    optimizers.OPTIMIZERS.find(settings.local.optimizer)
    known = components(settings)
    for group, fields in settings.methods.items():
        if group not in known:
            hint = schema.near(str(group), list(known))
            raise errors.ConfigError(f"methods.{group}: unknown method, {hint}")
        schema.check(known[group], fields, f"methods.{group}")


def problems(settings: Settings, parts: Iterable[schema.Group | None]) -> None:
    """Ask every part of a study what it cannot be combined with.

    Raises:
      ConfigError: something; one line for each.
    """
    found = [line for part in parts if part for line in part.problems(settings)]
    if found:
        # A stage is asked once for each network.
        raise errors.ConfigError("\n".join(dict.fromkeys(found)))


def network(name: str, classifier: Classifier, info: Info) -> None:
    """Check by shapes alone that a user's network works on the images.

    Args:
      name: of the network.
      classifier: that has the network.
      info: properties of the images.

    Raises:
      ConfigError: a method raises something, or returns other shapes.
    """
    try:
        features, logits = classifier.outputs(info.image_shape)
        shapes = [one.shape for one in (*features, *logits)]
        fits = all(len(one.shape) == 2 for one in features)
        fits &= all(one.shape == (2, info.num_classes) for one in logits)
        why = f"not {', '.join(map(str, shapes))}"
    except Exception as error:  # whatever the user's network raises
        fits, why = False, f"{type(error).__name__}: {errors.reason(error)}"
    if not fits:
        raise errors.ConfigError(
            f"model.name = {name!r}: features and logits of 2 images"
            f" {info.image_shape} must be of shapes (2, F) and"
            f" (2, {info.num_classes}): {why}"
        )


def attackers(sending: Sending) -> None:
    """Warn where more clients attack than the rule withstands, which may be meant."""
    if sending.outnumbered:
        _log.warning("attack.share, aggregation.attackers: %s", sending.outnumbered)


def reference(
    settings: Settings, algorithm: Algorithm, classifier: Classifier, data: StudyData
) -> None:
    """Check by shapes alone what those who change uploads need of an algorithm.

    Args:
      settings: of the study.
      algorithm: whose clients do local SGD on the whole network.
      classifier: of the clients.
      data: of the study.

    Raises:
      ConfigError: its `reference` is not like what clients send, `sent_model` makes no
        model of that, or private clients would send what is not hidden.
    """
    shape = data.info.image_shape
    model = jax.eval_shape(lambda: classifier.init(prng.root(0), shape))
    upload = _upload(settings, algorithm, classifier, data)
    reference = jax.eval_shape(algorithm.reference, model)
    if not _alike(reference, upload) or not _alike(
        jax.eval_shape(algorithm.sent_model, upload, model), model
    ):
        raise errors.ConfigError(
            f"init.method = {settings.init.method!r}: must override reference and"
            " sent_model, as its uploads are no models, for attack.name ="
            f" {settings.attack.name!r}, compression.name ="
            f" {settings.compression.name!r} and privacy.unit ="
            f" {settings.privacy.unit!r}"
        )
    hidden = len(uploads.parameters(upload)) == len(jax.tree.leaves(upload))
    if settings.privacy.of_clients and not hidden:
        raise errors.ConfigError(
            f"init.method = {settings.init.method!r}: must be another for privacy.unit"
            " = 'client', as its clients send more than parameters"
        )


def own_sending(
    settings: Settings,
    sending: Sending,
    algorithm: Algorithm,
    classifier: Classifier,
    data: StudyData,
) -> None:
    """Check by shapes alone what a user's own rule and compressor return.

    Args:
      settings: of the study.
      sending: its rule and compressor.
      algorithm: whose clients do local SGD on the whole network.
      classifier: of the clients.
      data: of the study.

    Raises:
      ConfigError: they raise something, or return other shapes than uploads have.
    """
    rule, name = settings.aggregation.rule, settings.compression.name
    if ":" not in rule + name:  # the library's own
        return
    upload = _upload(settings, algorithm, classifier, data)
    if ":" in rule:
        count = settings.clients_in_round
        each = jax.tree.map(lambda x: trees.shape((count, *x.shape), x.dtype), upload)
        _returns(
            upload,
            f"aggregation.rule = {rule!r}: combine",
            lambda each, weight: sending.rule.combine(each, weight, sending.withstands),
            each,
            trees.shape((count,), np.float32),
        )
    compressor = sending.compressor
    if ":" in name and compressor is not None:
        _returns(
            upload,
            f"compression.name = {name!r}: decode",
            lambda upload, key: compression.decode(
                compressor, compression.encode(compressor, upload, key), upload
            ),
            upload,
            jax.eval_shape(prng.root, 0),
        )


def _returns(
    expected: Tree, what: str, function: Callable[..., Tree], *args: Tree
) -> None:
    """Check that a user's function returns arrays like `expected`, all by shapes."""
    try:
        found = jax.eval_shape(function, *args)
    except Exception as error:  # whatever the user's part raises
        raise errors.ConfigError(
            f"{what} fails on an upload's shapes: {type(error).__name__}:"
            f" {errors.reason(error)}"
        ) from error
    if not _alike(found, expected):
        raise errors.ConfigError(
            f"{what} must return arrays of the shapes and types of a single upload"
        )


def _upload(
    settings: Settings, algorithm: Algorithm, classifier: Classifier, data: StudyData
) -> Tree:
    """Shapes of what a client sends."""
    client = trees.take(data.clients.client, 0)
    program = algorithm.program(classifier, settings.local)
    return program.messages(data.info.image_shape, client)[0]


def _alike(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same structure, shapes and types."""
    kinds = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and operator.eq(*kinds)


def mosaic(
    settings: Settings, info: Info, classifiers: Mapping[str, Classifier]
) -> None:
    """Check what stages of Mosaic need of data and networks.

    Args:
      settings: of the study.
      info: properties of the images.
      classifiers: by name of the network.

    Raises:
      ConfigError: the gate keeps more experts than there are classes, or there are no
        moments to match by inversion.
    """
    if settings.meta.gate_experts > info.num_classes:
        raise errors.ConfigError(
            f"meta.gate_experts = {settings.meta.gate_experts}: must be <="
            f" {info.num_classes}, the classes of {settings.data.name}"
        )
    weight = settings.generators.inversion_weight
    for name, classifier in classifiers.items():
        if weight and not classifier.sows_moments(info.image_shape):
            raise errors.ConfigError(
                f"generators.inversion_weight = {weight}: must be 0 for the network"
                f" {name!r}, which has no batch-norm of mosaic_jax.nn.norm to match"
            )
