"""What a command runs: the studies of a comparison."""

import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors
from mosaic_jax.run import settings
from mosaic_jax.run import study as studies
from tests import tiny


def compared(**fields):
    study = tiny.config(compare="fedavg,tests.own_parts:Shrink").to_dict()
    study["methods"] |= fields
    return study


def test_fields_of_one_method_are_not_unknown_to_the_others():
    study = settings.from_mapping(compared(Shrink={"by": 0.25}))
    fedavg, shrink = (
        studies.build(launch.study_of_method(study, name))
        for name in study.compare.split(",")
    )
    assert fedavg.server is None and "Shrink" not in fedavg.settings.methods
    assert shrink.server.by == 0.25
    # What belongs to nobody is still told.
    study = settings.from_mapping(compared(Shrnk={"by": 0.25}))
    with pytest.raises(errors.ConfigError, match="methods.Shrnk: unknown method"):
        studies.build(launch.study_of_method(study, "fedavg"))
