"""Checks that all methods of a comparison run on equal terms."""

from collections.abc import Mapping, Sequence
from typing import Any

from mosaic_jax.core import errors, schema
from mosaic_jax.run.runner import Experiment

# Method to its studies, one for each seed, in the same order of seeds.
Studies = Mapping[str, Sequence[Experiment]]

EQUAL = ("data", "budgets", "local", "evaluation")
# Results of the first stage of rounds that must be equal as well.
RECORDED = ("initial_params_sha256", "batch_order_sha256")


def check_fair(studies: Studies) -> dict[str, Any]:
    """Check the settings and data of all methods, before anything runs.

    Returns:
      The common terms by name, for each seed as a string; JSON can represent them.

    Raises:
      ConfigError: data, split, model, local work, rounds or evaluation differ.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        terms_of = [_terms(experiment) for experiment in group]
        for name, terms in zip(studies, terms_of, strict=True):
            for term, value in terms.items():
                if value != terms_of[0][term]:
                    raise errors.ConfigError(
                        f"compare: {term} of {name} = {value}: must be"
                        f" {terms_of[0][term]}, as {next(iter(studies))} has it"
                    )
        shared[str(group[0].settings.seed)] = terms_of[0]
    return shared


def _terms(experiment: Experiment) -> dict[str, Any]:
    """What must be equal in all methods."""
    settings, data = experiment.settings, experiment.data
    groups = schema.to_mapping(settings)
    return {
        "seed": settings.seed,
        "split_sha256": data.sha256,
        "augmentation": data.info.augmentation,
        "total_rounds": settings.total_rounds,
        "clients_per_round": settings.init.clients_per_round,
        # A method may give every client a smaller network; its name in tables tells.
        "model": {n: value for n, value in groups["model"].items() if n != "rate"},
        **{name: groups[name] for name in EQUAL},
    }


def check_recorded(studies: Studies) -> dict[str, Any]:
    """Check the initial parameters and the order of batches of finished studies.

    Returns:
      The common digests by name, for each seed as a string.

    Raises:
      MosaicError: they differ between methods.
    """
    shared = {}
    for group in zip(*studies.values(), strict=True):
        recorded = [_recorded(experiment) for experiment in group]
        rates = [experiment.settings.model.rate for experiment in group]
        # Smaller networks have other initial parameters.
        whole = [r for r, rate in zip(recorded, rates, strict=True) if rate == 1]
        for key, compared in zip(RECORDED, (whole, recorded), strict=True):
            if len({results[key] for results in compared}) > 1:
                values = [results[key] for results in recorded]
                listed = dict(zip(studies, values, strict=True))
                raise errors.MosaicError(f"compare: {key} differs: {listed}")
        seed = str(group[0].settings.seed)
        shared[seed] = {key: (whole or recorded)[0][key] for key in RECORDED}
    return shared


def _recorded(experiment: Experiment) -> dict[str, Any]:
    """Results of the first stage of rounds."""
    for stage in experiment.finished():
        if all(key in stage.record.results for key in RECORDED):
            return stage.record.results
    raise errors.MosaicError(f"compare: {experiment.workdir}: has no finished rounds")
