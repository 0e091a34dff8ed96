"""Stage 5: prototypes of each client's classes, as logits of every expert."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import prng, programs, schema, trees, types
from mosaic_jax.core.steps import Run
from mosaic_jax.core.types import (
    Array,
    Client,
    ClientModels,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Tree,
)
from mosaic_jax.fl import prototypes
from mosaic_jax.fl.accounting import Release
from mosaic_jax.nn import submodel
from mosaic_jax.stages import federation, private_prototypes
from mosaic_jax.stages.base import Blueprint, Context, Outcome, Stage, each_network

if TYPE_CHECKING:
    from mosaic_jax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class Prototypes(Stage):
    """Stage 5: k-means centres of penultimate features, per client and class."""

    name = "prototypes"

    clusters: int = schema.at_least(
        1, default=10, meaning="centres per client and class"
    )
    space: str = schema.one_of(
        ("expert", "client", "global"),
        default="expert",
        meaning="whose features: each expert's, the client's own, the global model's",
    )
    iterations: int = schema.at_least(0, default=20, meaning="iterations of k-means")
    gathered: str = schema.one_of(
        ("once", "every_round"),
        default="once",
        meaning="of all images after the rounds, or in every round of warmup of its"
        " minibatches and the model as it is received",
    )

    def problems(self, study: "Settings") -> Iterator[str]:
        """Clients with different networks have no other common feature spaces.

        What is gathered in rounds of warm-up are features of the global model.
        """
        if self.gathered == "every_round" and self.space != "global":
            yield (
                f"prototypes.space = {self.space!r}: must be 'global' for"
                " prototypes.gathered = 'every_round', whose features are those of the"
                " model that clients receive"
            )
        mosaic = study.method == "mosaic"
        if mosaic and self.gathered == "every_round" and not study.warmup.rounds:
            yield (
                "warmup.rounds = 0: must be > 0 for prototypes.gathered ="
                " 'every_round', which are gathered in these rounds"
            )
        if study.model.others and self.space != "expert":
            yield (
                f"prototypes.space = {self.space!r}: must be 'expert' where clients"
                f" have different networks, model.others = {study.model.others}"
            )

    def needs(self, study: "Settings") -> tuple[str, ...]:
        """The models whose features are clustered or passed through their heads."""
        experts = each_network("experts", study)
        if self.gathered == "every_round":
            return ("global_model", *experts, "gathered")
        return ("global_model", *each_network("client_models", study), *experts)

    def provides(self, study: "Settings") -> tuple[str, ...]:
        """The logits of every expert for all prototypes."""
        del study
        return ("prototypes",)

    def reads(self, study: "Settings") -> tuple[str, ...]:
        """Settings of the part of the network that each client holds."""
        return federation.reads_holdings(study)

    def releases(self, study: "Settings", sizes: np.ndarray) -> tuple[Release, ...]:
        """The prototypes, once, in all spaces together."""
        del study
        return (Release("prototypes", np.ones_like(sizes)),)

    def reads_images(self, study: "Settings") -> bool:
        """Where prototypes are made here, and not gathered in rounds."""
        del study
        return self.gathered != "every_round"

    def run(self, context: Context, global_model: ModelState, **artifacts: Tree) -> Run:
        """Cluster the features, then pass the centres through every expert's head."""
        if self.gathered == "every_round":
            return _of_gathered(context, global_model, **artifacts)
        return _make_prototypes(self, context, global_model, artifacts)

    def template(self, blueprint: Blueprint) -> dict[str, Tree]:
        """Prototypes of all clients; their number is known only once they exist."""
        classes = blueprint.data.info.num_classes
        experts = classes * len(blueprint.networks)
        number = trees.shape((-1,), jnp.int32)
        shapes = types.Prototypes(
            logits=trees.shape((-1, experts, classes), jnp.float32),
            gate_logits=trees.shape((-1, classes), jnp.float32),
            label=number,
            client=number,
        )
        return {"prototypes": shapes}

    def flops(self, blueprint: Blueprint) -> float:
        """FLOPs of every image's features in each space; k-means costs little."""
        if self.gathered == "every_round":
            return 0.0  # heads alone
        data, total = blueprint.data, 0.0
        shape = data.info.image_shape
        for classifier in blueprint.networks.values():
            experts = data.info.num_classes if self.space == "expert" else 1
            total += experts * classifier.flops(shape)
        size = data.clients.client.size.sum()
        return float(size * (total + 2 * blueprint.classifier.flops(shape)))


