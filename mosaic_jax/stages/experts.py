"""Stages 4 and 5: one expert per class, and prototypes of each client's classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax import (
    aggregation,
    evaluation,
    parallel,
    prng,
    prototypes,
    trees,
)
from mosaic_jax.algorithms import ALGORITHMS
from mosaic_jax.loop import Run
from mosaic_jax.models import submodel
from mosaic_jax.settings import Settings
from mosaic_jax.stages import local, rounds
from mosaic_jax.stages.base import Context, Outcome, Stage, each_network
from mosaic_jax.types import (
    Array,
    Client,
    Experts,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Prototypes,
    Tree,
)

# By which the number of the last round before the experts is known.
_LAST_ROUND = ("init.rounds", "warmup.rounds")


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
            *rounds.holdings(settings, *_LAST_ROUND),
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
        reads=("prototypes", "meta.gate", *rounds.holdings(settings, *_LAST_ROUND)),
        run=_run_prototypes,
    )


def _run_experts(
    context: Context, client_models: ModelState, global_model: ModelState
) -> Run:
    data, settings = context.data.clients, context.settings
    up = {}
    if settings.experts.local_steps:
        steps = np.full(data.num_clients, settings.experts.local_steps)
        client_models = yield from local.train(
            context, "local", client_models, steps, key=context.key
        )
        up["specialised_models"] = trees.num_bytes(client_models)
    experts = jax.jit(aggregation.class_experts)(
        client_models,
        data.client.label_count,
        global_model,
        _held(context, global_model) if context.rates else None,
    )
    if context.algorithm.queries:
        experts = _queried(context, experts)

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
    )


def _queried(context: Context, experts: Experts) -> Experts:
    """The experts with moments by the clients, weighted as in the experts' mean."""
    program = rounds.build(context, context.settings.local)
    key = rounds.stream(context.settings)

    @jax.jit
    def run(data: FederatedDataset, experts: Experts, key: Array) -> ModelState:
        def one(args: Tree) -> ModelState:
            model, count, present = args
            weight = jnp.where(present, count, data.client.size)
            return program.queried(data, key, model, weight)

        count = data.client.label_count.T
        return jax.lax.map(one, (experts.model, count, experts.present))

    return experts.replace(model=run(context.clients, experts, key))


def _held(context: Context, global_model: ModelState) -> ModelState:
    """What clients [C, ...] trained in the last round: 1 there, else 0."""
    settings = context.settings
    last = settings.init.rounds + settings.warmup.rounds - 1
    return rounds.held_in(context, global_model, last)


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
    result, down = trees.concatenate([part[0] for part in parts]), {}
    if settings.prototypes.space == "expert":
        down["experts"] = sum(part[1] for part in parts)
    sent = trees.num_bytes(result.feature) + trees.num_bytes(result.label)
    if settings.meta.gate != "none" and settings.prototypes.space != "global":
        sent += trees.num_bytes(result.gate_feature)
    return Outcome(
        artifacts={"prototypes": result},
        results={"num_prototypes": len(result.label)},
        up={"prototypes": sent},
        down=down,
    )


def _of_network(
    context: Context,
    client_models: ModelState,
    global_model: ModelState,
    expert_model: dict[str, ModelState],
) -> tuple[Prototypes, int]:
    """Prototypes of the clients in `context`, and bytes of the experts they receive."""
    data = context.clients
    run = jax.jit(functools.partial(client_prototypes, context))
    clustered_by = client_models
    if context.settings.prototypes.space == "global":
        clustered_by = trees.broadcast(global_model, data.num_clients)
    share = _held(context, global_model) if context.rates else None
    found = run(data, clustered_by, share, global_model, expert_model, context.key)
    feature, gate_feature, held = jax.device_get(found)
    # Only clusters that exist are sent; which ones is known once they are computed.
    client, label, _ = np.nonzero(held)
    result = Prototypes(
        feature={name: jnp.asarray(centres[held]) for name, centres in feature.items()},
        gate_feature=jnp.asarray(gate_feature[held]),
        label=jnp.asarray(label, jnp.int32),
        client=jnp.asarray(data.client.number[client], jnp.int32),
    )
    received = data.num_clients * trees.num_bytes(expert_model)
    if share is not None:
        each = trees.broadcast(global_model, data.num_clients)
        received = data.num_classes * submodel.num_bytes(each, share)
    return result, received


def client_prototypes(
    context: Context,
    data: FederatedDataset,
    clustered_by: ModelState,
    share: ModelState | None,
    global_model: ModelState,
    expert_model: dict[str, ModelState],
    key: Array,
) -> tuple[dict[str, Array], Array, Array]:
    """Cluster each client's features per class.

    Clusters are formed in the feature space of `clustered_by` (the client's own model
    or the global one). In the `expert` space the members' means are then taken in the
    features of every expert, by network; otherwise in the same space. With `share`, 1
    where each client [C, ...] holds the network, clients run that part of every model.

    Returns:
      Centres [C, K, k, S, F] by network, centres in the global model's space
      [C, K, k, F], and which clusters exist [C, K, k] bool.
    """
    config, networks = context.settings.prototypes, context.networks
    size = context.settings.evaluation.batch_size
    first = next(iter(networks))

    def one(
        client: Client,
        model: ModelState,
        share: ModelState | None,
        global_model: ModelState,
        expert_model: dict[str, ModelState],
        images: LabelledImages,
    ):
        rows = client.index
        mine = jnp.arange(len(rows)) < client.size
        image, label = images.image[rows], images.label[rows]

        def features(model: ModelState, name: str) -> Array:
            if share is not None:
                model = submodel.within(model, share)
            return evaluation.predict(
                lambda x: networks[name].features(model, x), image, batch_size=size
            )

        own = features(model, context.name)
        on_global = features(global_model, first)
        spaces = {context.name: own[None]}
        if config.space == "expert":
            spaces = {
                name: jax.lax.map(lambda e, name=name: features(e, name), expert)
                for name, expert in expert_model.items()
            }

        def one_class(k: Array):
            mask = mine & (label == k)
            cluster, held = prototypes.kmeans(
                prng.at(key, client.number, k),
                own,
                mask,
                num_clusters=config.clusters,
                num_steps=config.iterations,
            )
            member = jax.nn.one_hot(cluster, config.clusters) * mask[:, None]

            def centres(feature: Array) -> Array:
                return prototypes.cluster_means(feature, member)[0]

            found = {
                name: jax.vmap(centres)(feature).swapaxes(0, 1)
                for name, feature in spaces.items()
            }
            return found, centres(on_global), held

        return jax.lax.map(one_class, jnp.arange(data.num_classes))

    return context.axis.map(
        one,
        data.client,
        clustered_by,
        share,
        shared=(global_model, expert_model),
        placed=(data.images,),
    )
