"""How many clients and seeds fit on a device at once, and what stays on the host."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mosaic_jax.core import costs, programs, trees
from mosaic_jax.core.types import Batch, Client, LabelledImages, Tree
from mosaic_jax.data.sources import Info
from mosaic_jax.fl import gan, parallel, privacy, prototypes, training
from mosaic_jax.fl.algorithms.partial import PartialTraining
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.run import environment, images, settings
from mosaic_jax.run.settings import Settings
from mosaic_jax.run.study import Study

# Share of the free memory that clients may use at once; the rest is for models, images
# and XLA.
SHARE = 0.7
# Share that the states of all clients may take; beyond it they stay in host memory.
STATE_SHARE = 0.2
# Share that training images may take; likewise.
IMAGE_SHARE = 0.3


def clients_at_once(study: Study) -> int:
    """Number of clients that a device runs at once.

    It is `compute.clients_at_once`, or as many as fit into free memory; 0 where the
    device does not report its memory. The work of one client is compiled alone, and XLA
    tells how much memory it needs; each client in a `vmap` needs as much.
    """
    config, info, classifier = study.settings, study.data.info, study.classifier
    if config.compute.clients_at_once:
        return config.compute.clients_at_once
    free = environment.free_memory()
    if free is None:
        return 0
    # The least over all processes, which must run the same program.
    (least,) = environment.highest(-free)
    free = -least - uploads_bytes(study)
    needed = [classifier_bytes(config, info, classifier)]
    stages = {link.stage.name for link in study.chain}
    if "generators" in stages:
        needed.append(gan_bytes(config, info, classifier))
    if "prototypes" in stages:
        longest = study.data.clients.client.index.shape[1]
        needed.append(prototypes_bytes(config, info, classifier, longest))
    each = max(needed)
    if images_on_host(study):
        # Of a client whose turn it is, and of one whose turn is next.
        index = study.data.clients.client.index
        each += 2 * index.shape[1] * math.prod(info.image_shape)
    return max(1, int(SHARE * free) // each)


def uploads_bytes(study: Study) -> int:
    """Bytes that the uploads of a round take on each device; 0 where they are summed.

    A robust rule, and an attack whose clients know each other's updates, need all of
    them at once.
    """
    if not study.sending.needs_each:
        return 0
    shape = study.data.info.image_shape
    model = jax.eval_shape(lambda: study.classifier.init(jax.random.key(0), shape))
    upload = jax.eval_shape(study.algorithm.reference, model)
    clients = study.settings.init.clients_per_round
    return (clients or study.data.clients.num_clients) * trees.num_bytes(upload)


def seeds_at_once(study: Study) -> int:
    """Number of seeds that run as one program.

    It is `compute.seeds_at_once`, or as many as fit with all their clients. It is 1 on
    several devices, to which each seed deals its clients differently, and where the
    device does not report its memory: the cores of a CPU are busy with one client.
    """
    compute = study.settings.compute
    if compute.seeds_at_once:
        return compute.seeds_at_once
    if len(parallel.first_devices(compute.devices)) > 1:
        return 1
    return max(1, clients_at_once(study) // study.data.clients.num_clients)


def state_on_host(study: Study) -> bool:
    """Whether the clients' states stay in host memory between rounds.

    As `compute.client_state` says; with "auto", if they would take more than
    `STATE_SHARE` of a device's free memory, and no attack needs all at once.
    """
    config, shape = study.settings, study.data.info.image_shape
    if config.compute.client_state != "auto":
        return config.compute.client_state == "host"
    free = environment.free_memory()
    if free is None or study.sending.colludes:
        return False
    model = jax.eval_shape(lambda: study.classifier.init(jax.random.key(0), shape))
    algorithm = study.algorithm

    def states(model: Tree) -> Tree:
        error = study.sending.no_error(algorithm, model, 1)
        return algorithm.init_client(model), error

    kept = trees.num_bytes(jax.eval_shape(states, model))
    if config.method == "mosaic" or config.trains_once:
        kept += trees.num_bytes(model)
    (least,) = environment.highest(-free)
    free = -least
    return study.data.clients.num_clients * kept > STATE_SHARE * free


def images_on_host(study: Study) -> bool:
    """Whether training images stay in host memory, or in files.

    As `compute.images` says; with "auto", if they would take more than `IMAGE_SHARE`
    of a device's free memory, and all of the study can do without.
    """
    config = study.settings
    if config.compute.images == "host" or not config.data.in_memory:
        return True
    free = environment.free_memory()
    if config.compute.images == "device" or free is None:
        return False
    if images.obstacle(config, study.chain, study.sending):
        return False
    taken = math.prod(study.data.clients.images.image.shape)
    if not runs_anywhere(study):
        taken //= len(parallel.first_devices(config.compute.devices))
    (least,) = environment.highest(-free)
    return taken > IMAGE_SHARE * -least


def runs_anywhere(study: Study) -> bool:
    """Whether a client may run on any device, which must then be able to read it.

    Otherwise each has a device of its own in all rounds.
    """
    return (
        state_on_host(study)
        or isinstance(study.algorithm, PartialTraining)
        or len(study.networks) > 1
        or study.settings.init.clients_per_round > 0
    )


def classifier_bytes(config: Settings, info: Info, classifier: Classifier) -> int:
    """Bytes of memory that one client's step of local SGD needs.

    Args:
      config: settings of the study.
      info: of the data set.
      classifier: of the clients.
    """
    tx = training.optimizer(config.local)
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))

    def step(model: Tree, batch: Batch) -> Tree:
        return training.sgd_step(classifier, tx, model, tx.init(model.params), batch)

    needed = _program_bytes(step, model, _batch(info, config.local.batch_size))
    return needed + _private_bytes(config, model.params)


def gan_bytes(config: Settings, info: Info, classifier: Classifier) -> int:
    """Bytes of memory that one client's GAN step needs.

    Args:
      config: settings of the study.
      info: of the data set.
      classifier: of the clients.
    """
    seen = settings.view(config, ("generators", "compat"))
    model_gan = gan.build(seen, info, classifier)
    state = jax.eval_shape(lambda: model_gan.init(jax.random.key(0), info.image_shape))
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))

    def step(state: Tree, model: Tree, batch: Batch) -> Tree:
        return model_gan.step(
            state,
            jax.random.key(0),
            jnp.int32(0),
            batch.image,
            batch.mask,
            client_model=model,
            class_share=jnp.full(info.num_classes, 1 / info.num_classes),
            inverts=jnp.array(True),
            statistics=model,
        )

    needed = _program_bytes(
        step, state, model, _batch(info, config.generators.batch_size)
    )
    if model_gan.discriminator is None:
        return needed
    return needed + _private_bytes(config, state.discriminator.params)


def prototypes_bytes(
    config: Settings, info: Info, classifier: Classifier, num_images: int
) -> int:
    """Bytes of memory that one client's prototypes need, in one feature space.

    Args:
      config: settings of the study.
      info: of the data set.
      classifier: of the clients.
      num_images: of the client.
    """
    model = jax.eval_shape(lambda: classifier.init(jax.random.key(0), info.image_shape))
    wanted, number = config.prototypes, trees.shape((), jnp.int32)
    client = Client(
        number=number,
        index=trees.shape((num_images,), jnp.int32),
        size=number,
        label_count=trees.shape((info.num_classes,), jnp.int32),
    )
    images = LabelledImages(
        image=trees.shape((num_images, *info.image_shape), jnp.uint8),
        label=trees.shape((num_images,), jnp.int32),
    )

    def make(model: Tree, client: Client, images: LabelledImages) -> Tree:
        size, label = config.evaluation.batch_size, images.label[client.index]
        feature = prototypes.features(
            classifier, model, client, images, batch_size=size
        )
        cluster, held = prototypes.cluster_classes(
            jax.random.key(0),
            feature,
            label,
            jnp.arange(num_images) < client.size,
            num_classes=info.num_classes,
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

    return _program_bytes(make, model, client, images)


def _private_bytes(config: Settings, params: Tree) -> int:
    """Bytes of the gradients of single images that a private step has at once."""
    return privacy.bytes_at_once(params) if config.privacy.of_images else 0


def _batch(info: Info, size: int) -> Batch:
    """Shapes of a minibatch."""
    return Batch(
        image=trees.shape((size, *info.image_shape), jnp.float32),
        label=trees.shape((size,), jnp.int32),
        mask=trees.shape((size,), bool),
    )


def _program_bytes(function: Callable[..., Tree], *shapes: Tree) -> int:
    """Bytes of temporary memory and results of `function`, as XLA reports them.

    For devices without a compiler they are counted, see `core.costs`.
    """
    target = programs.target()
    if target is not None:
        if target.shapes is None:
            return costs.of(function, *shapes)[1]
        shapes = target.shapes(shapes)
    memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    assert memory is not None  # every backend of this library has it
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)