def _make_prototypes(
    config: Prototypes,
    context: Context,
    global_model: ModelState,
    artifacts: dict[str, Tree],
) -> Run:
    yield from ()  # this stage has no loop
    experts, client_models = (
        dict(
            zip(
                context.networks,
                (artifacts[name] for name in each_network(kind, context.settings)),
                strict=True,
            )
        )
        for kind in ("experts", "client_models")
    )
    expert_model = {name: of_network.model for name, of_network in experts.items()}
    parts = [
        _of_network(
            context.for_network(name), client_models[name], global_model, expert_model
        )
        for name in context.networks
    ]
    made = [part[0] for part in parts]
    result, down = jax.tree.map(lambda *leaves: np.concatenate(leaves), *made), {}
    if config.space == "expert":
        down["experts"] = sum(part[1] for part in parts)
    return Outcome(
        artifacts={"prototypes": result},
        results={"num_prototypes": len(result.label)},
        up={"prototypes": sum(part[2] for part in parts)},
        down=down,
    )


def _of_gathered(
    context: Context,
    global_model: ModelState,
    experts: types.Experts,
    gathered: types.Gathered,
) -> Run:
    """What clients sent in the rounds, as logits of the experts and the global model.

    Nothing crosses the network for it.
    """
    yield from ()  # this stage has no loop
    head, take = programs.jit(context.classifier.head), programs.jit(trees.take)
    feature = context.axis.replicate(gathered.feature)

    def logits(model: ModelState) -> np.ndarray:
        return np.asarray(head(model, feature))

    classes = range(context.data.info.num_classes)
    expert_logits = [logits(take(experts.model, k)) for k in classes]
    result = types.Prototypes(
        logits=np.stack(expert_logits, axis=1),
        gate_logits=logits(global_model),
        label=gathered.label,
        client=gathered.client,
    )
    return Outcome(
        artifacts={"prototypes": result},
        results={"num_prototypes": len(result.label)},
    )


def _of_network(
    context: Context,
    client_models: ClientModels,
    global_model: ModelState,
    expert_model: dict[str, ModelState],
) -> tuple[types.Prototypes, int, int]:
    """Prototypes of the clients of one network.

    In the space "expert", the head of an expert gets the mean of a cluster's images in
    that expert's own features; in the others, the one centre that the client sends.
    Only one expert's features are in memory at a time.

    Returns:
      The prototypes in host memory; bytes of the experts that the clients receive; and
      bytes of the features and labels that they send.
    """
    data, space = context.clients, context.settings.prototypes.space
    if context.mechanism is not None:
        return private_prototypes.of_network(
            context, client_models, global_model, expert_model
        )
    clustered_by = client_models.model
    if space == "global":
        clustered_by = trees.broadcast(global_model, data.num_clients)
    mask = None
    if context.rates:
        last_round = client_models.last_round
        mask = federation.trained_masks(context, global_model, last_round)
    cluster_all = programs.jit(
        functools.partial(cluster_images, context), assumed=_all_clusters
    )
    cluster, held, own = cluster_all(data, clustered_by, mask, context.key)
    held = jax.device_get(held)
    program = programs.jit(
        functools.partial(prototype_logits, context), static_argnums=0
    )
    take = programs.jit(trees.take)

    def logits(name: str, model: ModelState, centre: Array | None) -> np.ndarray:
        # Clusters without images are not sent.
        return np.asarray(program(name, data, cluster, mask, model, centre))[held]

    centre = None if space == "expert" else own
    client, label, _ = np.nonzero(held)
    num_experts = data.num_classes * len(expert_model)
    expert_logits = np.empty((len(label), num_experts, data.num_classes), np.float32)
    for i, (name, models) in enumerate(expert_model.items()):
        for k in range(data.num_classes):
            column = i * data.num_classes + k
            expert_logits[:, column] = logits(name, take(models, k), centre)
    result = types.Prototypes(
        logits=expert_logits,
        gate_logits=logits(next(iter(context.networks)), global_model, None),
        label=label.astype(np.int32),
        client=np.asarray(data.client.number)[client].astype(np.int32),
    )
    received = data.num_clients * trees.num_bytes(expert_model)
    if mask is not None:
        each = trees.broadcast(global_model, data.num_clients)
        received = data.num_classes * submodel.num_bytes(each, mask)
    features = own.shape[-1]
    if space == "expert":
        shape = context.data.info.image_shape
        networks = context.networks.values()
        width = sum(network.num_features(shape) for network in networks)
        features = data.num_classes * width
    each_sent = 4 * features + result.label.itemsize
    return result, received, len(label) * each_sent


