"""Which device a client runs on, and when, if numbers of steps are unequal.

A device runs its clients on one or more lanes, which advance together as one batch. A
client may change lanes, so that no lane is idle while work is left: the wrap-around
rule of McNaughton (1959), which is optimal if work may be interrupted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mosaic_jax.core import trees
from mosaic_jax.core.types import Array, Struct


class Pieces(Struct):
    """Pieces of work in order of time: `count[s]` steps of each lane's client.

    Attributes:
      client: [S, L] int32, client on each lane; -1: the lane is idle.
      first: [S, L] int32, the first of the client's steps.
      count: [S] int32, number of steps.
      begin: [S] int32, time of the first step.
    """

    client: Array
    first: Array
    count: Array
    begin: Array


def within(pieces: Pieces, first: Array, end: Array) -> Pieces:
    """What is done of some pieces in a part of their window; may be no steps.

    Args:
      pieces: of a window.
      first: [] int32, time at which the part begins.
      end: [] int32, time at which it is over.
    """
    skipped = jnp.clip(first - pieces.begin, 0, pieces.count)
    stop = jnp.clip(end - pieces.begin, 0, pieces.count)
    return pieces.replace(
        first=pieces.first + skipped[..., None],
        count=stop - skipped,
        begin=pieces.begin + skipped,
    )


def num_lanes(steps: np.ndarray, at_once: int) -> int:
    """Lanes for clients with `steps` [C]: at most `at_once`, and none longer idle.

    More lanes would not finish earlier, for the client with the most steps takes as
    long on any number of them.
    """
    longest = int(np.max(steps, initial=1))
    return max(1, min(at_once, int(np.sum(steps)) // max(longest, 1)))


class DevicePlan:
    """Which client runs on each lane of one device, in windows of a time axis.

    With one lane, time counts each client's own steps: clients take turns and advance
    together. With several, it is the time of the lanes.

    Attributes:
      length: of the time axis.
      processed: number of steps that are computed, those of idle lanes included.
      parts: [5, P] int, of `_wrap_around`: what makes the schedule.
      capacity: largest number of pieces in a window.
    """

    def __init__(self, steps: np.ndarray, lanes: int, every: int) -> None:
        """Make the schedule.

        Args:
          steps: [C] int, number of steps of each client.
          lanes: of the device.
          every: length of a window.
        """
        self._steps = np.asarray(steps)
        self._lanes = lanes
        longest, total = int(np.max(steps, initial=0)), int(np.sum(steps))
        self.length = longest if lanes == 1 else max(longest, -(-total // lanes))
        # A single lane is never idle.
        self.processed = total if lanes == 1 else lanes * self.length
        self.parts = _wrap_around(self._steps, max(self.length, 1))
        _, _, start, _, count = self.parts
        self._edges = np.unique(np.concatenate([start, start + count]))
        self.capacity = len(self._steps)
        if lanes > 1:
            inside = np.bincount(self._edges // every, minlength=1)
            self.capacity = int(inside.max()) + 1

    def pieces(self, first: int, end: int) -> Pieces:
        """The pieces in the window of times `first` to `end` - 1."""
        if self._lanes == 1:
            who = np.flatnonzero(self._steps > first)
            count = np.minimum(self._steps[who], end) - first
            begin = np.full(len(who), first)
            return _pieces(who[:, None], begin[:, None], count, begin)
        inside = self._edges[(self._edges > first) & (self._edges < end)]
        edges = np.unique([first, *inside, end])
        begin, size = edges[:-1], np.diff(edges)
        who = np.full((len(begin), self._lanes), -1)
        at = np.zeros((len(begin), self._lanes))
        for lane, client, start, step, count in self.parts.T:
            rows = (begin >= start) & (begin < start + count)
            who[rows, lane] = client
            at[rows, lane] = step + begin[rows] - start
        return _pieces(who, at, size, begin)


def _wrap_around(steps: np.ndarray, span: int) -> np.ndarray:
    """McNaughton's rule; rows lane, client, start in lane time, first step, count.

    Clients fill lane after lane, one column per part. A client that passes the end of a
    lane is split: it begins at the start of the next lane, which is over before its
    second part starts at the end of this one.
    """
    parts = []
    filled = 0
    for client, count in enumerate(map(int, steps)):
        if not count:
            continue
        lane, start = divmod(filled, span)
        over = max(0, start + count - span)
        if over:
            parts.append((lane + 1, client, 0, 0, over))
        parts.append((lane, client, start, over, count - over))
        filled += count
    return np.array(parts, int).reshape(-1, 5).T


def _pieces(*fields: np.ndarray) -> Pieces:
    return Pieces(*(array.astype(np.int32) for array in fields))


def stack(devices: list[Pieces], capacity: int) -> Pieces:
    """Pieces of D devices [D, capacity, ...], padded with pieces of no steps."""

    def filled(array: Array, value: int) -> np.ndarray:
        missing = [(0, capacity - len(array)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(array, missing, constant_values=value)

    return Pieces(
        client=np.stack([filled(one.client, -1) for one in devices]),
        first=np.stack([filled(one.first, 0) for one in devices]),
        count=np.stack([filled(one.count, 0) for one in devices]),
        begin=np.stack([filled(one.begin, 0) for one in devices]),
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Schedule of unequal numbers of steps on all devices.

    Attributes:
      devices: the schedule of each device.
      lanes: clients that a device runs at once.
      every: length of a window of time.
    """

    devices: list[DevicePlan]
    lanes: int
    every: int

    @property
    def length(self) -> int:
        """Length of the time axis that all devices share."""
        return max(one.length for one in self.devices)

    def pieces(self, first: int, end: int) -> Pieces:
        """Pieces [D, S, ...] of all D devices in times `first` to `end` - 1.

        S is the same for every window.
        """
        capacity = max(one.capacity for one in self.devices)
        found = [one.pieces(first, end) for one in self.devices]
        return stack(found, capacity)

    def windows(self) -> Pieces:
        """Pieces [W, D, S, ...] of all W windows, in order."""
        starts = range(0, self.length, self.every)
        windows = [self.pieces(t, min(t + self.every, self.length)) for t in starts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *windows)

    @property
    def layout(self) -> str:
        """Digest of how many steps each client has done at each time.

        On single lanes that is the time itself, on any number of devices.
        """
        if self.lanes == 1:
            return "one lane"
        return trees.digest({str(i): one.parts for i, one in enumerate(self.devices)})

    @property
    def processed(self) -> int:
        """Number of steps that are computed, those of idle lanes included."""
        return sum(one.processed for one in self.devices)


def balanced(count: int, at_most: int) -> int:
    """Size <= `at_most` of equal groups of `count` clients with the least padding."""
    return -(-count // -(-count // at_most))


def deal(size: np.ndarray, num_devices: int, each: int) -> np.ndarray:
    """Deal clients to devices, so that these have about the same number of images.

    Clients go, the largest first, to the device with the fewest images so far that has
    room. Each device's clients are in ascending order.

    Args:
      size: [C] images of each client.
      num_devices: number of devices.
      each: slots of a device, at least ceil(C / num_devices).

    Returns:
      [num_devices, each] int, client in each slot; -1 for empty slots.
    """
    if num_devices == 1:
        padding = [-1] * (each - len(size))
        return np.array([[*range(len(size)), *padding]])
    held = [[] for _ in range(num_devices)]
    load = np.zeros(num_devices)
    room = -(-len(size) // num_devices)
    for i in np.argsort(-np.asarray(size), kind="stable"):
        free = [d for d in range(num_devices) if len(held[d]) < room]
        device = min(free, key=lambda d: load[d])
        held[device].append(int(i))
        load[device] += size[i]
    return np.array([sorted(h) + [-1] * (each - len(h)) for h in held])
