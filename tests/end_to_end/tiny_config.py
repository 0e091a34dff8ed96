"""The tiny study as a config file; `once`: four short stages without Mosaic's GANs."""

from tests import tiny


def get_config(variant=""):
    if variant == "once":
        return tiny.config(
            method="federated",
            init__rounds=1,
            warmup__rounds=1,
            finetune__rounds=1,
            evaluation__every=1,
            server__method="dense",
            server__when="once",
            server__rounds=1,
            methods__dense__batch_size=4,
            methods__dense__width=2,
            methods__dense__generator_steps=1,
            methods__dense__pool=1,
        )
    return tiny.config(warmup__rounds=2)
