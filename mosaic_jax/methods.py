"""The methods that a study can be run with, by one name each."""

from collections.abc import MutableMapping
from typing import Any

# What `compare` = "all" stands for, in the order of tables.
COMPARED = (
    "fedavg",
    "fedprox",
    "fedbn",
    "fedrs",
    "dense",
    "fedftg",
    "dfrd",
    "mosaic",
)
# The same for clients with networks of several sizes, on the budgets of the study.
HETEROGENEOUS = (
    "fedavg@smallest",
    "fedavg",
    "heterofl",
    "fedrolex",
    "feddropout",
    "mosaic+heterofl",
    "mosaic+fedrolex",
    "mosaic+feddropout",
)
LISTS = {"all": COMPARED, "heterogeneous": HETEROGENEOUS}
# When the server trains, as each paper has it.
SERVER = {"dense": "once", "fedftg": "every_round", "dfrd": "every_round"}


def choose(config: MutableMapping[str, Any], name: str) -> None:
    """Turn a Mosaic study into one of method `name` on equal terms, in place.

    Data, seed, model, local work and the total number of rounds stay. One-shot methods
    train on the server between the rounds before and after, where Mosaic does. Any name
    but Mosaic's and those in `SERVER` is taken for a federated algorithm.

    Args:
      config: nested, of every field in configs/base.py.
      name: of the method; "METHOD+ALGORITHM" trains the clients by a federated
        algorithm, "METHOD@smallest" gives everyone the network of the smallest budget.
    """
    name, _, algorithm = name.partition("+")
    name, _, size = name.partition("@")
    if algorithm:
        config["init"]["method"] = algorithm
    if size == "smallest":
        config["model"]["rate"] = float(min(config["budgets"]["rates"]))
    if name == "mosaic":
        return
    config["method"] = "federated"
    if name in SERVER:
        config["server"]["method"] = name
        config["server"]["when"] = SERVER[name]
    else:
        config["init"]["method"] = name
    if SERVER.get(name) != "once":
        config["warmup"]["rounds"] += config["finetune"]["rounds"]
        config["finetune"]["rounds"] = 0
