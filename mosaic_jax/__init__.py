"""Federated learning among unlike clients, distilled without their data.

The public names below are imported when they are first used: `import mosaic_jax` alone
loads neither JAX nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_jax import configs as configs
    from mosaic_jax import data as data
    from mosaic_jax.api import metrics as metrics
    from mosaic_jax.api.comparison import Comparison as Comparison
    from mosaic_jax.api.comparison import compare as compare
    from mosaic_jax.api.model import Model as Model
    from mosaic_jax.api.result import Result as Result
    from mosaic_jax.api.result import load as load
    from mosaic_jax.api.study import Study as Study
    from mosaic_jax.data.dataset import Arrays as Arrays
    from mosaic_jax.fl.algorithms.base import Algorithm as Algorithm
    from mosaic_jax.run.callbacks import Callback as Callback
    from mosaic_jax.run.callbacks import EarlyStopping as EarlyStopping
    from mosaic_jax.run.callbacks import Round as Round
    from mosaic_jax.run.runner import Experiment as Experiment
    from mosaic_jax.run.settings import Settings as Settings
    from mosaic_jax.run.settings import from_mapping as from_mapping
    from mosaic_jax.run.summary import Summary as Summary
    from mosaic_jax.server.base import ServerTraining as ServerTraining
    from mosaic_jax.stages.base import Context as Context
    from mosaic_jax.stages.base import Outcome as Outcome
    from mosaic_jax.stages.base import Stage as Stage

__version__ = "0.2.0"

# Public name to the module that has it.
_HOMES = {
    "Algorithm": "fl.algorithms.base",
    "Arrays": "data.dataset",
    "Callback": "run.callbacks",
    "Comparison": "api.comparison",
    "Context": "stages.base",
    "EarlyStopping": "run.callbacks",
    "Experiment": "run.runner",
    "Model": "api.model",
    "Outcome": "stages.base",
    "Result": "api.result",
    "Round": "run.callbacks",
    "ServerTraining": "server.base",
    "Settings": "run.settings",
    "Stage": "stages.base",
    "Study": "api.study",
    "Summary": "run.summary",
    "compare": "api.comparison",
    "from_mapping": "run.settings",
    "load": "api.result",
}
# Public modules: configurations, functions that make data sets, metrics.
_MODULES = {"configs": "configs", "data": "data", "metrics": "api.metrics"}


def __getattr__(name: str) -> Any:
    """The public name, from the module that has it.

    Raises:
      AttributeError: there is none of that name.
    """
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
