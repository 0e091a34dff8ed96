"""Prototypes of private studies: noisy means of each client's classes."""

import functools

import jax
import numpy as np

from mosaic_jax.core import prng, programs, trees, types
from mosaic_jax.core.types import (
    Array,
    Client,
    ClientModels,
    FederatedDataset,
    ModelState,
    Tree,
)
from mosaic_jax.fl import prototypes
from mosaic_jax.stages.base import Context


def of_network(
    context: Context,
    client_models: ClientModels,
    global_model: ModelState,
    expert_model: dict[str, ModelState],
) -> tuple[types.Prototypes, int, int]:
    """Noisy means of classes, as logits of every expert.

    An image is in the mean of its class in each space, so they share the noise. Classes
    are those of the label counts that the client has sent.

    Args:
      context: of the stage, in a private study, for the clients of one network.
      client_models: theirs.
      global_model: the gate's.
      expert_model: the experts of each network.

    Returns:
      The prototypes in host memory; bytes of the experts that the clients receive; and
      bytes of the features and labels that they send.
    """
    data, space = context.clients, context.settings.prototypes.space
    num_experts = data.num_classes * len(expert_model)
    # The last one is the gate's.
    spaces = {"expert": num_experts + 1, "client": 2, "global": 1}[space]
    held = np.asarray(data.client.label_count) > 0
    client, label = np.nonzero(held)
    means = programs.jit(
        functools.partial(private_means, context), static_argnums=(0, 1)
    )
    heads = {name: programs.jit(one.head) for name, one in context.networks.items()}
    take = programs.jit(trees.take)

    def told(name: str, number: int, each: Tree = (), shared: Tree = ()) -> np.ndarray:
        key = prng.at(prng.named(context.key, "privacy"), number)
        return np.asarray(means(name, spaces, data, each, shared, key))[held]

    def logits(name: str, model: ModelState, feature: np.ndarray) -> np.ndarray:
        return np.asarray(heads[name](model, feature))

    own = context.name
    gate = told(next(iter(context.networks)), spaces - 1, shared=(global_model,))
    if space == "client":
        centre = told(own, 0, each=(client_models.model,))
    elif space == "global":
        centre = gate
    columns = []
    for i, (name, models) in enumerate(expert_model.items()):
        for k in range(data.num_classes):
            model = take(models, k)
            if space == "expert":
                centre = told(name, i * data.num_classes + k, shared=(model,))
            columns.append(logits(name, model, centre))
    result = types.Prototypes(
        logits=np.stack(columns, axis=1),
        gate_logits=logits(next(iter(context.networks)), global_model, gate),
        label=label.astype(np.int32),
        client=np.asarray(data.client.number)[client].astype(np.int32),
    )
    received = data.num_clients * trees.num_bytes(expert_model)
    shape = context.data.info.image_shape
    features = context.classifier.num_features(shape)
    if space == "expert":
        widths = [one.num_features(shape) for one in context.networks.values()]
        features = data.num_classes * sum(widths)
    return result, received, len(label) * (4 * features + result.label.itemsize)


def private_means(
    context: Context,
    name: str,
    spaces: int,
    data: FederatedDataset,
    each: Tree,
    shared: Tree,
    key: jax.Array,
) -> jax.Array:
    """Noisy means of the features of each client's classes.

    Args:
      context: of the stage, in a private study.
      name: of the network.
      spaces: in which the same images are told of, this one included.
      data: of all clients.
      each: (models,) of the clients, leaves [C, ...], or ().
      shared: (model,) of all clients, or ().
      key: random key of the space.

    Returns:
      [C, K, F].
    """
    mechanism = context.mechanism
    assert mechanism is not None

    def client_means(client: Client, *rest: Tree) -> Array:
        model, key, images = rest
        feature = prototypes.features(
            context.networks[name],
            model,
            client,
            images,
            batch_size=context.settings.evaluation.batch_size,
        )
        return mechanism.class_means(
            feature,
            images.label[client.index],
            client=client,
            spaces=spaces,
            key=prng.at(key, client.number),
        )

    return context.axis.map(
        client_means,
        data.client,
        *each,
        shared=(*shared, key),
        placed=(data.images,),
    )
