"""The teacher of Mosaic: class experts, weighted by a gate, fused by a meta head."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mosaic_jax.core.types import Array, Experts, Teacher, Tree
from mosaic_jax.fl import parallel
from mosaic_jax.nn import gating, meta
from mosaic_jax.nn.classifier import Classifier
from mosaic_jax.nn.networks import Module


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """The networks of the teacher.

    Attributes:
      networks: classifiers of the experts by name; that of the global model is first.
      head: module from expert logits [B, E, K] to logits [B, K].
      gate: a name of `gating.GATES`.
      gate_experts: experts that the gate "global_topk" keeps per sample.
    """

    networks: dict[str, Classifier]
    head: Module
    gate: str
    gate_experts: int

    def logits(self, teacher: Teacher, image: Array) -> Array:
        """Teacher logits [B, K] of signed images [B, H, W, D]."""
        return self.fuse(teacher.meta_params, self.gated_logits(teacher, image))

    def gated_logits(self, teacher: Teacher, image: Array) -> Array:
        """Expert logits [B, E, K] of signed images, weighted by the gate."""
        expert_logits = self.expert_logits(teacher.experts, image)
        if self.gate == "none":
            return expert_logits
        return self.gated(expert_logits, self._global.logits(teacher.gate, image))

    def expert_logits(self, experts: dict[str, Experts], image: Array) -> Array:
        """Logits [B, E, K] of the experts of all networks, network by network."""
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
        """Weights [B, E] of the experts by the gate, for signed images."""
        logits = self._global.logits(teacher.gate, image)
        return gating.global_topk(logits, self.gate_experts)

    def gated(self, expert_logits: Array, global_logits: Array) -> Array:
        """Expert logits [B, E, K] weighted by the gate of `global_logits` [B, K]."""
        if self.gate == "none":
            return expert_logits
        weight = gating.global_topk(global_logits, self.gate_experts)
        return gating.apply(expert_logits, weight)

    def fuse(
        self, meta_params: Tree, expert_logits: Array, dropout_key: Array | None = None
    ) -> Array:
        """Fuse the logits of the experts.

        Args:
          meta_params: parameters of the head.
          expert_logits: [B, E, K].
          dropout_key: random key of dropout, which is off without one.

        Returns:
          Logits [B, K].
        """
        rngs: Any = {} if dropout_key is None else {"dropout": dropout_key}
        logits: Any = self.head.apply(
            {"params": meta_params},
            expert_logits,
            train=dropout_key is not None,
            rngs=rngs,
        )
        return logits

    def attention(self, meta_params: Tree, expert_logits: Array) -> Array | None:
        """Mean attention [E, E] between experts in a transformer's decoder, or None."""
        if not isinstance(self.head, meta.TransformerHead):
            return None
        found: Any = self.head.apply(
            {"params": meta_params},
            expert_logits,
            train=False,
            mutable=["intermediates"],
        )[1]
        (weight,) = found["intermediates"]["decoder"]["multihead_attn"]["weight"]
        return jnp.mean(weight, axis=(0, 1))


def build(
    head: str,
    networks: dict[str, Classifier],
    num_classes: int,
    *,
    gate: str,
    gate_experts: int,
) -> Ensemble:
    """The ensemble of a study.

    Args:
      head: a name of `meta.HEADS`.
      networks: classifiers of the experts by name; that of the global model is first.
      num_classes: K.
      gate: a name of `gating.GATES`.
      gate_experts: experts that the gate "global_topk" keeps per sample.
    """
    return Ensemble(networks, meta.HEADS[head](num_classes), gate, gate_experts)
