"""FedAvg as others run it: a PyTorch loop, pfl and Flower.

A worker, each rival in an environment of its own. Each takes the training, initial
weights, all images and labels as tensors, and the image numbers in order [rounds,
clients, images]; each returns the seconds of every round and the final weights.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_models


@dataclasses.dataclass(frozen=True)
class Training:
    """Network (of `torch_models.build`) and plain SGD."""

    network: str
    norm: str
    width: int
    batch_size: int
    learning_rate: float
    weight_decay: float

    def net(self) -> torch.nn.Module:
        """A fresh network."""
        return torch_models.build(self.network, self.width, self.norm)

    def local_steps(
        self, net: torch.nn.Module, image: torch.Tensor, label: torch.Tensor
    ) -> None:
        """One epoch of a client, batch after batch."""
        sgd = torch.optim.SGD(
            net.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        for i in range(0, len(label), self.batch_size):
            part = slice(i, i + self.batch_size)
            sgd.zero_grad()
            functional.cross_entropy(net(image[part]), label[part]).backward()
            sgd.step()


Rival = Callable[[Training, dict, tuple, np.ndarray], tuple[list[float], dict]]


def run_torch(
    training: Training, weights: dict, tensors: tuple, order: np.ndarray
) -> tuple[list[float], dict]:
    """The loop over clients that most papers' code has."""
    net = training.net()
    seconds = []
    for numbers in order:
        start = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for rows in numbers:
            net.load_state_dict(weights)
            training.local_steps(net, tensors[0][rows], tensors[1][rows])
            for name, value in net.state_dict().items():
                total[name] += value / len(numbers) if value.is_floating_point() else 0
        weights = total
        seconds.append(time.perf_counter() - start)
    return seconds, weights


class _ForPfl(torch.nn.Module):
    """The two methods that pfl calls, for any network."""

    @classmethod
    def of(cls, net: torch.nn.Module) -> torch.nn.Module:
        net.__class__ = type(cls.__name__, (cls, type(net)), {})
        return net

    def loss(self, image, label, eval=False):
        self.eval() if eval else self.train()
        return functional.cross_entropy(self(image), label)

    def metrics(self, image, label, eval=True):
        return {}


def run_pfl(
    training: Training, weights: dict, tensors: tuple, order: np.ndarray
) -> tuple[list[float], dict]:
    """apple/pfl-research in one process."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset as PflDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    num_clients = order.shape[1]
    seen = [0] * num_clients

    def user(i: int) -> PyTorchTensorDataset:
        rows = order[min(seen[i], len(order) - 1), i]
        seen[i] += 1
        return PyTorchTensorDataset((tensors[0][rows], tensors[1][rows]))

    times = []

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, *_, **__):
            times.append(time.perf_counter())
            return False, Metrics()

    net = _ForPfl.of(training.net())
    net.load_state_dict(weights)
    model = PyTorchModel(
        net,
        lambda params, lr: torch.optim.SGD(
            params, lr, weight_decay=training.weight_decay
        ),
        torch.optim.SGD(net.parameters(), lr=1.0),
    )
    users = PflDataset(
        user, get_user_sampler("minimize_reuse", list(range(num_clients)))
    )
    start = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(order),
            evaluation_frequency=10**6,
            train_cohort_size=num_clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, users, [WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=training.learning_rate,
            local_batch_size=training.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=training.batch_size),
        callbacks=[Clock()],
    )
    return np.diff([start, *times]).tolist(), net.state_dict()


@functools.cache
def _flower_data(folder: str) -> tuple:
    arrays = np.load(pathlib.Path(folder) / "data.npz")
    return (
        torch.tensor(arrays["image"]),
        torch.tensor(arrays["label"]),
        arrays["order"],
    )


def run_flower(
    training: Training, weights: dict, tensors: tuple, order: np.ndarray
) -> tuple[list[float], dict]:
    """Flower's simulation engine: one ray actor per core."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.app import RecordDict as Records
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    # The actors import this module.
    os.environ["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
    num_clients, folder = order.shape[1], tempfile.mkdtemp()
    np.savez(
        pathlib.Path(folder) / "data.npz",
        image=tensors[0].numpy(),
        label=tensors[1].numpy(),
        order=order,
    )
    client_app, server_app = ClientApp(), ServerApp()
    times, final = [], {}

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        image, label, orders = _flower_data(folder)
        number = int(message.content["config"]["server-round"]) - 1
        rows = orders[number, int(context.node_config["partition-id"])]
        net = training.net()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        training.local_steps(net, image[rows], label[rows])
        content = Records(
            {
                "arrays": ArrayRecord(net.state_dict()),
                "metrics": MetricRecord({"num-examples": len(rows)}),
            }
        )
        return Message(content=content, reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=num_clients,
            min_available_nodes=num_clients,
        )

        def clock(number: int, arrays: ArrayRecord) -> MetricRecord:
            times.append(time.perf_counter())
            return MetricRecord({"round": number})

        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(weights),
            num_rounds=len(order),
            train_config=ConfigRecord({}),
            evaluate_fn=clock,
        )
        final.update(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=num_clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return np.diff(times).tolist(), final


RIVALS: dict[str, Rival] = {"torch": run_torch, "pfl": run_pfl, "flower": run_flower}
WEIGHTS = "weights/"


def run(
    arrays: dict[str, np.ndarray], rival: str, **training: str | float
) -> dict[str, np.ndarray]:
    """Rounds of one rival.

    Args:
      arrays: image [N, D, H, W], normalised; label [N]; order [rounds, clients,
        images]; "weights/NAME": initial weights by their published names.
      rival: of `RIVALS`.
      training: the fields of `Training`.

    Returns:
      seconds [rounds], and "weights/NAME": final weights.
    """
    initial = {
        name.removeprefix(WEIGHTS): torch.tensor(value)
        for name, value in arrays.items()
        if name.startswith(WEIGHTS)
    }
    tensors = torch.tensor(arrays["image"]), torch.tensor(arrays["label"]).long()
    seconds, final = RIVALS[rival](
        Training(**training), initial, tensors, arrays["order"]
    )
    weights = {WEIGHTS + name: value.numpy() for name, value in final.items()}
    return {"seconds": np.asarray(seconds), **weights}
