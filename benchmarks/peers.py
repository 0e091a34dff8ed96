"""FedAvg, SCAFFOLD, FedAdam and MOON as pfl and fluke have them.

A worker, each peer in an environment of its own. The algorithms are the peers' own
classes; what is handed to them is the initial model, and who trains in each round on
which minibatches.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_models

WEIGHTS = "weights/"


@dataclasses.dataclass(frozen=True)
class Terms:
    """Local SGD, the server's optimiser, and the network.

    Attributes:
      width: of the CNN, with group-norm.
      learning_rate: of the clients.
      weight_decay: likewise.
      batch_size: likewise.
      server_learning_rate: of FedAdam.
      tau: likewise, added to the root.
      beta_1: likewise.
      beta_2: likewise.
      mu: of MOON.
      temperature: likewise.
      checked: a round after which weights are compared.
    """

    width: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    server_learning_rate: float
    tau: float
    beta_1: float
    beta_2: float
    mu: float
    temperature: float
    checked: int


class Schedule:
    """Who trains in each round, and on what.

    Attributes:
      size: [C] images of each client.
      who: [R, m] numbers of the clients of each round, ascending.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.size, self.who = arrays["size"], arrays["who"]
        self._rows, self._mask = arrays["rows"], arrays["mask"]
        self._image = torch.tensor(arrays["image"])
        self._label = torch.tensor(arrays["label"]).long()

    def batches(self, number: int, client: int) -> list[tuple[torch.Tensor, ...]]:
        """Minibatches (images, labels) of `client` in round `number`."""
        (place,) = np.flatnonzero(self.who[number] == client)
        rows, mask = self._rows[number, place], self._mask[number, place]
        kept = [row[counts] for row, counts in zip(rows, mask, strict=True)]
        return [(self._image[row], self._label[row]) for row in kept]


class Net(torch_models.CNN):
    """With what pfl calls, `loss` and `metrics`, and fluke, `encoder` and `head`."""

    def loss(self, image, label, eval=False):
        self.eval() if eval else self.train()
        return functional.cross_entropy(self(image), label)

    def metrics(self, image, label, eval=True):
        return {}

    def encoder(self, image):
        return self.features(image)

    def head(self, features):
        return self.fc(features)


@dataclasses.dataclass
class Watch:
    """What is kept of rounds: processor time at their ends, the model after one."""

    net: torch.nn.Module
    checked: int
    times: list[float] = dataclasses.field(
        default_factory=lambda: [time.process_time()]
    )
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def end_round(self) -> None:
        self.times.append(time.process_time())
        if len(self.times) - 1 == self.checked:
            found = {WEIGHTS + n: v.numpy() for n, v in self.net.state_dict().items()}
            self.weights = {name: value.copy() for name, value in found.items()}


Peer = Callable[[Terms, str, Net, Schedule], Watch]


