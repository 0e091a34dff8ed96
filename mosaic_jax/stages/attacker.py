"""Attacks on the payloads of the clients of one network, of which each tells scores."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, sharing, trees, types
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    Generators,
    LabelledImages,
    ModelState,
)
from mosaic_jax.data import augment
from mosaic_jax.fl import evaluation, gan, membership, parallel
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages import gradients, measures, shadows
from mosaic_jax.stages.base import Context
from mosaic_jax.stages.candidates import Candidates, Scores
from mosaic_jax.stages.shadows import Shade, Shadows

if TYPE_CHECKING:
    from mosaic_jax.stages.leakage import Leakage

# Added to distances: that of an image of which a generator draws every pixel is 0.
_LEAST = 1e-6
# Of a candidate whose class the client sent no prototype of: less than any other.
_FAR = -1e30


@dataclasses.dataclass(frozen=True)
class Attacker:
    """Attacks on the clients of one network.

    Attributes:
      config: of the stage.
      context: for these clients.
      images: of `candidates.every_image`.
      places: of the clients among all with the network, each with what is asked of it.
      length: of all images that go through a program, so that it is compiled once.
      suffix: of the network's names.
    """

    config: "Leakage"
    context: Context
    images: LabelledImages
    places: list[tuple[int, Candidates]]
    length: int
    suffix: str

    def shadows(self) -> Shadows:
        """Those of the clients, of which none is trained yet."""
        clients = [asked for _, asked in self.places]
        count = self.config.shadows
        return shadows.of_clients(
            self.context, self.images, clients, count, self.suffix
        )

    def start(self, model: ModelState) -> ModelState:
        """What shadows start from.

        Args:
          model: the global one, which is near to what clients started from, unless
            there was one round alone: then they started from the study's first model.
        """
        settings = self.context.settings
        only = settings.init.rounds + settings.warmup.rounds == 1
        return self._first_model() if only else model

    def on_models(self, sent: ClientModels, shades: Sequence[Shade]) -> list[Scores]:
        """By how sure a client's model is of an image, and how sure shadows are.

        Args:
          sent: the clients' models.
          shades: of each of these clients; empty: there are none.

        Returns:
          Scores of both attacks.
        """
        confidences = programs.jit(
            functools.partial(_confidences, self.context.classifier, self._batch_size)
        )

        def sure(models: ModelState, asked: Candidates) -> np.ndarray:
            found = confidences(models, *self._padded(asked))
            return np.asarray(found)[:, : len(asked.row)]

        first = [
            sure(trees.take(sent.model, slice(place, place + 1)), asked)[0]
            for place, asked in self.places
        ]
        clients = [asked for _, asked in self.places]
        scores = [
            Scores("models", "loss", *pair) for pair in zip(clients, first, strict=True)
        ]
        for asked, own, shade in zip(clients, first, shades, strict=False):
            others = sure(shade.model, asked)
            ratio = membership.likelihood_ratio(own, others, shade.inside)
            scores.append(Scores("models", "LiRA", asked, ratio))
        return scores

    def _first_model(self) -> ModelState:
        """Of the first round, as the stage init makes it."""
        context = self.context
        key = prng.named(prng.root(context.settings.seed), f"init{self.suffix}")
        init = programs.jit(context.classifier.init, static_argnums=1)
        return init(prng.named(key, "model"), context.data.info.image_shape)

    def on_generators(self, sent: Generators, shades: Sequence[Shade]) -> list[Scores]:
        """By how near an image is to the nearest of those that a generator draws.

        Args:
          sent: the clients' generators.
          shades: with generators, of each of these clients; empty: there are none.

        Returns:
          Scores by the distance, and by how likely shadows make it.
        """
        context, count = self.context, self.config.generated
        model_gan = gan.build(context.settings, context.data.info, context.classifier)

        @programs.jit
        def distances(generators: ModelState, key: jax.Array, image: Array) -> Array:
            z = jax.random.normal(key, (count, model_gan.latent_dim))
            asked = augment.to_signed(image).reshape(len(image), -1)

            def of(generator: ModelState) -> Array:
                drawn = model_gan.sample(generator, sharing.spread(z))
                drawn = augment.to_signed(augment.to_uint8(drawn))
                drawn = drawn.reshape(count, -1)
                return measures.nearest(asked, drawn, jnp.ones(count, bool))[0]

            return parallel.expert_map(of, generators)

        def far(generators: ModelState, asked: Candidates) -> np.ndarray:
            """[G, N], how far images are from what each generator draws."""
            key = prng.at(prng.named(context.key, "generated"), asked.client)
            found = distances(generators, key, self._padded(asked)[0])
            return np.asarray(found)[:, : len(asked.row)]

        def near(distance: np.ndarray) -> np.ndarray:
            return -np.log(distance + _LEAST)  # nearly normal

        scores = []
        for i, (place, asked) in enumerate(self.places):
            if not sent.alive[place]:
                continue
            own = far(trees.take(sent.model, slice(place, place + 1)), asked)[0]
            scores.append(Scores("generators", "nearest image", asked, -own))
            if shades:
                shade = shades[i]
                others = near(far(shade.model, asked))
                ratio = membership.likelihood_ratio(near(own), others, shade.inside)
                scores.append(Scores("generators", "LiRA", asked, ratio))
        return scores

    def on_prototypes(
        self,
        sent: types.Prototypes,
        experts: Mapping[str, ModelState],
        client_models: ClientModels,
        global_model: ModelState,
    ) -> list[Scores]:
        """By how near an image is to the client's nearest prototype of its class.

        Compared as logits of all experts: they are what the server makes of features,
        and those of a mean of features are the mean of its images'.

        Args:
          sent: the prototypes of all clients.
          experts: by network, leaves [K, ...].
          client_models: of these clients.
          global_model: of their network.
        """
        context = self.context
        space = context.settings.prototypes.space

        @programs.jit
        def distance(
            experts: Mapping[str, ModelState],
            of_features: ModelState,
            image: Array,
            label: Array,
            prototype: Array,
            of: Array,
        ) -> tuple[Array, Array]:
            logits = []
            for name, models in experts.items():
                one = context.networks[name]
                seen: Callable[[ModelState, Array], Array] = one.logits
                if space != "expert":
                    seen = lambda m, x, one=one: one.head(  # noqa: E731
                        m, one.features(of_features, x)
                    )
                logits.append(
                    parallel.expert_map(
                        lambda model, seen=seen: evaluation.predict(
                            lambda x: seen(model, x), image, batch_size=self._batch_size
                        ),
                        models,
                    )
                )
            # [N, E K], as prototypes are.
            flat = jnp.moveaxis(jnp.concatenate(logits), 0, 1).reshape(len(image), -1)
            alike = label[:, None] == of[None]
            return measures.nearest(flat, prototype, alike)[0], jnp.any(alike, axis=1)

        client, label = np.asarray(sent.client), np.asarray(sent.label)
        logits = np.asarray(sent.logits).reshape(len(label), -1)
        most = max(1, int(np.bincount(client, minlength=1).max(initial=0)))
        scores = []
        for place, asked in self.places:
            own = np.flatnonzero(client == asked.client)
            if not len(own):
                continue
            rows = np.resize(own, most)
            model = global_model
            if space == "client":
                model = trees.take(client_models.model, place)
            far, held = distance(
                experts, model, *self._padded(asked), logits[rows], label[rows]
            )
            score = np.where(held, -np.asarray(far), _FAR)[: len(asked.row)]
            scores.append(Scores("prototypes", "nearest prototype", asked, score))
        return scores

    def on_gradients(self, model: ModelState) -> Run:
        """By images whose gradient is that which a client sends after one step.

        Args:
          model: global, that the step would be from.

        Returns:
          What was found of some clients.
        """
        clients = [asked for _, asked in self.places]
        found = yield from gradients.invert(
            self.config, self.context, self.images, clients, model, self.suffix
        )
        return found

    @property
    def _batch_size(self) -> int:
        return self.context.settings.evaluation.batch_size

    def _padded(self, asked: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of all candidates, and of some again."""
        row = np.resize(asked.row, self.length)
        return np.asarray(self.images.image)[row], np.asarray(self.images.label)[row]


def _confidences(
    classifier: Classifier,
    batch_size: int,
    models: ModelState,
    image: Array,
    label: Array,
) -> Array:
    """How sure models [S, ...] are of labels, [S, N]."""

    def of(model: ModelState) -> Array:
        logits = evaluation.predict(
            lambda x: classifier.logits(model, x), image, batch_size=batch_size
        )
        return membership.confidence(logits, label)

    return parallel.expert_map(of, models)
