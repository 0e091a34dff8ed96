"""FedAvgM, FedAdagrad, FedAdam, FedYogi: the server steps by an optimiser of optax.

Reddi et al., ICLR 2021, "Adaptive federated optimization", algorithm 2; FedAvgM is by
Hsu et al., 2019.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import schema
from mosaic_jax.core.types import ModelState, Tree
from mosaic_jax.fl.algorithms.base import Algorithm


@dataclasses.dataclass(frozen=True)
class ServerOptimizer(Algorithm):
    """FedAvg whose mean change is minus the gradient that the server steps along.

    Batch-norm statistics are averaged. A further method is an `optimizer` here.
    """

    server_learning_rate: float = schema.above(
        0, default=1.0, meaning="eta, of the server's steps"
    )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The server's, from pseudo-gradients to changes of the parameters."""
        raise NotImplementedError

    def init_server(self, model: ModelState) -> Tree:
        """The optimiser's state."""
        return self.optimizer.init(model.params)

    def aggregate(
        self, server_state: Tree, model: ModelState, mean_upload: Tree, share: float
    ) -> tuple[Tree, ModelState]:
        """One step along the pseudo-gradient, `w - sum_i n_i w_i / sum_i n_i`."""
        del share
        slope = jax.tree.map(jnp.subtract, model.params, mean_upload.params)
        change, state = self.optimizer.update(slope, server_state, model.params)
        params = optax.apply_updates(model.params, change)
        return state, mean_upload.replace(params=params)


@dataclasses.dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """FedAvg with momentum on the server (Hsu et al., 2019)."""

    per_image = True

    momentum: float = schema.below_one(0.9, "beta, share of the last step in the next")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """`v <- beta v + g`, `w <- w - eta v`."""
        return optax.sgd(self.server_learning_rate, momentum=self.momentum)


@dataclasses.dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """What the adaptive methods of the paper share: tau, and its rate of steps."""

    server_learning_rate: float = schema.above(
        0, default=0.01, meaning="eta, of the server's steps; the paper tunes it"
    )
    tau: float = schema.above(
        0, default=1e-3, meaning="added to the root of v; the larger, the less adaptive"
    )


@dataclasses.dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """FedAvg with Adagrad on the server (Reddi et al., 2021)."""

    per_image = True

    server_learning_rate: float = schema.above(
        0, default=0.1, meaning="eta, of the server's steps; the paper tunes it"
    )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """`v <- v + g^2` from tau^2, `w <- w - eta g / sqrt(v + tau^2)`."""
        return optax.adagrad(
            self.server_learning_rate,
            initial_accumulator_value=self.tau**2,
            eps=self.tau**2,
        )


@dataclasses.dataclass(frozen=True)
class FedAdam(Adaptive):
    """FedAvg with Adam on the server (Reddi et al., 2021)."""

    per_image = True

    beta_1: float = schema.below_one(0.9, "share of the last mean gradient in the next")
    beta_2: float = schema.below_one(0.99, "likewise, of squares")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, with its correction of the first rounds' moments."""
        return optax.adam(
            self.server_learning_rate, self.beta_1, self.beta_2, eps=self.tau
        )


@dataclasses.dataclass(frozen=True)
class FedYogi(Adaptive):
    """FedAvg with Yogi on the server (Reddi et al., 2021)."""

    per_image = True

    beta_1: float = schema.below_one(0.9, "share of the last mean gradient in the next")
    beta_2: float = schema.below_one(0.99, "likewise, of squares")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """As Adam, with `v <- v - (1 - beta_2) g^2 sign(v - g^2)`."""
        return optax.yogi(
            self.server_learning_rate, self.beta_1, self.beta_2, eps=self.tau
        )
