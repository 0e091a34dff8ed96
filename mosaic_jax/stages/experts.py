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
    training,
    trees,
)
from mosaic_jax.settings import Settings, to_mapping
from mosaic_jax.stages.base import Context, Outcome, Stage
from mosaic_jax.types import (
    Array,
    Experts,
    FederatedDataset,
    ModelState,
    Prototypes,
)


def experts_stage(settings: Settings) -> Stage:
    """Stage 4: class-wise averages of the client models."""
    steps = settings.experts.local_steps
    return Stage(
        name="experts",
        needs=("client_models", "global_model"),
        provides=("experts",),
        depends={
            "experts": to_mapping(settings.experts),
            "local": to_mapping(settings.local) if steps else {},
        },
        run=_run_experts,
    )


def prototypes_stage(settings: Settings) -> Stage:
    """Stage 5: k-means centres of penultimate features."""
    return Stage(
        name="prototypes",
        needs=("client_models", "global_model", "experts"),
        provides=("prototypes",),
        depends={"prototypes": to_mapping(settings.prototypes)},
        run=_run_prototypes,
    )


def _run_experts(
    context: Context, client_models: ModelState, global_model: ModelState
) -> Outcome:
    data, settings = context.data.clients, context.settings
    up = {}
    if settings.experts.local_steps:
        client_models = _train_further(context, client_models)
        up["specialised_models"] = trees.num_bytes(client_models)
    experts = jax.jit(aggregation.class_experts)(
        client_models, data.label_count, global_model
    )

    @jax.jit
    def predict(experts: Experts, image: Array) -> Array:
        def one(model: ModelState) -> Array:
            logits = evaluation.predict(
                lambda x: context.classifier.logits(model, x),
                image,
                batch_size=settings.evaluation.batch_size,
            )
            return jnp.argmax(logits, axis=-1)

        return parallel.client_map(one, experts.model)

    test = context.data.held_out["test"]
    per_class = [
        evaluation.per_class_accuracy(
            np.asarray(row), np.asarray(test.label), data.num_classes
        ).tolist()
        for row in predict(experts, test.image)
    ]
    absent = [k for k, held in enumerate(experts.present.tolist()) if not held]
    return Outcome(
        artifacts={"experts": experts},
        results={"expert_class_accuracy": per_class, "absent_classes": absent},
        up=up,
    )


def _train_further(context: Context, client_models: ModelState) -> ModelState:
    settings, data = context.settings, context.data.clients
    local = settings.local
    tx = training.sgd(local.learning_rate, local.weight_decay)

    @jax.jit
    def chunk(data, key, models, first, end):
        def one(i, model):
            def batch_at(step):
                return training.client_batch(
                    data,
                    i,
                    first + step,
                    key=key,
                    batch_size=local.batch_size,
                    augmentation=context.data.info.augmentation,
                )

            return training.local_training(
                context.classifier, tx, model, batch_at, end - first
            )

        models, loss = parallel.client_map(one, jnp.arange(data.num_clients), models)
        return models, {"loss": jnp.mean(loss)}

    return context.loop(
        "local",
        functools.partial(chunk, data, context.key),
        client_models,
        settings.experts.local_steps,
        every=settings.log.every_steps,
        samples_per_step=data.num_clients * local.batch_size,
    )


def _run_prototypes(
    context: Context,
    client_models: ModelState,
    global_model: ModelState,
    experts: Experts,
) -> Outcome:
    config, data = context.settings.prototypes, context.data.clients
    run = jax.jit(functools.partial(client_prototypes, context))
    clustered_by = client_models
    if config.space == "global":
        clustered_by = trees.broadcast(global_model, data.num_clients)
    feature, gate_feature, held = jax.device_get(
        run(data, clustered_by, global_model, experts.model, context.key)
    )
    # Only clusters that exist are sent; which ones is known once they are computed.
    client, label, _ = np.nonzero(held)
    result = Prototypes(
        feature=jnp.asarray(feature[held]),
        gate_feature=jnp.asarray(gate_feature[held]),
        label=jnp.asarray(label, jnp.int32),
        client=jnp.asarray(client, jnp.int32),
    )
    down = {}
    if config.space == "expert":
        down["experts"] = data.num_clients * trees.num_bytes(experts.model)
    sent = trees.num_bytes(result.feature) + trees.num_bytes(result.label)
    if context.settings.meta.gate != "none" and config.space != "global":
        sent += trees.num_bytes(result.gate_feature)
    return Outcome(
        artifacts={"prototypes": result},
        results={"num_prototypes": len(label)},
        up={"prototypes": sent},
        down=down,
    )


def client_prototypes(
    context: Context,
    data: FederatedDataset,
    clustered_by: ModelState,
    global_model: ModelState,
    expert_model: ModelState,
    key: Array,
) -> tuple[Array, Array, Array]:
    """Cluster each client's features per class.

    Clusters are formed in the feature space of `clustered_by` (the client's own model
    or the global one). In the `expert` space the members' means are then taken in
    every expert's features; otherwise in the same space.

    Returns:
      Centres [C, K, k, S, F], centres in the global model's space [C, K, k, F], and
      which clusters exist [C, K, k] bool.
    """
    config, classifier = context.settings.prototypes, context.classifier
    size = context.settings.evaluation.batch_size

    def features(model: ModelState, image: Array) -> Array:
        return evaluation.predict(
            lambda x: classifier.features(model, x), image, batch_size=size
        )

    def one(i: Array, model: ModelState):
        rows = data.index[i]
        mine = jnp.arange(len(rows)) < data.size[i]
        image = data.image[rows]
        own = features(model, image)
        on_global = features(global_model, image)
        spaces = own[None]
        if config.space == "expert":
            spaces = jax.lax.map(lambda expert: features(expert, image), expert_model)

        def one_class(k: Array):
            mask = mine & (data.label[rows] == k)
            cluster, held = prototypes.kmeans(
                prng.at(key, i, k),
                own,
                mask,
                num_clusters=config.clusters,
                num_steps=config.iterations,
            )
            member = jax.nn.one_hot(cluster, config.clusters) * mask[:, None]
            centres = jax.vmap(lambda f: prototypes.cluster_means(f, member)[0])(spaces)
            gate = prototypes.cluster_means(on_global, member)[0]
            return centres.transpose(1, 0, 2), gate, held

        return jax.lax.map(one_class, jnp.arange(data.num_classes))

    return parallel.client_map(one, jnp.arange(data.num_clients), clustered_by)
