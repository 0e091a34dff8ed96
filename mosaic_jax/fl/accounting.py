"""How much noise a client's images need, and what then may be told of one of them.

All that a client sends is made of Gaussian mechanisms, each with noise of the client's
noise multiplier times its sensitivity: Poisson-subsampled ones for steps of training,
plain ones for what is sent once. They are composed by privacy loss distributions
(Koskela et al., 2020; Doroshenko et al., 2022), for one image added or removed, by
`dp-accounting`. docs/privacy.md has the terms.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import numpy as np
from scipy import optimize, stats

from mosaic_jax.core import errors
from mosaic_jax.fl import client_privacy, privacy
from mosaic_jax.fl.client_privacy import ClientMechanism
from mosaic_jax.fl.privacy import Mechanism, Privacy

_log = logging.getLogger(__name__)

# Seconds of the search for noise without a word.
_SILENCE = 4.0
# Part of delta that is kept for Poisson batches with more images than rows.
OVERFLOW_SHARE = 0.01
# Rows of a batch are a multiple of this.
_ROWS = 8
# Between privacy losses of the grid, over the deviation of one mechanism's loss: losses
# are rounded up, and a finer grid moves epsilon by less than 1 %.
_INTERVAL = 0.08
# Orders of the Renyi divergences of draws without replacement.
_ORDERS = (*range(2, 65), 72, 80, 96, 128, 192, 256, 512)
# Of noise multipliers, relative.
_TOLERANCE = 1e-3
# Between these noise multipliers it is searched for.
_LEAST, _MOST = 0.02, 1e9


@dataclasses.dataclass(frozen=True)
class Release:
    """What clients tell of their images, as part of something that they send.

    Attributes:
      payload: what they send.
      count: [C] int, how often each client does so.
      batch_size: expected number of images that each is about, drawn anew; None: all.
    """

    payload: str
    count: np.ndarray
    batch_size: int | None = None

    def of(self, members: np.ndarray) -> "Release":
        """Of the clients `members` [m] int alone."""
        count = np.zeros_like(self.count)
        count[members] = self.count[members]
        return dataclasses.replace(self, count=count)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The noise of a private study, and what it is worth.

    Attributes:
      mechanism: of single images, what is the same for all clients.
      noise: [C], noise multiplier of each client; 0 where it tells nothing.
      epsilon: [C], what all that a client sends tells of one of its images.
      delta: of all these numbers, what full batches leave out included.
      by_payload: [C], epsilon of each payload by itself.
      neighbours: what is private: in words, how two data sets differ that can hardly be
        told apart.
      of_clients: what hides each client; None: single images are hidden.
    """

    mechanism: Mechanism | None
    noise: tuple[float, ...]
    epsilon: tuple[float, ...]
    delta: float
    by_payload: dict[str, tuple[float, ...]]
    neighbours: str = "what one image tells (how many there are is public)"
    of_clients: ClientMechanism | None = None


# (chance that an image is drawn, how often): what a client does, for the accountant.
Uses = tuple[tuple[float, int], ...]


def plan(config: Privacy, sizes: np.ndarray, releases: Sequence[Release]) -> Plan:
    """The least noise with which no client tells more than `config.epsilon`.

    Args:
      config: `privacy` of the study, with epsilon > 0.
      sizes: [C] int, images of each client.
      releases: all that clients tell of their images.

    Raises:
      ConfigError: `dp-accounting` is not installed, delta is not small enough, or no
        noise is enough.
    """
    _accountants()
    if config.delta * max(sizes) >= 1:
        raise errors.ConfigError(
            f"privacy.delta = {config.delta}: must be < 1 / {max(sizes)}, one in the"
            " images of the largest client"
        )
    drawn: dict[int, np.ndarray] = {}
    for one in releases:
        if one.batch_size is not None:
            steps = drawn.get(one.batch_size, np.zeros(len(sizes), int))
            drawn[one.batch_size] = steps + one.count
    # Where two neighbours both leave images out with chance p, what holds for all
    # others with (epsilon, delta) holds with delta + (1 + e^epsilon) p.
    log_chance = math.log(config.delta) + math.log(OVERFLOW_SHARE)
    log_chance -= np.logaddexp(0.0, config.epsilon)
    log_chance -= math.log(max(1, sum(steps.max() for steps in drawn.values())))
    rows = tuple(
        (batch_size, max(rows_for(int(n), batch_size, log_chance) for n in set(sizes)))
        for batch_size in sorted(drawn)
    )
    delta = config.delta * (1 - OVERFLOW_SHARE)
    payloads = list(dict.fromkeys(one.payload for one in releases))
    noise, epsilon = [], []
    by_payload: dict[str, list[float]] = {payload: [] for payload in payloads}
    _log.info("privacy: searching for the noise of %d clients", len(sizes))
    said = time.monotonic()
    for i, size in enumerate(sizes):
        if time.monotonic() - said > _SILENCE:
            said = time.monotonic()
            _log.info("privacy: noise of %d of %d clients found", i, len(sizes))
        uses = {p: _uses(releases, i, int(size), p) for p in payloads}
        every = _merged(use for of_payload in uses.values() for use in of_payload)
        noise.append(_enough(config, noise_multiplier(config.epsilon, delta, every)))
        epsilon.append(spent(noise[-1], delta, every))
        for payload, of_payload in uses.items():
            by_payload[payload].append(spent(noise[-1], delta, of_payload))
    return Plan(
        mechanism=Mechanism(config.clip, config.prototype_clip, rows),
        noise=tuple(noise),
        epsilon=tuple(epsilon),
        delta=config.delta,
        by_payload={name: tuple(values) for name, values in by_payload.items()},
    )


