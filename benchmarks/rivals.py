"""FedAvg as others run it: a PyTorch loop, pfl and Flower.

Each takes initial weights, the norm of the network, all images and labels as tensors,
and the image numbers [rounds, clients, images] in order; each returns the seconds of
every round and the final weights.
"""

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

WIDTH, BATCH, LEARNING_RATE, WEIGHT_DECAY = 16, 64, 0.01, 1e-4

Rival = Callable[[dict, str, tuple, np.ndarray], tuple[list[float], dict]]


def local_steps(net: torch.nn.Module, image, label) -> None:
    """One epoch of plain SGD, batch after batch."""
    sgd = torch.optim.SGD(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for i in range(0, len(label), BATCH):
        sgd.zero_grad()
        loss = functional.cross_entropy(net(image[i : i + BATCH]), label[i : i + BATCH])
        loss.backward()
        sgd.step()


def run_torch(weights: dict, norm: str, tensors: tuple, order: np.ndarray):
    """The loop over clients that most papers' code has."""
    net = torch_models.ResNet18(WIDTH, norm)
    seconds = []
    for numbers in order:
        start = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for rows in numbers:
            net.load_state_dict(weights)
            local_steps(net, tensors[0][rows], tensors[1][rows])
            for name, value in net.state_dict().items():
                total[name] += value / len(numbers) if value.is_floating_point() else 0
        weights = total
        seconds.append(time.perf_counter() - start)
    return seconds, weights


class _ForPfl(torch_models.ResNet18):
    """With the two methods that pfl calls."""

    def loss(self, image, label, eval=False):
        self.eval() if eval else self.train()
        return functional.cross_entropy(self(image), label)

    def metrics(self, image, label, eval=True):
        return {}


def run_pfl(weights: dict, norm: str, tensors: tuple, order: np.ndarray):
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

    net = _ForPfl(WIDTH, norm)
    net.load_state_dict(weights)
    model = PyTorchModel(
        net,
        lambda params, lr: torch.optim.SGD(params, lr, weight_decay=WEIGHT_DECAY),
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
            local_learning_rate=LEARNING_RATE,
            local_batch_size=BATCH,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
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


def run_flower(weights: dict, norm: str, tensors: tuple, order: np.ndarray):
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
        net = torch_models.ResNet18(WIDTH, norm)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        local_steps(net, image[rows], label[rows])
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


RIVALS: dict[str, Rival] = {
    "PyTorch loop": run_torch,
    "pfl": run_pfl,
    "Flower": run_flower,
}
