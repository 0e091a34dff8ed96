"""The clients' own models after federated rounds, and how good they are."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mosaic_jax.core import programs, trees
from mosaic_jax.core.types import (
    Array,
    ClientModels,
    FederatedDataset,
    LabelledImages,
    ModelState,
    ServerState,
    Tree,
)
from mosaic_jax.fl import evaluation
from mosaic_jax.fl.parts import PartsOfNetwork
from mosaic_jax.nn import submodel
from mosaic_jax.stages import federation
from mosaic_jax.stages.base import Context, assess
from mosaic_jax.stages.rounds import Rounds


def client_models(context: Context, state: ServerState) -> ClientModels:
    """The model that each client has after the rounds.

    A client that never trained has the global model, or the part that it can hold.
    """
    never = np.flatnonzero(np.asarray(state.last_round) < 0)

    def filled(own: Array, whole: Array) -> Array:
        if not isinstance(own, np.ndarray):
            return own.at[never].set(whole)
        own[never] = whole
        return own

    model = state.client_model
    if len(never):
        whole = trees.broadcast(state.model, len(never))
        if context.rates:
            mask = federation.trained_masks(context, state.model, state.last_round)
            whole = submodel.within(whole, trees.take(mask, never))
        model = jax.tree.map(filled, model, whole)
    return ClientModels(model=model, last_round=state.last_round)


def accuracies(
    context: Context, state: ServerState, models: ClientModels | None
) -> list[float]:
    """Test accuracy of each client's own model, on the client's share of the test set.

    Args:
      context: of the stage.
      state: after the last round.
      models: the clients' models, where the study keeps them.

    Returns:
      [C] accuracies in [0, 1]; [] where clients have no models of their own.
    """
    if context.algorithm.personal:
        own = context.algorithm.personal_model
        return _accuracy(context, own, state.model, state.client)
    if models is not None:
        own = models.model
        return _accuracy(context, lambda _, own: own, state.model, own)
    return []


def report_columns(
    context: Context, stage: str, accuracy: list[float]
) -> dict[str, dict[int, str]]:
    """Columns of the report's table of clients: rates, attackers, own accuracies.

    Args:
      context: of the stage.
      stage: its name.
      accuracy: [C] in [0, 1], the result of `accuracies`.

    Returns:
      {column: {client: text}}.
    """
    number = context.data.clients.client.number.tolist()
    columns = {}
    if context.rates:
        columns["rate"] = dict(zip(number, map(str, context.rates), strict=True))
    if attackers := context.data.attackers:
        told = context.sending.outnumbered
        name = f"attacks ({told})" if told else "attacks"
        columns[name] = {i: "yes" for i in number if i in attackers}
    if accuracy:
        shown = (f"{100 * value:.2f} %" for value in accuracy)
        columns[f"own model after {stage}"] = dict(zip(number, shown, strict=True))
    return columns


def results_by_rate(
    context: Context, program: Rounds, model: ModelState, key: jax.Array, number: int
) -> dict[str, Any]:
    """Results about the parts of the global model that clients of each rate hold.

    Args:
      context: of the stage.
      program: the rounds.
      model: the global model after the round.
      key: random key of all rounds.
      number: of the round, over the study.

    Returns:
      "budgets", see `PartsOfNetwork.budgets`, and "rate_accuracy", the test accuracy of
      the part of each rate; {} where all clients hold the whole network.
    """
    if not isinstance(program.holdings, PartsOfNetwork):
        return {}
    return {
        "budgets": program.holdings.budgets(context.data.info.image_shape),
        "rate_accuracy": _rate_accuracy(context, program, model, key, number),
    }


def _rate_accuracy(
    context: Context, program: Rounds, model: ModelState, key: jax.Array, number: int
) -> dict[str, float]:
    """Test accuracy of the part of the global model for each rate.

    It is the part that the first client of that rate held in round `number`.
    """
    parts = program.holdings
    assert isinstance(parts, PartsOfNetwork)

    def logits(models: dict[str, ModelState], image: Array) -> dict[str, Array]:
        return {
            str(group.rate): parts.classifier_of(group.rate).logits(
                models[str(group.rate)], image
            )
            for group in parts.groups
        }

    @programs.jit
    def cut(
        data: FederatedDataset, key: jax.Array, model: ModelState
    ) -> dict[str, ModelState]:
        result = {}
        for group in parts.groups:
            first = group.members[0]
            channels = parts.channels(key, np.asarray(number), first, group.rate)
            part = parts.cut(model, channels)
            if parts.recalibrates:
                part = program.recalibrate_batch_norm(
                    data, key, part, data.client.size, group.rate
                )
            result[str(group.rate)] = part
        return result

    assessed = assess(context, logits, cut(context.clients, key, model))
    return {rate: result["test_accuracy"] for rate, result in assessed.items()}


def _accuracy(
    context: Context,
    model_of: Callable[[ModelState, Tree], ModelState],
    model: ModelState,
    client_state: Tree,
) -> list[float]:
    """Accuracy of each client's `model_of(model, own state)` on its test images."""
    axis, held_out = context.axis, context.held_out["test"]
    size = axis.num_devices * axis.at_once

    @programs.jit
    def evaluate_own(
        model: ModelState, own: Tree, rows: Array, test: LabelledImages
    ) -> Array:
        def evaluate_client(
            own: Tree, rows: Array, model: ModelState, test: LabelledImages
        ) -> Array:
            mine = model_of(model, own)
            logits = evaluation.predict(
                lambda x: context.classifier.logits(mine, x),
                test.image[rows],
                batch_size=context.settings.evaluation.batch_size,
            )
            return evaluation.accuracy(logits, test.label[rows])

        return axis.of(len(rows)).map(evaluate_client, own, rows, shared=(model, test))

    # As many at a time as train at once: all states may be too large for the devices.
    result = []
    for first in range(0, axis.num_clients, size):
        part = slice(first, first + size)
        own = axis.replicate(trees.take(client_state, part))
        rows = context.data.test_index[part]
        result += evaluate_own(model, own, rows, held_out).tolist()
    return result
