"""Mosaic as the paper tells it, and as its published code computes it.

Of both only the mechanisms: which losses, networks and features. How many rounds and
steps there are, and how wide networks are, stays that of the study. Where the paper
says nothing, its form has what this library does by default; docs/methods.md tells what
is known.
"""

from collections.abc import Mapping
from typing import Any

from mosaic_jax.core import errors

# Every field that makes one form or the other: its value in each.
_FIELDS: Mapping[str, tuple[Any, Any]] = {
    # field: (paper, published)
    "generators.discriminator": ("classifier", "network"),
    "generators.augment": (False, True),
    "generators.entropy_weight": (1.0, 0.0),
    "generators.diversity_weight": (5.0, 5.0),
    "generators.inversion_weight": (0.01, 0.0),
    "generators.translate": (0, 0),
    "generators.ema_decay": (0.0, 0.0),
    "generators.collapse_below": (0.05, 0.0),
    "experts.local_steps": (0, 0),
    "prototypes.space": ("client", "global"),
    "prototypes.gathered": ("once", "every_round"),
    "meta.head": ("transformer", "transformer"),
    "meta.gate": ("global_topk", "none"),
    "refine.steps": (0, 0),
    "distill.pool": (0, 0),
    "distill.own_classes": (False, False),
    "distill.balanced": (False, False),
    "distill.focus": (0.0, 0.0),
    "distill.augment": ("none", "none"),
    "finetune.anchor": ("none", "none"),
    "finetune.max_drop": (0.01, 1.0),
    "distill.divergence": ("jsd", "logit_mean"),
    "compat.generators_first": (False, True),
    "compat.fresh_classifier": (False, True),
    "compat.classifier_batch_norm": ("eval", "train"),
    "compat.diversity_target": ("labels", "uniform"),
    "compat.value_range": ("signed", "normalised"),
    "compat.ema_debiased": (True, False),
}
FIELDS: Mapping[str, Mapping[str, Any]] = {
    form: {field: values[i] for field, values in _FIELDS.items()}
    for i, form in enumerate(("paper", "published"))
}
MEANING: Mapping[str, str] = {
    "paper": "as the paper tells it, as far as that is known",
    "published": "as its published code computes it, bugs left out",
}
# Rounds of the published study before its clients gather prototypes, and while they do.
_BEFORE, _GATHERING = 300, 41


def changes(study: Any, form: str) -> dict[str, Any]:
    """The settings in which a form of Mosaic differs from that of the study.

    Where prototypes are gathered in rounds of warm-up and the study has none, the last
    of its first rounds become these, as large a part of them as in the published study.

    Args:
      study: settings of a Mosaic study, or a ConfigDict of them.
      form: one of `FIELDS`.

    Returns:
      New values of fields by dotted name.

    Raises:
      ConfigError: there is no such form.
    """
    if form not in FIELDS:
        raise errors.ConfigError(
            f"compare = 'mosaic:{form}': ':{form}' must be one of"
            f" {', '.join(f':{name}' for name in FIELDS)}"
        )
    result = dict(FIELDS[form])
    gathers = result["prototypes.gathered"] == "every_round"
    if gathers and not study.warmup.rounds and study.init.rounds > 1:
        share = _GATHERING / (_BEFORE + _GATHERING)
        moved = max(1, round(share * study.init.rounds))
        result["init.rounds"] = study.init.rounds - moved
        result["warmup.rounds"] = moved
    return result
