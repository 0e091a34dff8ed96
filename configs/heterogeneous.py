"""Clients with networks of several sizes, on every data set.

python launch.py --config configs/heterogeneous.py:digits
python launch.py --config configs/heterogeneous.py:digits:fedrolex
python launch.py --config configs/heterogeneous.py:digits:heterogeneous
python launch.py --config configs/heterogeneous.py:fashion_mnist:heterogeneous:small
"""

from ml_collections import config_dict

from mosaic_jax.configs import baselines

# Studies with a third of the clients at each of these rates: their networks are small.
# Elsewhere two of ten clients each have one of the default rates, 1 to 1/16.
THIRDS = (1.0, 0.5, 0.25)
WITH_THIRDS = (("digits", "default"), ("fashion_mnist", "small"))


def get_config(variant: str = "digits:mosaic+heterofl") -> config_dict.ConfigDict:
    """DATASET[:METHOD[:VARIANT]]: as `baselines.py`, for clients of several sizes.

    METHOD is mosaic+heterofl where none is given.
    """
    dataset, method, mosaic = baselines.parts(variant, method="mosaic+heterofl")
    config = baselines.of_mosaic(dataset, mosaic)
    if (dataset, mosaic) in WITH_THIRDS:
        config.budgets.rates = THIRDS
    return baselines.with_method(config, method)
