"""What configurations share: every field with its default, and sizes for two cores.

The defaults stand with the parts of the library that read them: `mosaic list fields`
prints them all. They are the method of `docs/methods.md`, in the sizes of the published
CIFAR-10 study (10 clients, ResNet-18, 300 + 80 rounds).
"""

from ml_collections import config_dict

from mosaic_jax.run import methods, settings, variants

# Ends of the variants below: their alpha, meta epochs and steps of distillation, as the
# published code tells them for CIFAR-10.
_LENGTHS = {"": (0.01, 30, 1500), "_0.1": (0.1, 50, 2500), "_1.0": (1.0, 50, 2500)}
# Optimiser steps of an epoch there, whatever the number of prototypes.
META_EPOCH = 5
# Studies of full size as the paper tells them and as its code computes them.
ORIGINAL = tuple(f"{form}{end}" for form in variants.FIELDS for end in _LENGTHS)


def get_config() -> config_dict.ConfigDict:
    """The defaults; other configurations start from them."""
    return config_dict.ConfigDict(settings.defaults())


def for_two_cores() -> config_dict.ConfigDict:
    """The defaults with networks, rounds and steps for minutes on two CPU cores.

    To start from, like `get_config`: a function that takes no config cannot undo what a
    special one has set.
    """
    config = get_config()
    config.model.width = 8
    config.local.batch_size = 32
    config.local.learning_rate = 0.05
    config.init.rounds = 40
    config.warmup.rounds = 0
    config.generators.epochs = 0
    config.generators.steps = 500
    config.generators.batch_size = 32
    config.generators.learning_rate = 1e-3
    config.generators.ema_decay = 0.99
    config.prototypes.clusters = 30
    config.meta.steps = 4000
    config.distill.pool = 512
    config.distill.own_classes = True
    config.distill.balanced = True
    config.distill.steps = 200
    config.distill.learning_rate = 1e-3
    config.distill.schedule = "cosine"
    config.finetune.rounds = 6
    config.finetune.learning_rate = 0.01
    config.server.rounds = 30
    config.audit.reference_steps = 100
    # Rates and mu: docs/methods.md has the search.
    fields = config.methods
    fields.fedprox.mu = 1.0
    fields.fedrs.alpha = 0.9
    fields.feddf.steps = 7
    fields.feddf.samples_per_generator = 16
    fields.dense.batch_size = 64
    fields.dense.width = 16
    fields.coboosting.batch_size = 64
    fields.coboosting.width = 16
    fields.coboosting.student_learning_rate = 0.002
    fields.fedftg.iterations = 3
    fields.fedftg.width = 16
    fields.fedftg.student_steps = 2
    fields.fedftg.student_learning_rate = 0.003
    fields.dfrd.iterations = 3
    fields.dfrd.generator_steps = 1
    fields.dfrd.student_steps = 2
    fields.dfrd.student_learning_rate = 0.003
    fields.dfrd.width = 32
    fields.dfrd.generator_learning_rate = 1e-3
    return config


def original(config: config_dict.ConfigDict, variant: str) -> None:
    """Make a study that of one of `ORIGINAL`, in place, in the published lengths.

    `paper` and `published` have alpha 0.01; `paper_0.1`, `published_1.0` and so on the
    alpha that they say, and with it more meta epochs and steps of distillation. These
    stay as they are where `data.alpha` is set on the command line.
    """
    form, _, end = variant.partition("_")
    alpha, epochs, steps = _LENGTHS[f"_{end}" if end else ""]
    methods.choose(config, f"mosaic:{form}")
    config.data.alpha = alpha
    config.warmup.rounds = 41
    config.finetune.rounds = 39
    config.meta.steps = META_EPOCH * epochs
    config.distill.steps = steps
    if form == "published":
        config.generators.min_steps = 0


def known(variant: str, *variants: str) -> str:
    """`variant`, if it is one of `variants`.

    Raises:
      ValueError: it is not.
    """
    if variant not in variants:
        raise ValueError(f"{variant}: unknown variant; known: {', '.join(variants)}")
    return variant
