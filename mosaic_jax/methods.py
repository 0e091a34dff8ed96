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
# When the server trains, as each paper has it.
SERVER = {"dense": "once", "fedftg": "every_round", "dfrd": "every_round"}


def choose(config: MutableMapping[str, Any], name: str) -> None:
    """Turn a Mosaic study into one of method `name` on equal terms, in place.

    Data, seed, model, local work and the total number of rounds stay. One-shot methods
    train on the server between the rounds before and after, where Mosaic does. Any name
    but those in `COMPARED` is taken for a federated algorithm.

    Args:
      config: nested, of every field in configs/base.py.
      name: of the method.
    """
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
