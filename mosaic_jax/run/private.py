"""Studies that are private: what they refuse, their noise, and what clients hide."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mosaic_jax.core import errors, prng, provenance
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.sources import Info
from mosaic_jax.fl import accounting, privacy
from mosaic_jax.fl.accounting import Plan
from mosaic_jax.fl.algorithms.base import Algorithm
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run.settings import Settings
from mosaic_jax.stages.base import Link


def check(settings: Settings, algorithm: Algorithm, chain: Sequence[Link]) -> None:
    """Check that all that clients of a private study tell is accounted for.

    Args:
      settings: of the study, with epsilon > 0.
      algorithm: of its rounds.
      chain: its stages.

    Raises:
      ConfigError: something is not; one line for each.
    """
    told = f"for privacy.epsilon = {settings.privacy.epsilon}"
    says_so = "per_image" in vars(type(algorithm)) and algorithm.per_image
    if settings.privacy.of_images and not says_so:
        raise errors.ConfigError(
            f"init.method = {settings.init.method!r}: must be one that says `per_image`"
            f" {told}, as its clients tell of images by more than gradients"
        )
    _check_stages(settings, chain, told)


def _check_stages(settings: Settings, chain: Sequence[Link], told: str) -> None:
    """Check that every stage says what it tells.

    Raises:
      ConfigError: some do not; one line for each.
    """
    found = []
    for stage in {link.stage.name: link.stage for link in chain}.values():
        own = {"releases", "tells_nothing"} & set(vars(type(stage)))
        tells = stage.releases(settings, np.ones(1, int))
        is_users = provenance.is_users(type(stage))
        if tells is None or (is_users and not own):
            found.append(
                f"stage {stage.name!r}: must say by `releases` or `tells_nothing` what"
                f" it tells of images {told}"
            )
        elif settings.privacy.of_clients and tells and is_users:
            found.append(
                f"stage {stage.name!r}: must tell nothing of images for privacy.unit ="
                " 'client', where models of rounds alone are hidden"
            )
    if found:
        raise errors.ConfigError("\n".join(found))


def check_statistics(
    settings: Settings, info: Info, classifiers: Mapping[str, Classifier]
) -> None:
    """Check that no network keeps statistics of the images.

    Args:
      settings: of the study, with epsilon > 0.
      info: properties of the images.
      classifiers: by name of the network.

    Raises:
      ConfigError: one does.
    """
    for name, classifier in classifiers.items():
        init = functools.partial(classifier.init, image_shape=info.image_shape)
        if jax.tree.leaves(jax.eval_shape(init, prng.root(0)).batch_stats):
            raise errors.ConfigError(
                f"model.norm = {settings.model.norm!r}: must be 'group' or 'layer' for"
                f" privacy.epsilon = {settings.privacy.epsilon}: the network {name!r}"
                " keeps statistics of the images"
            )


def plan(settings: Settings, data: StudyData, chain: Sequence[Link]) -> Plan:
    """The noise of a private study.

    Args:
      settings: of the study, with epsilon > 0.
      data: of the study.
      chain: its stages.

    Raises:
      ConfigError: there is none that is enough, or `dp-accounting` is not installed.
    """
    sizes = np.asarray(data.clients.client.size)
    if settings.privacy.of_clients:
        return accounting.plan_of_clients(
            settings.privacy,
            num_clients=len(sizes),
            participants=settings.clients_in_round,
            rounds=settings.total_rounds,
        )
    names, numbers = settings.networks, np.arange(len(sizes))
    releases = []
    for link in chain:
        members = numbers
        if link.network:
            members = numbers[names.index(link.network) :: len(names)]
        found = link.stage.releases(settings, sizes) or ()
        releases += [one.of(members) for one in found]
    return accounting.plan(settings.privacy, sizes, releases)


def hidden(data: StudyData, plan: Plan, seed: int) -> StudyData:
    """`data` whose clients know their noise, and tell noisy label counts or none.

    Args:
      data: of a private study.
      plan: its noise.
      seed: of the study.
    """
    client = data.clients.client
    # Rounded up.
    noise = np.nextafter(np.array(plan.noise, np.float32), np.float32(np.inf))
    count = np.zeros_like(client.label_count)
    if privacy.LABEL_COUNTS in plan.by_payload:
        np_rng = np.random.default_rng([seed, *privacy.LABEL_COUNTS.encode()])
        drawn = np_rng.standard_normal(count.shape) * noise[:, None]
        told = np.maximum(np.rint(data.label_count + drawn), 0)
        # A client of which nothing is left counts for all classes alike.
        count = np.where(told.any(1, keepdims=True), told, 1).astype(count.dtype)
    client = client.replace(label_count=count, noise=noise)
    return dataclasses.replace(data, clients=data.clients.replace(client=client))
