"""Stages 4 and 5: one expert per class, and prototypes of each client's classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import aggregation, evaluation, parallel, prototypes, trees
from mosaic_jax.algorithms import ALGORITHMS
from mosaic_jax.loop import Run
from mosaic_jax.models import submodel
from mosaic_jax.settings import Settings
from mosaic_jax.stages import local, rounds
from mosaic_jax.stages.base import Context, Outcome, Stage, each_network
from mosaic_jax.types import (
    Array,
    Client,
    ClientModels,
    Experts,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Prototypes,
    Tree,
)


def experts_stage(settings: Settings) -> Stage:
    """Stage 4: class-wise averages of the client models."""
    steps = ("local",) if settings.experts.local_steps else ()
    # Of parts of the network the rounds' program asks the clients for moments.
    partial = ALGORITHMS[settings.init.method].partial
    return Stage(
        name="experts",
        needs=("client_models", "global_model"),
        provides=("experts",),
        reads=(
            "experts",
            *steps,
            *(rounds.reads(settings) if partial else ()),
            *rounds.holdings(settings),
        ),
        run=_run_experts,
    )


def prototypes_stage(settings: Settings) -> Stage:
    """Stage 5: k-means centres of penultimate features."""
    return Stage(
        name="prototypes",
        needs=(
            "global_model",
            *each_network("client_models", settings),
            *each_network("experts", settings),
        ),
        provides=("prototypes",),
        reads=("prototypes", *rounds.holdings(settings)),
        run=_run_prototypes,
    )


def _run_experts(
    context: Context, client_models: ClientModels, global_model: ModelState
) -> Run:
    data, settings = context.data.clients, context.settings
    models, last_round = client_models.model, client_models.last_round
    up, down = {}, {}
    share = None
    if context.rates:
        share = rounds.held_in(context, global_model, last_round)
    counted = rounds.taking_part(last_round, settings.experts.participants)
    if settings.experts.local_steps:
        steps = np.full(data.num_clients, settings.experts.local_steps)
        models = yield from local.train(
            context, "local", models, steps, key=context.key
        )
        up["specialised_models"] = _bytes_of(models, share)
        never = np.flatnonzero(np.asarray(last_round) < 0)
        if len(never):
            down["models"] = _bytes_of(*trees.take((models, share), never))
        # All have trained now, those that took part in no round from the global model.
        counted = np.ones_like(counted)
    label_count = data.client.label_count * counted[:, None]
    experts = jax.jit(aggregation.class_experts)(
        models,
        label_count,
        global_model,
        share,
    )
    if context.algorithm.queries:
        experts, asked = _queried(context, experts, label_count)
        up["moments"], down["queried_models"] = asked.up, asked.down

    @jax.jit
    def predict(experts: Experts, image: Array) -> Array:
        def one(model: ModelState) -> Array:
            logits = evaluation.predict(
                lambda x: context.classifier.logits(model, x),
                image,
                batch_size=settings.evaluation.batch_size,
            )
            return jnp.argmax(logits, axis=-1)

        return parallel.expert_map(one, experts.model)

    test = context.data.held_out["test"]
    per_class = [
        evaluation.per_class_accuracy(
            np.asarray(row), np.asarray(test.label), data.num_classes
        ).tolist()
        for row in predict(experts, context.held_out["test"].image)
    ]
    absent = [k for k, held in enumerate(experts.present.tolist()) if not held]
    return Outcome(
        artifacts={"experts": experts},
        results={"expert_class_accuracy": per_class, "absent_classes": absent},
        up=up,
        down=down,
    )


def _bytes_of(models: ModelState, share: ModelState | None) -> int:
    """Of the models [C, ...] that clients hold; `share` as in `submodel.Part`."""
    if share is None:
        return trees.num_bytes(models)
    return submodel.num_bytes(models, share)


def _queried(
    context: Context, experts: Experts, label_count: np.ndarray
) -> tuple[Experts, rounds.Traffic]:
    """The experts with moments by the clients, weighted as in the experts' mean.

    And the bytes of experts sent and of moments.
    """
    program = rounds.build(context, context.settings.local)
    key = rounds.stream(context.settings)

    @jax.jit
    def run(
        data: FederatedDataset, experts: Experts, count: Array, key: Array
    ) -> ModelState:
        def one(args: Tree) -> ModelState:
            model, count, present = args
            weight = jnp.where(present, count, data.client.size)
            return program.queried(data, key, model, weight)

        return jax.lax.map(one, (experts.model, count.T, experts.present))

    model = run(context.clients, experts, label_count, key)
    asked = program.query_bytes(context.data.info.image_shape)
    return experts.replace(model=model), len(experts.present) * asked


def _run_prototypes(
    context: Context, global_model: ModelState, **artifacts: Tree
) -> Run:
    yield from ()  # no loop
    settings = context.settings
    experts, client_models = (
        dict(
            zip(
                context.networks,
                (artifacts[name] for name in each_network(kind, settings)),
                strict=True,
            )
        )
        for kind in ("experts", "client_models")
    )
    expert_model = {name: found.model for name, found in experts.items()}
    parts = [
        _of_network(context.of(name), client_models[name], global_model, expert_model)
        for name in context.networks
    ]
    found = [part[0] for part in parts]
    result, down = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found), {}
    if settings.prototypes.space == "expert":
        down["experts"] = sum(part[1] for part in parts)
    return Outcome(
        artifacts={"prototypes": result},
        results={"num_prototypes": len(result.label)},
        up={"prototypes": sum(part[2] for part in parts)},
        down=down,
    )


def _of_network(
    context: Context,
    client_models: ClientModels,
    global_model: ModelState,
    expert_model: dict[str, ModelState],
) -> tuple[Prototypes, int, int]:
    """Prototypes of the clients in `context`.

    In the `expert` space, a prototype enters an expert as the mean of its members in
    that expert's features; otherwise as the one centre that its client sends. Only one
    expert's features are held at a time.

    Returns:
      In host memory; bytes of the experts that clients receive, and of what they send:
      features and labels.
    """
    data, space = context.clients, context.settings.prototypes.space
    clustered_by = client_models.model
    if space == "global":
        clustered_by = trees.broadcast(global_model, data.num_clients)
    share = None
    if context.rates:
        share = rounds.held_in(context, global_model, client_models.last_round)
    run = jax.jit(functools.partial(cluster_images, context))
    cluster, held, own = run(data, clustered_by, share, context.key)
    held = jax.device_get(held)
    program = jax.jit(functools.partial(prototype_logits, context), static_argnums=0)
    take = jax.jit(trees.take)

    def logits(name: str, model: ModelState, centre: Array | None) -> np.ndarray:
        # Only clusters that exist are sent; which ones is known once they are computed.
        return np.asarray(program(name, data, cluster, share, model, centre))[held]

    centre = None if space == "expert" else own
    client, label, _ = np.nonzero(held)
    num_experts = data.num_classes * len(expert_model)
    expert_logits = np.empty((len(label), num_experts, data.num_classes), np.float32)
    for i, (name, models) in enumerate(expert_model.items()):
        for k in range(data.num_classes):
            found = logits(name, take(models, k), centre)
            expert_logits[:, i * data.num_classes + k] = found
    result = Prototypes(
        logits=expert_logits,
        gate_logits=logits(next(iter(context.networks)), global_model, None),
        label=label.astype(np.int32),
        client=np.asarray(data.client.number)[client].astype(np.int32),
    )
    received = data.num_clients * trees.num_bytes(expert_model)
    if share is not None:
        each = trees.broadcast(global_model, data.num_clients)
        received = data.num_classes * submodel.num_bytes(each, share)
    features = own.shape[-1]
    if space == "expert":
        shape = context.data.info.image_shape
        width = sum(one.num_features(shape) for one in context.networks.values())
        features = data.num_classes * width
    each_sent = 4 * features + result.label.itemsize
    return result, received, len(label) * each_sent


def cluster_images(
    context: Context,
    data: FederatedDataset,
    clustered_by: ModelState,
    share: ModelState | None,
    key: Array,
) -> tuple[Array, Array, Array]:
    """Cluster the images of each client and class by the features of `clustered_by`.

    Those [C, ...] are the clients' own models, or the global one. With `share`, 1 where
    each client [C, ...] holds the network, clients run that part of every model.

    Returns:
      Clusters [C, M] and which exist [C, K, k], see `prototypes.cluster_classes`, and
      their centres [C, K, k, F] in the same features.
    """
    config = context.settings.prototypes

    def one(
        client: Client,
        model: ModelState,
        share: ModelState | None,
        key: Array,
        images: LabelledImages,
    ) -> tuple[Array, Array, Array]:
        feature, label = _features(context, context.name, client, model, share, images)
        cluster, held = prototypes.cluster_classes(
            key,
            feature,
            client,
            label,
            num_clusters=config.clusters,
            num_steps=config.iterations,
        )
        return cluster, held, _centres(context, feature, label, cluster)

    return context.axis.map(
        one, data.client, clustered_by, share, shared=(key,), placed=(data.images,)
    )


def prototype_logits(
    context: Context,
    name: str,
    data: FederatedDataset,
    cluster: Array,
    share: ModelState | None,
    model: ModelState,
    centre: Array | None,
) -> Array:
    """Logits [C, K, k, K] of one `model` of network `name` on all prototypes.

    Those are the means of each `cluster` [C, M] in the model's own features, or
    `centre` [C, K, k, F]. `share` as in `cluster_images`.
    """

    def one(
        client: Client,
        cluster: Array,
        share: ModelState | None,
        model: ModelState,
        images: LabelledImages,
    ) -> Array:
        feature, label = _features(context, name, client, model, share, images)
        return _centres(context, feature, label, cluster)

    if centre is None:
        centre = context.axis.map(
            one,
            data.client,
            cluster,
            share,
            shared=(model,),
            placed=(data.images,),
        )
    return context.networks[name].head(model, centre)


def _features(
    context: Context,
    name: str,
    client: Client,
    model: ModelState,
    share: ModelState | None,
    images: LabelledImages,
) -> tuple[Array, Array]:
    """[M, F] of one client's images, and their labels [M]."""
    if share is not None:
        model = submodel.within(model, share)
    feature = prototypes.features(
        context.networks[name],
        model,
        client,
        images,
        batch_size=context.settings.evaluation.batch_size,
    )
    return feature, images.label[client.index]


def _centres(context: Context, feature: Array, label: Array, cluster: Array) -> Array:
    return prototypes.centres(
        feature,
        label,
        cluster,
        num_classes=context.data.info.num_classes,
        num_clusters=context.settings.prototypes.clusters,
    )
