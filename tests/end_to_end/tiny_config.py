"""The tiny study as a config file for launch.py."""

from tests import tiny


def get_config():
    return tiny.config(warmup__rounds=2)
