"""Differential privacy of whole clients: what is cut, and what noise is added.

Each client's update is clipped, only the sum of all is seen, and it gets Gaussian noise
in proportion to the clip (DP-FedAvg: McMahan et al., 2018). The clip may follow a
quantile of the updates' norms (Andrew et al., 2021). Or each client adds the noise to
its own update, which then is private from the server too. What it costs is found in
`fl/accounting.py`; docs/privacy.md says what is covered.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mosaic_jax.core import prng
from mosaic_jax.core.types import Array, Tree
from mosaic_jax.fl import privacy, uploads
from mosaic_jax.fl.uploads import Parameters

# Deviation of the noise on the number of short updates, in participants of a round
# (Andrew et al., 2021, section 4).
COUNT_NOISE = 1 / 20


@dataclasses.dataclass(frozen=True)
class ClientMechanism:
    """What hides each client's update, the same for all of them.

    Attributes:
      clip: largest norm of an update, over all its parameters, at first.
      noise: deviation of the noise, over the clip; of the sum of all updates where the
        server adds it, else of each update.
      local: whether clients add the noise.
      quantile: of the norms, which the clip follows; 0: it stays.
      rate: of the change of the clip's logarithm.
      count_noise: deviation of the noise on the number of updates that are shorter than
        the clip.
    """

    clip: float
    noise: float
    local: bool = False
    quantile: float = 0.0
    rate: float = 0.0
    count_noise: float = 0.0

    @property
    def update_noise(self) -> float:
        """Deviation of the noise on updates, over the clip.

        Where the number of short updates is told as well, it is larger, so that both
        together tell as much as one sum with `noise` (theorem 1 of Andrew et al.).
        """
        if not self.quantile:
            return self.noise
        return (self.noise**-2 - (2 * self.count_noise) ** -2) ** -0.5

    def sent(
        self, update: Parameters, clip: Array, key: jax.Array
    ) -> tuple[Parameters, Array]:
        """What a client sends in place of its update.

        An update that is not finite counts as 0.

        Args:
          update: of the client.
          clip: [] of this round.
          key: random key of the client and the round, used for nothing else.

        Returns:
          The update, cut to the norm `clip` if it is longer, with its noise where
          clients add it; and, where the clip follows the norms, 1/2 if it was not
          longer, else -1/2 [].
        """
        norm = optax.tree.norm(update)
        finite = jnp.isfinite(norm)
        scale = jnp.where(finite, jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30)), 0)
        cut = jax.tree.map(lambda x: jnp.where(finite, scale * x, 0), update)
        if self.local:
            cut = privacy.noisy(cut, key, self.noise * clip)
        if not self.quantile:  # nothing else may tell of the norm
            return cut, jnp.zeros(())
        return cut, jnp.where(norm <= clip, 0.5, -0.5)

    def read(
        self, upload: Tree, reference: Tree, clip: Array, count: Array, key: jax.Array
    ) -> tuple[Tree, Array]:
        """What the server makes of the mean of what was sent.

        Args:
          upload: pair of the mean upload and the mean of what tells of its length.
          reference: upload of a client that has learnt nothing.
          clip: [] of this round.
          count: [] participants that the mean is of.
          key: random key of the round, used for nothing else.

        Returns:
          The upload with noise, and the clip [] of the next round.
        """
        mean, short = upload
        if self.local:
            return mean, clip
        update = uploads.update_of(mean, reference)
        deviation = self.update_noise * clip / count
        update = privacy.noisy(update, prng.named(key, "update"), deviation)
        if self.quantile:
            noise = jax.random.normal(prng.named(key, "count"))
            short = short + 0.5 + self.count_noise / count * noise
            clip = clip * jnp.exp(-self.rate * (short - self.quantile))
        return uploads.updated(mean, reference, update), clip
