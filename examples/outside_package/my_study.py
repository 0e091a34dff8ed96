"""A study from Python, with this folder's parts as objects: python my_study.py."""

import dataclasses

import my_algorithm
import my_data
import my_network
import numpy as np

import mosaic_jax as mj


def two_directions(
    labels: np.ndarray, num_clients: int, rng: np.random.RandomState
) -> list[np.ndarray]:
    """A partition: clients in turn share the first two classes, or the others."""
    groups = [rng.permutation(np.flatnonzero(labels // 2 == i)) for i in range(2)]
    return [groups[i % 2][i // 2 :: num_clients // 2] for i in range(num_clients)]


def doubt(logits: np.ndarray, labels: np.ndarray) -> float:
    """A metric: mean entropy of the softmax, in nats; labels do not matter."""
    del labels
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share = odds / odds.sum(axis=-1, keepdims=True)
    return float(-(share * np.log(share + 1e-12)).sum(axis=-1).mean())


@dataclasses.dataclass(frozen=True)
class GoodEnough(mj.Callback):
    """A callback: ends the rounds as soon as the loss is low enough."""

    loss: float = 0.1

    def may_stop(self, stage: str) -> bool:
        """In the first rounds."""
        return stage == "init"

    def on_round_end(self, state: mj.Round) -> bool:
        """Called whenever the global model was measured."""
        print(f"round {state.number}: loss {state.metrics['loss']:.3f}")
        return state.metrics["loss"] < self.loss


def main() -> None:
    """Run the study, or load what is finished of it, and use its model."""
    config = mj.configs.get(
        "digits_mosaic",
        method="federated",
        data={"num_clients": 4, "validation": 0.0, "client_test": "own"},
        local={"learning_rate": 0.1},
        init={"rounds": 100},
        finetune={"rounds": 0},
        evaluation={"every": 10},
    )
    study = mj.Study(
        config,
        "runs/my_study",
        model=my_network.PatchNet,
        algorithm=my_algorithm.ServerMomentum(momentum=0.3),
        data=my_data.stripes,
        partition=two_directions,
        metrics=["top_1", "macro_f1", doubt],
        callbacks=[GoodEnough(loss=0.25)],
    )
    result = study.run()
    print(result.metrics.models["final"]["test"])
    stripes = my_data.stripes(study.workdir).test_image[:5]
    print("classes", result.models["final"].predict(stripes))
    print(result.report())


if __name__ == "__main__":
    main()