def run_pfl(terms: Terms, algorithm: str, net: Net, schedule: Schedule) -> Watch:
    """apple/pfl-research in one process; weighted by users for SCAFFOLD."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints, WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.user_state import InMemoryUserStateStorage
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    rounds, num_clients = schedule.who.shape
    scaffold = algorithm == "scaffold"

    class Batches(Dataset):
        """A client's minibatches of a round, in one epoch."""

        def __len__(self) -> int:
            """Images, its weight; SCAFFOLD, without weights, counts steps by it."""
            batches, size = self.raw_data
            return len(batches) * terms.batch_size if scaffold else size

        def iter(self, batch_size: int | None) -> Iterator:
            yield from self.raw_data[0]

    turns = (
        (number, client)
        for number, chosen in enumerate(schedule.who)
        for client in chosen
    )

    def user(turn: tuple[int, int]) -> Batches:
        number, client = turn
        batches, size = schedule.batches(number, client), int(schedule.size[client])
        return Batches((batches, size), user_id=str(client))

    watch = Watch(net, terms.checked)

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, *_, **__):
            watch.end_round()
            return False, Metrics()

    central = torch.optim.SGD(net.parameters(), lr=1.0)
    if algorithm == "fedadam":
        central = torch.optim.Adam(
            net.parameters(),
            terms.server_learning_rate,
            (terms.beta_1, terms.beta_2),
            terms.tau,
        )
    model = PyTorchModel(
        net,
        lambda params, lr: torch.optim.SGD(params, lr, weight_decay=terms.weight_decay),
        central,
    )
    users = FederatedDataset(user, lambda: next(turns))
    params = {
        "central_num_iterations": rounds,
        "evaluation_frequency": 10**6,
        "train_cohort_size": num_clients,
        "val_cohort_size": 0,
    }
    if scaffold:
        kind = SCAFFOLD()
        algorithm_params = SCAFFOLDParams(
            **params,
            population=len(schedule.size),
            use_gradient_as_control_variate=False,
            user_state_storage=InMemoryUserStateStorage(),
        )
    else:
        kind, algorithm_params = FederatedAveraging(), NNAlgorithmParams(**params)
    weighting = WeightByUser() if scaffold else WeightByDatapoints()
    watch.times = [time.process_time()]
    kind.run(
        algorithm_params=algorithm_params,
        backend=SimulatedBackend(users, users, [weighting]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=terms.learning_rate,
            local_batch_size=terms.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=terms.batch_size),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return watch


def run_fluke(terms: Terms, algorithm: str, net: Net, schedule: Schedule) -> Watch:
    """makgyver/fluke; weighted by images but for SCAFFOLD.

    Its FedOpt moves the model by the server's rate before Adam sees the difference, so
    that its tau counts as tau / rate: it is handed tau * rate.
    """
    # torchvision registers kernels of operators that it lacks beside a PyTorch for
    # CPUs; nothing here calls them.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    if not torch.version.cuda and "torchvision" not in sys.modules:
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float at) -> Tensor")
    from fluke import FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.algorithms.fedopt import FedOpt
    from fluke.algorithms.moon import MOON
    from fluke.algorithms.scaffold import SCAFFOLD
    from fluke.data import FastDataLoader
    from fluke.utils import FederationObserver

    kinds = {"fedavg": FedAVG, "scaffold": SCAFFOLD, "fedadam": FedOpt, "moon": MOON}
    rounds, num_clients = schedule.who.shape
    total = len(schedule.size)

    class Loader(FastDataLoader):
        """A client's minibatches of the round, in one epoch."""

        number = 0

        def __init__(self, client: int) -> None:
            images = torch.zeros(int(schedule.size[client]))
            super().__init__(
                images, num_labels=1, batch_size=terms.batch_size, skip_singleton=False
            )
            self.client = client

        def __len__(self) -> int:
            return schedule_length

        def __iter__(self) -> Iterator:
            return iter(schedule.batches(Loader.number, self.client))

    schedule_length = len(schedule.batches(0, int(schedule.who[0, 0])))

    class Split:
        """Takes the place of fluke's splitter: the split is given."""

        def assign(self, n_clients: int, batch_size: int) -> tuple:
            return ([Loader(i) for i in range(n_clients)], [None] * n_clients), None

    server: dict[str, str | float] = {"weighted": algorithm != "scaffold"}
    client: dict[str, float] = {}
    if algorithm == "fedadam":
        rate = terms.server_learning_rate
        server |= {"mode": "adam", "lr": rate, "tau": terms.tau * rate}
        server |= {"beta1": terms.beta_1, "beta2": terms.beta_2}
    if algorithm == "moon":
        client = {"mu": terms.mu, "tau": terms.temperature}
    FlukeENV().set_eval_cfg(server=False)
    federation = kinds[algorithm](
        n_clients=total,
        data_splitter=Split(),
        hyper_params={
            "client": {
                "batch_size": terms.batch_size,
                "local_epochs": 1,
                "loss": "CrossEntropyLoss",
                "optimizer": {
                    "name": "SGD",
                    "lr": terms.learning_rate,
                    "weight_decay": terms.weight_decay,
                },
                "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
                **client,
            },
            "server": server,
            "model": net,
        },
    )
    watch = Watch(net, terms.checked)

    def chosen(_: float) -> list:
        return [federation.clients[i] for i in schedule.who[Loader.number]]

    class Clock(FederationObserver):
        def end_round(self, round: int) -> None:
            watch.end_round()
            Loader.number += 1

    federation.server.get_eligible_clients = chosen
    federation.set_callbacks([Clock()])
    watch.times = [time.process_time()]
    federation.run(rounds, num_clients / total, finalize=False)
    assert federation.server.model is net
    return watch


PEERS: dict[str, Peer] = {"pfl": run_pfl, "fluke": run_fluke}


def run(
    arrays: dict[str, np.ndarray], peer: str, algorithm: str, **terms: float
) -> dict[str, np.ndarray]:
    """Rounds of one peer.

    Args:
      arrays: image [N, D, H, W] and test_image, normalised; label [N] and test_label;
        size [C]; who [R, m]; rows and mask [R, m, steps, B], image numbers of
        minibatches; "weights/NAME": initial weights by their published names.
      peer: of `PEERS`.
      algorithm: "fedavg", "scaffold", "fedadam" or "moon".
      terms: the fields of `Terms`.

    Returns:
      seconds [R] of the processor; accuracy [] on the test images; and "weights/NAME":
      weights after round `checked`.
    """
    weights = {n: v for n, v in arrays.items() if n.startswith(WEIGHTS)}
    chosen = Terms(**terms)
    net = Net(chosen.width, "group", arrays["image"].shape[1])
    net.load_state_dict(
        {n.removeprefix(WEIGHTS): torch.tensor(v) for n, v in weights.items()}
    )
    watch = PEERS[peer](chosen, algorithm, net, Schedule(arrays))
    assert len(watch.times) == len(arrays["who"]) + 1
    net.eval()
    with torch.no_grad():
        parts = torch.tensor(arrays["test_image"]).split(500)
        found = torch.cat([net(part).argmax(1) for part in parts]).numpy()
    accuracy = np.mean(found == arrays["test_label"])
    assert math.isfinite(sum(float(value.sum()) for value in net.state_dict().values()))
    return {
        "seconds": np.diff(watch.times),
        "accuracy": np.asarray(accuracy),
        **watch.weights,
    }
