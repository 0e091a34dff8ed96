"""Who runs when, where clients have unequal numbers of steps.

A device runs its clients on one or more lanes; lanes advance in step, batched. A client
may change lanes, so that no lane idles while work is left: the wrap-around rule of
McNaughton (1959), optimal where interruptions are allowed.
"""

import flax.struct
import numpy as np


@flax.struct.dataclass
class Pieces:
    """Work in order of time, `count[s]` steps of each lane's client at a time.

    Attributes:
      client: [S, L] int32, who runs on each lane; -1: nobody.
      first: [S, L] int32, the first of its steps.
      count: [S] int32.
    """

    client: np.ndarray
    first: np.ndarray
    count: np.ndarray


def num_lanes(steps: np.ndarray, at_once: int) -> int:
    """At most `at_once`, and so few that none has to wait for the longest client."""
    longest = int(np.max(steps, initial=1))
    return max(1, min(at_once, int(np.sum(steps)) // max(longest, 1)))


class DevicePlan:
    """Who runs on each lane of one device, over a time axis cut into windows.

    On one lane time is counted in each client's own steps: clients take turns and
    advance together. On several it is the time of the lanes.

    Attributes:
      length: of the time axis.
      processed: steps that are computed, those of idle lanes included.
      capacity: pieces that a window has at most.
    """

    def __init__(self, steps: np.ndarray, lanes: int, every: int) -> None:
        """Plan `steps` [C] of each client on `lanes`, in windows of `every`."""
        self._steps = np.asarray(steps)
        self._lanes = lanes
        longest, total = int(np.max(steps, initial=0)), int(np.sum(steps))
        self.length = longest if lanes == 1 else max(longest, -(-total // lanes))
        # The first lane is never idle.
        self.processed = total if lanes == 1 else lanes * self.length
        self._parts = _wrap_around(self._steps, max(self.length, 1))
        _, _, start, _, count = self._parts
        self._edges = np.unique(np.concatenate([start, start + count]))
        self.capacity = len(self._steps)
        if lanes > 1:
            inside = np.bincount(self._edges // every, minlength=1)
            self.capacity = int(inside.max()) + 1

    def pieces(self, first: int, end: int) -> Pieces:
        """The work in the window of time from `first` to `end`."""
        if self._lanes == 1:
            who = np.flatnonzero(self._steps > first)
            count = np.minimum(self._steps[who], end) - first
            return _pieces(who[:, None], np.full((len(who), 1), first), count)
        inside = self._edges[(self._edges > first) & (self._edges < end)]
        edges = np.unique([first, *inside, end])
        begin, size = edges[:-1], np.diff(edges)
        who = np.full((len(begin), self._lanes), -1)
        at = np.zeros((len(begin), self._lanes))
        for lane, client, start, step, count in self._parts.T:
            rows = (begin >= start) & (begin < start + count)
            who[rows, lane] = client
            at[rows, lane] = step + begin[rows] - start
        return _pieces(who, at, size)


def _wrap_around(steps: np.ndarray, span: int) -> np.ndarray:
    """Rows lane, client, start in lane time, first step, count; one column a part.

    Clients fill lane after lane; what passes the end of a lane is the client's first
    part, at the start of the next one, long over when the second begins.
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


def _pieces(client: np.ndarray, first: np.ndarray, count: np.ndarray) -> Pieces:
    return Pieces(*(array.astype(np.int32) for array in (client, first, count)))


def stack(devices: list[Pieces], capacity: int) -> Pieces:
    """Pieces of several devices [D, capacity, ...], filled up with ones of no steps."""

    def filled(array: np.ndarray, value: int) -> np.ndarray:
        missing = [(0, capacity - len(array)), *[(0, 0)] * (array.ndim - 1)]
        return np.pad(array, missing, constant_values=value)

    return Pieces(
        client=np.stack([filled(one.client, -1) for one in devices]),
        first=np.stack([filled(one.first, 0) for one in devices]),
        count=np.stack([filled(one.count, 0) for one in devices]),
    )
