"""How many clients fit on a device at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mosaic_jax import (
    environment,
    gan,
    parallel,
    prototypes,
    settings,
    training,
    trees,
)
from mosaic_jax.algorithms.base import Algorithm
from mosaic_jax.classifier import Classifier
from mosaic_jax.data.federated import StudyData
from mosaic_jax.data.sources import Info
from mosaic_jax.types import Batch, Client, LabelledImages, Tree

# Of the memory that is free before a stage; the rest is for models, images, XLA.
SHARE = 0.7
STATE_SHARE = 0.2


def clients_at_once(
    config: settings.Settings, data: StudyData, classifier: Classifier
) -> int:
    """`compute.clients_at_once`, or as many as free memory holds; 0: it does not tell.

    What one client does is compiled alone and XLA asked what it needs; clients in one
    `vmap` need that much each.
    """
    if config.compute.clients_at_once:
        return config.compute.clients_at_once
    free = environment.free_memory()
    if free is None:
        return 0
    # The least of all processes: they must run the same program.
    free = -environment.highest(-free)
    needed = [classifier_bytes(config, data.info, classifier)]
    if config.method == "mosaic":
        longest = data.clients.client.index.shape[1]
        needed.append(gan_bytes(config, data.info, classifier))
        needed.append(prototypes_bytes(config, data.info, classifier, longest))
    return max(1, int(SHARE * free) // max(needed))


def seeds_at_once(
    config: settings.Settings, data: StudyData, classifier: Classifier
) -> int:
    """`compute.seeds_at_once`, or as many as have room besides all their clients.

    One on several devices, whose clients' places differ between seeds, and where a
    device does not tell its memory: the cores of a CPU are busy with one client.
    """
    if config.compute.seeds_at_once:
        return config.compute.seeds_at_once
    if len(parallel.first_devices(config.compute.devices)) > 1:
        return 1
    clients = clients_at_once(config, data, classifier)
    return max(1, clients // config.data.num_clients)


def state_on_host(
    config: settings.Settings, info: Info, classifier: Classifier, algorithm: Algorithm
) -> bool:
    """Whether what clients keep between rounds lives in host memory.

    By `compute.client_state`; "auto": where it would take more than `STATE_SHARE` of
    the memory that is free on a device.
    """
    if config.compute.client_state != "auto":
        return config.compute.client_state == "host"
    free = environment.free_memory()
    if free is None:
        return False
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))
    kept = trees.num_bytes(jax.eval_shape(algorithm.init_client, model))
    if config.method == "mosaic":
        kept += trees.num_bytes(model)
    free = -environment.highest(-free)
    return config.data.num_clients * kept > STATE_SHARE * free


def classifier_bytes(
    config: settings.Settings, info: Info, classifier: Classifier
) -> int:
    """Bytes that one client's local step needs."""
    tx = training.sgd(config.local.learning_rate, config.local.weight_decay)
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))

    def step(model: Tree, batch: Batch) -> Tree:
        return training.sgd_step(classifier, tx, model, tx.init(model.params), batch)

    return _program_bytes(step, model, _batch(info, config.local.batch_size))


def gan_bytes(config: settings.Settings, info: Info, classifier: Classifier) -> int:
    """Bytes that one client's GAN step needs."""
    model_gan = gan.build(config, info, classifier)
    state = jax.eval_shape(lambda: model_gan.init(jax.random.key(0), info.image_shape))
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))

    def step(state: Tree, model: Tree, batch: Batch) -> Tree:
        return model_gan.step(
            state,
            jax.random.key(0),
            batch.image,
            batch.mask,
            client_model=model,
            class_share=jnp.full(info.num_classes, 1 / info.num_classes),
            inverts=jnp.array(True),
            statistics=model,
        )

    return _program_bytes(
        step, state, model, _batch(info, config.generators.batch_size)
    )


def prototypes_bytes(
    config: settings.Settings, info: Info, classifier: Classifier, num_images: int
) -> int:
    """Bytes that prototypes of a client of `num_images` need, in one feature space."""
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))
    wanted, count = config.prototypes, jax.ShapeDtypeStruct((), jnp.int32)
    client = Client(
        number=count,
        index=jax.ShapeDtypeStruct((num_images,), jnp.int32),
        size=count,
        label_count=jax.ShapeDtypeStruct((info.num_classes,), jnp.int32),
    )
    images = LabelledImages(
        image=jax.ShapeDtypeStruct((num_images, *info.image_shape), jnp.uint8),
        label=jax.ShapeDtypeStruct((num_images,), jnp.int32),
    )

    def run(model: Tree, client: Client, images: LabelledImages) -> Tree:
        size, label = config.evaluation.batch_size, images.label[client.index]
        feature = prototypes.features(
            classifier, model, client, images, batch_size=size
        )
        cluster, held = prototypes.cluster_classes(
            jax.random.key(0),
            feature,
            client,
            label,
            num_clusters=wanted.clusters,
            num_steps=wanted.iterations,
        )
        centre = prototypes.centres(
            feature,
            label,
            cluster,
            num_classes=info.num_classes,
            num_clusters=wanted.clusters,
        )
        return classifier.head(model, centre), held

    return _program_bytes(run, model, client, images)


def _batch(info: Info, size: int) -> Batch:
    return Batch(
        image=jax.ShapeDtypeStruct((size, *info.image_shape), jnp.float32),
        label=jax.ShapeDtypeStruct((size,), jnp.int32),
        mask=jax.ShapeDtypeStruct((size,), bool),
    )


def _program_bytes(function: Callable[..., Tree], *shapes: Tree) -> int:
    memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)
