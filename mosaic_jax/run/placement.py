"""A study's arrays on the devices, and the contexts in which its stages run."""

import dataclasses
import functools

import numpy as np

from mosaic_jax.core import prng
from mosaic_jax.core.types import FederatedDataset, Tree
from mosaic_jax.fl import parallel
from mosaic_jax.run import memory
from mosaic_jax.run.study import Study
from mosaic_jax.stages.base import Context, Link


class Placement:
    """Puts a study's data on the devices, as settings and free memory allow."""

    def __init__(self, study: Study) -> None:
        """No array is moved before a stage needs it."""
        self._study = study

    @functools.cached_property
    def axis(self) -> parallel.ClientAxis:
        """The layout of the clients on the devices."""
        return parallel.build(
            np.asarray(self._study.data.clients.client.size),
            at_once=memory.clients_at_once(self._study),
            num_devices=self._study.settings.compute.devices,
        )

    def context(self, link: Link) -> Context:
        """The context in which the stage of `link` runs."""
        blueprint = self._study.blueprint(link)
        shown = {
            field.name: getattr(blueprint, field.name)
            for field in dataclasses.fields(blueprint)
        }
        return Context(
            **shown,
            **self._arrays,
            axis=self.axis,
            state_on_host=self._state_on_host,
            key=prng.named(prng.root(self._study.settings.seed), link.name),
        )

    @functools.cached_property
    def _arrays(self) -> dict[str, Tree]:
        """The data on the devices, as a `Context` names them."""
        study = self._study
        if self._images_on_host:
            client = self.axis.replicate(study.data.clients.client)
            clients = FederatedDataset((), client)
        else:
            anywhere = memory.runs_anywhere(study)
            clients = self.axis.place(study.data.clients, whole=anywhere)
        held_out = self.axis.replicate(study.data.held_out)
        return {"clients": clients, "held_out": held_out}

    @functools.cached_property
    def _images_on_host(self) -> bool:
        return memory.images_on_host(self._study)

    @functools.cached_property
    def _state_on_host(self) -> bool:
        # Images are put on the devices by the rounds that do so with states.
        return self._images_on_host or memory.state_on_host(self._study)
