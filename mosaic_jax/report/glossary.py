"""What people read: names of methods and models as papers spell them, and terms."""

from collections.abc import Mapping
from typing import Any

from mosaic_jax import server
from mosaic_jax.core import schema
from mosaic_jax.fl import algorithms
from mosaic_jax.run.settings import Settings

# Each is shown beside the first place of the term in a table or figure.
TERMS: dict[str, str] = {
    "teacher": "all experts, fused by a head that is trained on class prototypes",
    "experts_mean": "the mean of the experts' logits: the teacher without its head",
    "diagonal": "each class is scored by its own expert: the teacher without its head",
    "distilled": "the student after distillation on generated images alone",
    "final": "the model that the study ends with",
    "finetune": "the student after further rounds on the clients' images",
    "personal": "each client's own model on test images of its own, mean over clients",
    "nearest_prototype": "the class whose prototype is nearest to an image's features",
    "expert": "the mean of the clients' models, weighted by their images of one class",
    "membership-inference AUC": "how well an attacker who sees generated images tells"
    " training images from others: 0.5 is chance, 1 is certainty",
    "padding waste": "processed samples for each one that trains: 1 is none wasted",
    "TFLOP": "10^12 additions and multiplications, those of the model counted;"
    " comparisons leave out what only measures, such as the audit",
    "compiling": "turning the program into machine code; kept, so that it is done once",
    "MB up": "megabytes that all clients together send to the server",
    "MB down": "megabytes that the server sends to all clients together",
    "spread": "the standard deviation over seeds, of a sample",
}


def algorithm(name: str) -> str:
    """A federated algorithm as people spell it, such as "FedAvg" for "fedavg"."""
    component = algorithms.ALGORITHMS.get(name)
    return component.__name__ if component else name


def of_server(name: str) -> str:
    """A server method as people spell it, such as "FedDF" for "feddf"."""
    component = server.METHODS.get(name)
    return component.__name__ if component else name


def method(settings: Settings | Mapping[str, Any]) -> str:
    """The method of a study as people spell it, such as "DENSE over FedProx".

    Args:
      settings: of the study, or what JSON keeps of them.
    """
    found = _mapping(settings)
    clients = algorithm(found["init"]["method"])
    if found["method"] == "mosaic":
        name = "Mosaic"
    elif found["server"]["method"] != "none":
        name = of_server(found["server"]["method"])
    else:
        return clients
    return name if clients == "FedAvg" else f"{name} over {clients}"


def model(name: str, settings: Settings | Mapping[str, Any]) -> str:
    """A model as people read it: that of the first rounds has its algorithm's name.

    Args:
      name: of the model in summaries and records, such as "init" or "init@cnn".
      settings: of the study, or what JSON keeps of them.
    """
    found = _mapping(settings)
    stage, at, network = name.partition("@")
    shown = {
        "init": algorithm(found["init"]["method"]),
        "warmup": f"{algorithm(found['init']['method'])}, further rounds",
    }.get(stage, stage)
    return f"{shown} ({network})" if at else shown


def stage(name: str, settings: Settings | Mapping[str, Any]) -> str:
    """A stage as people read it: beside the first rounds stands their algorithm.

    Args:
      name: of the stage, such as "init" or "init@cnn".
      settings: as of `model`.
    """
    shown = model(name, settings)
    rounds = name.partition("@")[0] in ("init", "warmup")
    return f"{name} ({shown.partition(' (')[0]})" if rounds else name


def used(text: str) -> dict[str, str]:
    """The terms that stand in a page's HTML, marked by their meaning."""
    return {name: told for name, told in TERMS.items() if f">{name}</abbr>" in text}


def meaning(term: str) -> str:
    """What a term means, "" where it is none; headings may say more than the term."""
    return TERMS.get(term.partition(",")[0].removeprefix("of these "), "")


def _mapping(settings: Settings | Mapping[str, Any]) -> Mapping[str, Any]:
    return settings if isinstance(settings, Mapping) else schema.to_mapping(settings)
