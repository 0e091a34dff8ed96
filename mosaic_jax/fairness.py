"""What methods that are compared must share, checked before and after they run."""

from collections.abc import Mapping, Sequence
from typing import Any

from mosaic_jax import errors, settings
from mosaic_jax.experiment import Experiment

# Method to its studies, one per seed, in the same order of seeds.
Studies = Mapping[str, Sequence[Experiment]]

EQUAL = ("data", "budgets", "local", "evaluation")
# Found when a study's first stage ran.
RECORDED = ("initial_params_sha256", "batch_order_sha256")


def check_fair(studies: Studies) -> dict[str, Any]:
    """What every method shares, before anything runs.

    Raises:
      ConfigError: data, split, model, local work, rounds or evaluation differ.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        found = [_terms(work) for work in group]
        for name, terms in zip(studies, found, strict=True):
            for term, value in terms.items():
                if value != found[0][term]:
                    raise errors.ConfigError(
                        f"compare: {term} of {name} = {value}: must be"
                        f" {found[0][term]}, as {next(iter(studies))} has it"
                    )
        shared[str(group[0].settings.seed)] = found[0]
    return shared


def _terms(work: Experiment) -> dict[str, Any]:
    groups = settings.to_mapping(work.settings)
    return {
        "seed": work.settings.seed,
        "split_sha256": work.data.sha256,
        "augmentation": work.data.info.augmentation,
        "total_rounds": work.settings.total_rounds,
        "clients_per_round": work.settings.init.clients_per_round,
        # A method may give everyone a smaller network; its table row says so.
        "model": {n: value for n, value in groups["model"].items() if n != "rate"},
        **{name: groups[name] for name in EQUAL},
    }


def check_recorded(studies: Studies) -> dict[str, Any]:
    """Initial parameters and batch order, as the finished programs recorded them.

    Raises:
      MosaicError: they differ between methods.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        found = [work.finished()[0].record["results"] for work in group]
        rates = [work.settings.model.rate for work in group]
        whole = [one for one, rate in zip(found, rates, strict=True) if rate == 1]
        for key, compared in zip(RECORDED, (whole, found), strict=True):
            if len({results[key] for results in compared}) > 1:
                values = [results[key] for results in found]
                listed = dict(zip(studies, values, strict=True))
                raise errors.MosaicError(f"compare: {key} differs: {listed}")
        seed = str(group[0].settings.seed)
        shared[seed] = {key: (whole or found)[0][key] for key in RECORDED}
    return shared
