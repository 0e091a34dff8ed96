"""What a command runs: the studies of a comparison."""

import os
import subprocess
import sys

import pytest

from mosaic_jax.cli import compared
from mosaic_jax.core import errors
from mosaic_jax.run import settings
from mosaic_jax.run import study as studies
from tests import tiny


def two_methods(**fields):
    study = tiny.config(compare="fedavg,tests.own_parts:Shrink").to_dict()
    study["methods"] |= fields
    return study


def test_fields_of_one_method_are_not_unknown_to_the_others():
    study = settings.from_mapping(two_methods(Shrink={"by": 0.25}))
    fedavg, shrink = (
        studies.build(compared.study_of_method(study, name))
        for name in study.compare.split(",")
    )
    assert fedavg.server is None and "Shrink" not in fedavg.settings.methods
    assert shrink.server.by == 0.25
    # What belongs to nobody is still told.
    study = settings.from_mapping(two_methods(Shrnk={"by": 0.25}))
    with pytest.raises(errors.ConfigError, match="methods.Shrnk: unknown method"):
        studies.build(compared.study_of_method(study, "fedavg"))


# What a study's program does first, up to the settings, which see the devices.
START = """
import sys, jax
from mosaic_jax.cli import launch
launch.settings.from_mapping = lambda config: print(len(jax.devices())) or sys.exit()
launch.run({"compute": {"devices": int(sys.argv[1])}}, None)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
@pytest.mark.parametrize(
    ("asked", "there"), [(2, 2), pytest.param(0, 1, marks=pytest.mark.slow), (10**6, 1)]
)
def test_devices_are_made_of_cores(asked, there):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", START, str(asked)]
    env |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(there)], done.stderr


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("fedavg,mosaic:paper", "compare, mosaic:paper: generators.inversion_weight ="),
        ("fedavg,mosaic,fedavg", "compare = 'fedavg,mosaic,fedavg': must have every"),
    ],
)
def test_what_is_wrong_with_a_comparison_says_where(tmp_path, names, told):
    fields = {"model__name": "mlp", "generators__inversion_weight": 0.0}
    study = settings.from_mapping(tiny.config(compare=names, **fields).to_dict())
    with pytest.raises(errors.ConfigError) as caught:
        compared.by_method(study, tmp_path / "x", ())
    assert str(caught.value).startswith(told)
    assert not (tmp_path / "x").exists()
