"""Mosaic's teacher: class experts, gated, fused by a meta head."""

import dataclasses

import jax
import jax.numpy as jnp

from mosaic_jax import gating, models, parallel, settings
from mosaic_jax.classifier import Classifier
from mosaic_jax.models import meta
from mosaic_jax.types import Array, Experts, ModelState, Prototypes, Teacher, Tree


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """How experts become one prediction.

    Attributes:
      classifier: that the experts share.
      head: module from expert logits [B, E, K] to logits [B, K].
      gate: a name of `gating.GATES`.
      gate_experts: experts that "global_topk" keeps per sample.
    """

    classifier: Classifier
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
        return self.gated(expert_logits, self.classifier.logits(teacher.gate, image))

    def expert_logits(self, experts: Experts, image: Array) -> Array:
        """[B, E, K] logits of each expert."""
        logits = parallel.expert_map(
            lambda model: self.classifier.logits(model, image), experts.model
        )
        return logits.transpose(1, 0, 2)

    def prototype_logits(
        self, experts: Experts, gate: ModelState, prototypes: Prototypes
    ) -> Array:
        """[P, E, K]: each expert's last layer on the prototypes, gated."""
        num_experts = len(experts.present)
        shape = (len(prototypes.label), num_experts, prototypes.feature.shape[-1])
        feature = jnp.broadcast_to(prototypes.feature, shape)
        logits = jax.vmap(self.classifier.head, in_axes=(0, 1), out_axes=1)(
            experts.model, feature
        )
        on_global = self.classifier.head(gate, prototypes.gate_feature)
        return self.gated(logits, on_global)

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


def build(config: settings.Meta, classifier: Classifier, num_classes: int) -> Ensemble:
    """The ensemble of a study."""
    head = meta.build(config.head, num_classes)
    return Ensemble(classifier, head, config.gate, config.gate_experts)