def plan_of_clients(
    config: Privacy, *, num_clients: int, participants: int, rounds: int
) -> Plan:
    """The least noise with which the models of all rounds tell no more of a client.

    Where all clients take part in every round, two neighbours are with and without one
    client's update, which moves the sum by the clip. Where some do, the draw without
    replacement is counted by its Renyi divergences (Wang, Balle and Kasiviswanathan,
    2019), for one client that is replaced by another: that moves it by twice the clip.
    Where clients add the noise, any two updates of one client may be told apart no
    better, in as many rounds as there are, and no draw helps.

    Args:
      config: `privacy` of the study, with epsilon > 0 and unit "client".
      num_clients: C.
      participants: in a round.
      rounds: in which models are told.

    Raises:
      ConfigError: `dp-accounting` is not installed, delta is not small enough, no noise
        is enough, or the clip follows the norms and there are too few participants.
    """
    _accountants()
    if config.delta * num_clients >= 1:
        raise errors.ConfigError(
            f"privacy.delta = {config.delta}: must be < 1 / {num_clients}, one in the"
            " clients"
        )
    local = config.noised_by == "client"
    uses: Uses = ((1.0, rounds),)
    moved = 1.0
    if local:
        neighbours, moved = "a client's images, for any others", 2.0
    elif participants == num_clients:
        neighbours = "a client's part"
    else:
        neighbours, moved = "a client, for another", 2.0
    _log.info("privacy: searching for the noise of %d rounds", rounds)
    noise = _enough(config, noise_multiplier(config.epsilon, config.delta, uses))
    epsilon = spent(noise, config.delta, uses)
    if participants < num_clients and not local:
        # The draw's bound may take more than the draw gives, then it is left out.
        of_drawn = functools.partial(
            spent_of_drawn,
            delta=config.delta,
            num_clients=num_clients,
            participants=participants,
            rounds=rounds,
        )
        less = _least_noise(of_drawn, config.epsilon, noise)
        if less < noise:
            noise, epsilon = less, of_drawn(less)
    count_noise = (
        client_privacy.COUNT_NOISE * participants if config.clip_quantile else 0.0
    )
    if config.clip_quantile and noise * moved >= 2 * count_noise:
        raise errors.ConfigError(
            f"privacy.clip_quantile = {config.clip_quantile}: must be 0 for"
            f" {participants} clients in a round and privacy.epsilon ="
            f" {config.epsilon}: the noise would hide their norms"
        )
    return Plan(
        mechanism=None,
        noise=(noise * moved,) * num_clients,
        epsilon=(epsilon,) * num_clients,
        delta=config.delta,
        by_payload={"models": (epsilon,) * num_clients},
        neighbours=neighbours,
        of_clients=ClientMechanism(
            clip=config.clip,
            noise=noise * moved,
            local=local,
            quantile=config.clip_quantile,
            rate=config.clip_rate,
            count_noise=count_noise,
        ),
    )


def _enough(config: Privacy, noise: float) -> float:
    """`noise`, if there is any that is enough.

    Raises:
      ConfigError: there is none.
    """
    if math.isinf(noise):
        raise errors.ConfigError(
            f"privacy.epsilon = {config.epsilon}, privacy.delta = {config.delta}: one"
            " must be larger: no noise is enough"
        )
    return noise


@functools.cache
def spent_of_drawn(
    noise: float, delta: float, num_clients: int, participants: int, rounds: int
) -> float:
    """Epsilon of rounds in which some of the clients are drawn without replacement.

    Args:
      noise: deviation of the noise, over how far one client moves the sum.
      delta: with which the epsilon holds.
      num_clients: C.
      participants: in a round.
      rounds: number of rounds.
    """
    dp, rdp, _ = _accountants()
    gaussian = dp.GaussianDpEvent(noise)
    drawn = dp.SampledWithoutReplacementDpEvent(num_clients, participants, gaussian)
    accountant = rdp.RdpAccountant(_ORDERS, dp.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp.SelfComposedDpEvent(drawn, rounds))
    return float(accountant.get_epsilon(delta))


