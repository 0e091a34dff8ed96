"""Batch-norm statistics that clients are asked for (HeteroFL; Diao et al., 2021)."""

import jax
import jax.numpy as jnp

from mosaic_jax.core.types import (
    Array,
    Client,
    FederatedDataset,
    LabelledImages,
    ModelState,
    Tree,
)
from mosaic_jax.fl import parallel, training, workload
from mosaic_jax.nn import norm
from mosaic_jax.nn.classifier import Classifier


def of_clients(
    classifier: Classifier,
    axis: parallel.ClientAxis,
    data: FederatedDataset,
    key: Array,
    model: ModelState,
    weight: Array,
    *,
    local: training.Local,
    augmentation: str,
) -> ModelState:
    """`model` with the weighted mean of its moments on the clients' minibatches.

    Args:
      classifier: of the model.
      axis: of the clients.
      data: of all clients.
      key: of all rounds.
      model: whose statistics are asked for.
      weight: [C], not all 0, of the clients' answers.
      local: how many minibatches of a round, and of what size.
      augmentation: of the images.
    """

    def one(
        client: Client, weight: Array, shared: Tree, images: LabelledImages
    ) -> tuple[Tree, Tree]:
        model, key, total = shared
        count = workload.planned_steps(local, client.size)
        batch_at = training.client_batches(
            client,
            images,
            0,
            workload.most_steps(local, client.index.shape[-1]),
            key=key,
            batch_size=local.batch_size,
            augmentation=augmentation,
        )

        def step(number: Array, found: Tree) -> Tree:
            batch = batch_at(number)
            _, blended = classifier.train_logits(
                model.replace(batch_stats=found), batch.image, batch.mask
            )
            return jax.tree.map(
                lambda old, new: norm.cumulative(old, new, number), found, blended
            )

        found = jax.lax.fori_loop(0, count, step, model.batch_stats)
        return (), jax.tree.map(lambda leaf: leaf * (weight / total), found)

    weight = jnp.asarray(weight, jnp.float32)
    _, statistics = axis.map_and_sum(
        one,
        data.client,
        weight,
        shared=((model, key, jnp.sum(weight)),),
        placed=(data.images,),
    )
    return model.replace(batch_stats=statistics)
