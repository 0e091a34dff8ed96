"""Mosaic's teacher: class experts, gated, fused by a meta head."""

import dataclasses

import jax.numpy as jnp

from mosaic_jax import gating, models, parallel, settings
from mosaic_jax.classifier import Classifier
from mosaic_jax.models import meta
from mosaic_jax.types import Array, Experts, Teacher, Tree


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """How experts become one prediction.

    Attributes:
      networks: classifiers of the experts by name; the global model's first.
      head: module from expert logits [B, E, K] to logits [B, K].
      gate: a name of `gating.GATES`.
      gate_experts: experts that "global_topk" keeps per sample.
    """

    networks: dict[str, Classifier]
    head: models.Module
    gate: str
    gate_experts: int

    def logits(self, teacher: Teacher, image: Array) -> Array:
        """Teacher logits [B, K] of signed images [B, H, W, D]."""
        return self.fuse(teacher.meta_params, self.gated_logits(teacher, image))

    def gated_logits(self, teacher: Teacher, image: Array) -> Array:
        """[B, E, K] expert logits, gated where a gate is set."""
        expert_logits = self.expert_logits(teacher.experts, image)
        if self.gate == "none":
            return expert_logits
        return self.gated(expert_logits, self._global.logits(teacher.gate, image))

    def expert_logits(self, experts: dict[str, Experts], image: Array) -> Array:
        """[B, E, K] logits of each expert, one network's after the other's."""
        logits = [
            parallel.expert_map(
                lambda model, c=classifier: c.logits(model, image), experts[name].model
            )
            for name, classifier in self.networks.items()
        ]
        return jnp.concatenate(logits).transpose(1, 0, 2)

    @property
    def _global(self) -> Classifier:
        return next(iter(self.networks.values()))

    def gate_weight(self, teacher: Teacher, image: Array) -> Array:
        """[B, E] that the gate gives each expert, by the global model."""
        logits = self._global.logits(teacher.gate, image)
        return gating.global_topk(logits, self.gate_experts)

    def gated(self, expert_logits: Array, global_logits: Array) -> Array:
        """Expert logits [B, E, K] weighted by the gate."""
        if self.gate == "none":
            return expert_logits
        weight = gating.global_topk(global_logits, self.gate_experts)
        return gating.apply(expert_logits, weight)

    def fuse(
        self, meta_params: Tree, expert_logits: Array, dropout_key: Array | None = None
    ) -> Array:
        """Logits [B, K]; dropout is on where a key is given."""
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return self.head.apply(
            {"params": meta_params},
            expert_logits,
            train=dropout_key is not None,
            rngs=rngs,
        )

    def attention(self, meta_params: Tree, expert_logits: Array) -> Array | None:
        """[E, E] from expert to expert in the head's decoder; None: it has none."""
        if not isinstance(self.head, meta.TransformerHead):
            return None
        _, found = self.head.apply(
            {"params": meta_params},
            expert_logits,
            train=False,
            mutable=["intermediates"],
        )
        (weight,) = found["intermediates"]["decoder"]["multihead_attn"]["weight"]
        return jnp.mean(weight, axis=(0, 1))


def build(
    config: settings.Meta, networks: dict[str, Classifier], num_classes: int
) -> Ensemble:
    """The ensemble of a study."""
    head = meta.build(config.head, num_classes)
    return Ensemble(networks, head, config.gate, config.gate_experts)