def _uses(releases: Sequence[Release], client: int, size: int, payload: str) -> Uses:
    """What a client with `size` images does for a payload."""
    return _merged(
        (1.0 if one.batch_size is None else chance(size, one.batch_size), count)
        for one in releases
        if one.payload == payload and (count := int(one.count[client]))
    )


def _merged(uses: Iterable[tuple[float, int]]) -> Uses:
    """The same with one entry for each chance, in ascending order."""
    total: dict[float, int] = {}
    for share, count in uses:
        total[share] = total.get(share, 0) + count
    return tuple(sorted(total.items()))


def chance(size: int, batch_size: int) -> float:
    """At most this often is one of `size` images in a batch, as devices draw it.

    They compare multiples of 1 / `DRAWS` with `privacy.rate`, which devices may round
    either way: this is the next multiple but one.
    """
    share = float(privacy.rate(np.asarray(size), batch_size))
    if share == 1:
        return 1.0
    return min(1.0, (math.ceil(share * privacy.DRAWS) + 1) / privacy.DRAWS)


def rows_for(size: int, batch_size: int, log_chance: float) -> int:
    """Rows that a batch needs so that it hardly ever has more images.

    Args:
      size: images of the client; its neighbour with one more counts too.
      batch_size: expected number of images.
      log_chance: logarithm of the probability with which it may.
    """
    number, share = size + 1, chance(size, batch_size)
    low, high = 0, number  # more than all of them there never are
    while low < high:
        middle = (low + high) // 2
        if stats.binom.logsf(middle, number, share) <= log_chance:
            high = middle
        else:
            low = middle + 1
    return -(-low // _ROWS) * _ROWS


def noise_multiplier(epsilon: float, delta: float, uses: Uses) -> float:
    """The least noise multiplier of a client; 0 where it tells nothing.

    Infinite where no noise is enough.

    Args:
      epsilon: that it may spend.
      delta: likewise.
      uses: of its images.
    """
    if not uses:
        return 0.0
    return _least_noise(lambda noise: spent(noise, delta, uses), epsilon)


def _least_noise(
    spent: Callable[[float], float], epsilon: float, most: float = _MOST
) -> float:
    """The least noise, up to `_TOLERANCE`, that spends no more than `epsilon`.

    Infinite where `most` is not enough.

    Args:
      spent: epsilon of a noise, which falls with it; answers are kept.
      epsilon: that may be spent.
      most: noise to search up to.
    """
    high = min(1.0, most)
    while spent(high) > epsilon:
        if high == most:
            return math.inf
        high = min(2 * high, most)
    low = high / 2
    while spent(low) <= epsilon:
        if low < _LEAST:
            return low
        low, high = low / 2, low
    # Of too little noise epsilon may be infinite.
    noise = optimize.root_scalar(
        lambda noise: min(spent(noise), 10 * epsilon) - epsilon,
        bracket=(low, high),
        rtol=_TOLERANCE,
    ).root
    while spent(noise) > epsilon:
        noise = min(noise * (1 + _TOLERANCE), high)
    return noise


@functools.cache
def spent(noise: float, delta: float, uses: Uses) -> float:
    """Epsilon of what a client tells with this noise multiplier.

    Args:
      noise: the multiplier.
      delta: with which the epsilon holds.
      uses: of its images.
    """
    if not uses:
        return 0.0
    dp, _, pld = _accountants()
    gaussian = dp.GaussianDpEvent(noise)
    # Losses are rounded so that they tell more.
    accountant = pld.PLDAccountant(value_discretization_interval=_interval(noise, uses))
    for share, count in uses:
        one = gaussian if share == 1 else dp.PoissonSampledDpEvent(share, gaussian)
        accountant.compose(one, count)
    return float(accountant.get_epsilon(delta))


def _interval(noise: float, uses: Uses) -> float:
    """Of the grid of privacy losses.

    On a grid that is wide beside the loss of one mechanism every loss is rounded up by
    a part of it that adds up over many; one that is narrow beside large losses takes
    long, and gains nothing.
    """
    square = noise**-2
    # Of a step that draws few its variance is about the chi-squared divergence (Dong et
    # al., Gaussian differential privacy, 2022), and no more than of one that draws all.
    few = math.expm1(min(square, 500.0))
    total = sum(count * min(share**2 * few, square) for share, count in uses)
    return _INTERVAL * math.sqrt(total / sum(count for _, count in uses))


@functools.cache
def _accountants() -> tuple[ModuleType, ModuleType, ModuleType]:
    """`dp-accounting`, which private studies alone need.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise errors.ConfigError(
            "privacy.epsilon > 0: needs the package dp-accounting: pip install"
            ' "mosaic_jax[privacy]"'
        ) from error
    return dp_accounting, rdp, pld