def _all_clusters(args: tuple, results: Tree) -> Tree:
    """What `cluster_images` is taken to find where it is not run.

    All clusters of each class that a client has enough images of, else one.
    """
    (data, *_), (cluster, held, centre) = args, results
    count, clusters = np.asarray(data.client.label_count)[..., None], held.shape[-1]
    filled = np.where(count >= clusters, clusters, np.minimum(count, 1))
    return cluster, np.arange(clusters) < filled, centre


def cluster_images(
    context: Context,
    data: FederatedDataset,
    clustered_by: ModelState,
    mask: ModelState | None,
    key: jax.Array,
) -> tuple[Array, Array, Array]:
    """Cluster the images of each client and class by their features.

    Args:
      context: of the stage.
      data: of all clients.
      clustered_by: models whose features are clustered, leaves [C, ...]: the clients'
        own, or copies of the global one.
      mask: the parameters that each client holds, leaves [C, ...] as of
        `submodel.Part`; it uses these of every model. None: all.
      key: random key of the k-means of all clients.

    Returns:
      Clusters [C, M] int32 and which of them are not empty [C, K, k] bool, see
      `prototypes.cluster_classes`, and their centres [C, K, k, F] in the same features.
    """
    config = context.settings.prototypes

    def cluster_client(
        client: Client,
        model: ModelState,
        mask: ModelState | None,
        key: jax.Array,
        images: LabelledImages,
    ) -> tuple[Array, Array, Array]:
        feature, label = _features(context, context.name, client, model, mask, images)
        cluster, held = prototypes.cluster_classes(
            prng.at(key, client.number),
            feature,
            label,
            jnp.arange(len(label)) < client.size,
            num_classes=context.data.info.num_classes,
            num_clusters=config.clusters,
            num_steps=config.iterations,
        )
        return cluster, held, _centres(context, feature, label, cluster)

    return context.axis.map(
        cluster_client,
        data.client,
        clustered_by,
        mask,
        shared=(key,),
        placed=(data.images,),
    )


def prototype_logits(
    context: Context,
    name: str,
    data: FederatedDataset,
    cluster: Array,
    mask: ModelState | None,
    model: ModelState,
    centre: Array | None,
) -> Array:
    """Logits of one model for all prototypes.

    Args:
      context: of the stage.
      name: of the model's network.
      data: of all clients.
      cluster: [C, M] int32, the cluster of each image within its class.
      mask: the parameters that each client holds, as in `cluster_images`.
      model: an expert, or the global model.
      centre: [C, K, k, F], what the model's head gets; None: the mean of each cluster
        in the model's own features.

    Returns:
      [C, K, k, K] float32, for each client, class and cluster.
    """

    def client_centres(
        client: Client,
        cluster: Array,
        mask: ModelState | None,
        model: ModelState,
        images: LabelledImages,
    ) -> Array:
        feature, label = _features(context, name, client, model, mask, images)
        return _centres(context, feature, label, cluster)

    if centre is not None:
        return context.networks[name].head(model, centre)
    own_centre = context.axis.map(
        client_centres,
        data.client,
        cluster,
        mask,
        shared=(model,),
        placed=(data.images,),
    )
    return context.networks[name].head(model, own_centre)


def _features(
    context: Context,
    name: str,
    client: Client,
    model: ModelState,
    mask: ModelState | None,
    images: LabelledImages,
) -> tuple[Array, Array]:
    """Features [M, F] of one client's images by its part of `model`; labels [M]."""
    if mask is not None:
        model = submodel.within(model, mask)
    feature = prototypes.features(
        context.networks[name],
        model,
        client,
        images,
        batch_size=context.settings.evaluation.batch_size,
    )
    return feature, images.label[client.index]


def _centres(context: Context, feature: Array, label: Array, cluster: Array) -> Array:
    """Centres [K, k, F] of one client's clusters in the features [M, F]."""
    return prototypes.centres(
        feature,
        label,
        cluster,
        num_classes=context.data.info.num_classes,
        num_clusters=context.settings.prototypes.clusters,
    )
