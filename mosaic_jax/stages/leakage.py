"""Leakage: attacks on what clients send, by a server that would know their images.

It is no part of the method: whoever attacks here holds all images, also those that they
are asked of, and nothing that they find goes back into training. docs/privacy.md says
what each attacker sees.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import flops, prng, programs, schema, trees, types
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    Generators,
    LabelledImages,
    ModelState,
    Tree,
)
from mosaic_jax.data import augment
from mosaic_jax.fl import evaluation, gan, membership, parallel, workload
from mosaic_jax.fl.algorithms import ALGORITHMS
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.stages import (
    candidates,
    gradients,
    leakage_section,
    measures,
    shadows,
)
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, each_network
from mosaic_jax.stages.candidates import Candidates, Scores
from mosaic_jax.stages.gradients import Inverted

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings

_log = logging.getLogger(__name__)

# Of a candidate whose class the client sent no prototype of: less than any other.
_FAR = -1e30


@dataclasses.dataclass(frozen=True)
class Leakage(Stage):
    """Attacks what clients sent, after the study; it changes no result.

    Canaries are planted before it, and change all of them.
    """

    name = "leakage"
    tells_nothing = True  # to the server: it is no part of the study

    images: int = schema.at_least(
        0,
        default=0,
        meaning="most images of a client that attackers are asked of, beside as many"
        " others; 0: no attacks",
    )
    shadows: int = schema.field(
        8,
        "even and >= 0",
        lambda value: value >= 0 and value % 2 == 0,
        "models trained on random halves of these, for each client; 0: no LiRA",
    )
    generated: int = schema.at_least(
        1, default=256, meaning="images drawn from each generator, to be compared with"
    )
    canaries: int = schema.at_least(
        0,
        default=0,
        meaning="images planted for each client, each trained on or not by a coin, that"
        " bound epsilon from below; they cost accuracy",
    )
    inversion_steps: int = schema.at_least(
        0, default=0, meaning="of finding images by their gradient; 0: not done"
    )
    inversion_images: int = schema.between(
        1, 8, default=1, meaning="that a gradient is of"
    )
    inversion_rate: float = schema.above(
        0, default=0.1, meaning="Adam's first learning rate on pixels in [-1, 1]"
    )
    inversion_smooth: float = schema.at_least(
        0, default=1e-3, meaning="weight of the images' total variation"
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Attacks are on models that clients send whole, and where there are any."""
        if not self.images:
            if self.canaries:
                yield (
                    f"leakage.canaries = {self.canaries}: must be 0 for leakage.images"
                    " = 0, where nobody looks for them"
                )
            return
        algorithm = ALGORITHMS.find(study.init.method)
        if study.exchanges_prototypes or not algorithm.has_global_model:
            yield (
                f"leakage.images = {self.images}: must be 0 for init.method ="
                f" {study.init.method!r}, whose clients send no whole models"
            )
        elif self.shadows and not study.sends_whole_uploads:
            yield (
                f"leakage.shadows = {self.shadows}: must be 0 for init.method ="
                f" {study.init.method!r}, whose clients do no local SGD on the whole"
                " network"
            )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """What clients sent, and what the server had made of it by then."""
        kinds = ["global_model", "client_models"]
        if _has_generators(study):
            kinds.append("client_generators")
        shared: tuple[str, ...] = ()
        if _has_prototypes(study):
            kinds.append("experts")
            shared = ("prototypes",)
        return (*shared, *(n for kind in kinds for n in each_network(kind, study)))

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """How clients train, what their generators are, and whether they differ."""
        rounds = ("local", "init.rounds", "warmup.rounds")
        sent = ("generators", "compat") if _has_generators(study) else ()
        if _has_prototypes(study):
            sent += ("prototypes.space",)
        return (*rounds, *sent, "data.shift", "privacy.delta")

    def run(self, context: Context, **artifacts: Tree) -> Run:
        """Attack every client's models, generator and prototypes, then one gradient."""
        images = candidates.every_image(context)
        numbers = np.asarray(context.data.clients.client.number).tolist()
        asked = {
            number: candidates.of_client(context, images, number, self.images)
            for number in numbers
        }
        found: list[Scores] = []
        inverted: list[Inverted] = []
        for i, name in enumerate(context.networks):
            suffix = f"@{name}" if i else ""
            own = context.for_network(name)
            model, sent = (
                artifacts[kind + suffix] for kind in ("global_model", "client_models")
            )
            members = np.asarray(own.data.clients.client.number).tolist()
            took_part = np.asarray(sent.last_round) >= 0
            places = [
                (place, asked[number])
                for place, number in enumerate(members)
                if took_part[place] and len(asked[number].row) > 1
            ]
            if not places:
                continue
            length = max(len(one.row) for one in asked.values())
            attack = _Attack(self, own, images, places, length, suffix)
            found += yield from attack.on_models(sent, model)
            if generators := artifacts.get(f"client_generators{suffix}"):
                found += attack.on_generators(generators)
            if prototypes := artifacts.get("prototypes"):
                names = each_network("experts", context.settings)
                models = (artifacts[name].model for name in names)
                experts = dict(zip(context.networks, models, strict=True))
                found += attack.on_prototypes(prototypes, experts, sent, model)
            if self.inversion_steps:
                inverted += yield from attack.on_gradients(model)
        return _outcome(context, found, inverted)

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of the shadows, of what models are asked, and of the inversion."""
        data, local = blueprint.data, blueprint.settings.local
        size = np.asarray(data.clients.client.size)
        steps = self.shadows * workload.mean_steps(local, size) * len(size)
        inverted = self.inversion_steps * min(len(size), gradients.MOST_CLIENTS)
        # Of a gradient in the images: twice that of a gradient.
        images = steps * local.batch_size + 2 * inverted * self.inversion_images
        asked = 2 * np.minimum(size, self.images) + self.canaries
        forward = blueprint.classifier.flops(data.info.image_shape)
        passes = flops.TRAINED * images + (1 + self.shadows) * asked.sum()
        return float(passes * forward)


def _has_generators(study: "Settings | schema.View") -> bool:
    return study.method == "mosaic" or (
        study.trains_once and study.server.asks_for_generators()
    )


def _has_prototypes(study: "Settings | schema.View") -> bool:
    return study.method == "mosaic" and study.prototypes.gathered == "once"


@dataclasses.dataclass(frozen=True)
class _Attack:
    """Attacks on the clients of one network.

    Attributes:
      config: of the stage.
      context: for these clients.
      images: of `candidates.every_image`.
      places: of the clients among all with the network, each with what is asked of it.
      length: of all images that go through a program, so that it is compiled once.
      suffix: of the network's names.
    """

    config: Leakage
    context: Context
    images: LabelledImages
    places: list[tuple[int, Candidates]]
    length: int
    suffix: str

    def on_models(self, sent: ClientModels, model: ModelState) -> Run:
        """By how sure a client's model is of an image, and how sure shadows are.

        Args:
          sent: the clients' models.
          model: the global one, which is near to what they started from, unless there
            was one round alone: then they started from the study's first model.

        Returns:
          Scores of both attacks.
        """
        context, count = self.context, self.config.shadows
        confidences = programs.jit(
            functools.partial(_confidences, context.classifier, self._batch_size)
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
        if not count:
            return scores
        if context.settings.init.rounds + context.settings.warmup.rounds == 1:
            model = self._first_model()
        models, inside = yield from shadows.train(
            context, self.images, clients, count, model, self.suffix
        )
        for i, asked in enumerate(clients):
            own = trees.take(models, slice(i * count, (i + 1) * count))
            ratio = membership.likelihood_ratio(first[i], sure(own, asked), inside[i])
            scores.append(Scores("models", "LiRA", asked, ratio))
        return scores

    def _first_model(self) -> ModelState:
        """Of the first round, as the stage init makes it."""
        context = self.context
        key = prng.named(prng.root(context.settings.seed), f"init{self.suffix}")
        init = programs.jit(context.classifier.init, static_argnums=1)
        return init(prng.named(key, "model"), context.data.info.image_shape)

    def on_generators(self, sent: Generators) -> list[Scores]:
        """By how near an image is to the nearest of those that a generator draws."""
        context, count = self.context, self.config.generated
        model_gan = gan.build(context.settings, context.data.info, context.classifier)

        @programs.jit
        def distance(generator: ModelState, key: jax.Array, image: Array) -> Array:
            z = jax.random.normal(key, (count, model_gan.latent_dim))
            drawn = augment.to_signed(augment.to_uint8(model_gan.sample(generator, z)))
            asked, drawn = (
                x.reshape(len(x), -1) for x in (augment.to_signed(image), drawn)
            )
            return measures.nearest(asked, drawn, jnp.ones(count, bool))[0]

        return [
            Scores(
                "generators",
                "nearest image",
                asked,
                -np.asarray(
                    distance(
                        trees.take(sent.model, place),
                        prng.at(prng.named(context.key, "generated"), asked.client),
                        self._padded(asked)[0],
                    )
                )[: len(asked.row)],
            )
            for place, asked in self.places
            if sent.alive[place]
        ]

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


def _outcome(
    context: Context, found: list[Scores], inverted: list[Inverted]
) -> Outcome:
    """What the attacks tell, in the record, the summary, the report and the log."""
    plan = context.privacy
    rows = candidates.judged(
        found,
        () if plan is None else plan.epsilon,
        context.settings.privacy.delta,
    )
    for line in leakage_section.broken(rows):
        _log.warning("leakage: %s", line)
    results: dict[str, Any] = {"leakage": rows}
    if inverted:
        results["inverted"] = [
            {"client": one.client, "psnr": one.psnr, "by_chance": one.by_chance}
            for one in inverted
        ]
    return Outcome(
        artifacts={},
        results=results,
        headline=leakage_section.headline(rows),
        section=leakage_section.section(rows, inverted),
        pictures=leakage_section.pictures(inverted),
    )
