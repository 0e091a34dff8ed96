"""Where clients run: devices of a mesh, and how many at once on each.

Code is written for one client; `ClientAxis` runs it over all of them. Clients are
dealt to the devices of a one-dimensional mesh, so that each device has the same number
and about the same number of images. A device holds the images of its own clients only
and runs them in groups of `at_once`, batched by `vmap` within a group and one group
after the other; so memory is that of a group, however many clients there are. The
result depends on none of this but for rounding.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mosaic_jax import errors, schedule, trees
from mosaic_jax.types import Array, FederatedDataset, LabelledImages, Tree

AXIS = "clients"
# Experts of an ensemble that an accelerator runs at once.
_EXPERTS_AT_ONCE = 16

# function(*entries, *shared, *placed) -> (a client's results, what is summed)
ClientFunction = Callable[..., tuple[Tree, Tree]]
# function(state, first, count, *entries, *shared, *placed) -> (state, summed metrics)
StepsFunction = Callable[..., tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Unequal numbers of steps on all devices.

    Attributes:
      devices: the plan of each.
      lanes: of each device.
      every: length of a window.
    """

    devices: list[schedule.DevicePlan]
    lanes: int
    every: int

    @property
    def length(self) -> int:
        """Of the time axis that all devices share."""
        return max(one.length for one in self.devices)

    def pieces(self, first: int, end: int) -> schedule.Pieces:
        """The work of all devices [D, S, ...] in a window; S is always the same."""
        capacity = max(one.capacity for one in self.devices)
        found = [one.pieces(first, end) for one in self.devices]
        return schedule.stack(found, capacity)

    def windows(self) -> schedule.Pieces:
        """`pieces` of every window, in order: [W, D, S, ...]."""
        starts = range(0, self.length, self.every)
        windows = [self.pieces(t, min(t + self.every, self.length)) for t in starts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *windows)

    @property
    def processed(self) -> int:
        """Steps that are computed, those of idle lanes included."""
        return sum(one.processed for one in self.devices)


@dataclasses.dataclass(frozen=True)
class ClientAxis:
    """The leading client axis [C, ...] laid out on devices.

    Attributes:
      mesh: one axis, `AXIS`.
      slots: [devices, clients per device] int: which client runs where; -1 is nobody
        (a copy of client 0 runs there and is thrown away).
      at_once: clients in one `vmap` on each device; divides the slots of a device.
    """

    mesh: Mesh
    slots: np.ndarray
    at_once: int

    @property
    def num_clients(self) -> int:
        """Number of clients C."""
        return int(self.slots.max()) + 1

    @property
    def num_devices(self) -> int:
        """Devices of all processes."""
        return len(self.slots)

    def of(self, count: int) -> "ClientAxis":
        """For `count` clients, whichever, on the same devices.

        Every device must hold what they need: `place` with `whole`.
        """
        return build(np.ones(count), at_once=self.at_once, num_devices=self.num_devices)

    def map(
        self,
        function: Callable[..., Tree],
        *args: Tree,
        shared: Tree = (),
        placed: Tree = (),
    ) -> Tree:
        """`function(*entries, *shared, *placed)` of each client; results [C, ...].

        Args:
          function: of one client. It may close over keys and settings; arrays of any
            size come as arguments.
          args: leaves [C, ...].
          shared: the same for all clients.
          placed: by `place`: each device passes its own part.
        """
        each, _ = self.map_and_sum(
            lambda *args: (function(*args), ()), *args, shared=shared, placed=placed
        )
        return each

    def map_and_sum(
        self,
        function: ClientFunction,
        *args: Tree,
        shared: Tree = (),
        placed: Tree = (),
    ) -> tuple[Tree, Tree]:
        """`map`, and the sum of each client's second result, which is never stacked."""
        live = self.slots.reshape(-1) >= 0
        run = functools.partial(_run_groups, function, self.at_once)
        return self._run(run, args, shared, (live, placed))

    def advance(
        self,
        function: StepsFunction,
        state: Tree,
        *args: Tree,
        pieces: schedule.Pieces,
        shared: Tree = (),
        placed: Tree = (),
    ) -> tuple[Tree, Tree]:
        """Run `pieces` of the clients' steps; returns the new state and summed metrics.

        Args:
          function: steps `first` to `first` + `count` - 1 of one client.
          state: leaves [C, ...].
          args: further leaves [C, ...] that stay.
          pieces: of a `Plan`.
          shared: the same for all clients.
          placed: by `place`: each device passes its own part.
        """
        run = functools.partial(_run_pieces, function)
        return self._run(run, (state, args), shared, (pieces, placed))

    def plan(self, steps: np.ndarray, every: int) -> Plan:
        """Plan unequal numbers of `steps` [C], in windows of `every`."""
        steps = np.where(self.slots >= 0, np.asarray(steps)[self.slots], 0)
        lanes = min(schedule.num_lanes(row, self.at_once) for row in steps)
        plans = [schedule.DevicePlan(row, lanes, every) for row in steps]
        return Plan(plans, lanes, every)

    def _run(
        self,
        run: Callable[..., tuple[Tree, Tree]],
        args: Tree,
        shared: Tree,
        placed: Tree,
    ) -> tuple[Tree, Tree]:
        """`run(args, shared, placed) -> each, total` on each device's part."""
        slots = self.slots.reshape(-1)
        identity = np.array_equal(slots, np.arange(self.num_clients))
        if not identity:
            args = trees.take(args, np.maximum(slots, 0))
        if self.num_devices > 1:
            per_device, split, whole = run, PartitionSpec(AXIS), PartitionSpec()

            def run(args: Tree, shared: Tree, placed: Tree) -> tuple[Tree, Tree]:
                each, total = per_device(args, shared, placed)
                return each, jax.lax.psum(total, AXIS)

            run = jax.shard_map(
                run,
                mesh=self.mesh,
                in_specs=(split, whole, split),
                out_specs=(split, whole),
                check_vma=False,
            )
        each, total = run(args, shared, placed)
        if not identity:
            # Slots of clients 0, 1, ...; those of nobody come last.
            order = np.argsort(np.where(slots >= 0, slots, len(slots)), kind="stable")
            each = trees.take(each, order[: self.num_clients])
        if self.num_devices > 1:
            # Whole everywhere, as `replicate` leaves it: what goes in comes out, so a
            # program compiles once, and every process can read all of it.
            each = jax.lax.with_sharding_constraint(each, self._sharding())
        return each, total

    def place(self, data: FederatedDataset, *, whole: bool = False) -> FederatedDataset:
        """Deal host arrays to the devices: each gets the images of its clients.

        Afterwards `index` counts within the images of the client's device. With
        `whole`, each gets all images, so that any client can run anywhere.
        """
        index, size = np.asarray(data.client.index), np.asarray(data.client.size)
        if self.num_devices == 1:
            return self.replicate(data)
        if whole:
            rows = np.tile(np.arange(len(data.images.label)), self.num_devices)
            client = self.replicate(data.client)
            return FederatedDataset(self._dealt(data.images, rows), client)
        held = [
            np.concatenate([index[i, : size[i]] for i in row if i >= 0] or [[0]])
            for row in self.slots
        ]
        length = max(len(rows) for rows in held)
        local = np.zeros_like(index)
        for row in self.slots:
            start = 0
            for i in row[row >= 0]:
                own = np.arange(start, start + size[i])
                local[i] = np.resize(own, index.shape[1])
                start += size[i]
        rows = np.concatenate([np.resize(rows, length) for rows in held]).astype(int)
        client = self.replicate(data.client.replace(index=local))
        return FederatedDataset(self._dealt(data.images, rows), client)

    def _dealt(self, images: LabelledImages, rows: np.ndarray) -> LabelledImages:
        """Images number `rows`, an equal part of them on each device."""
        return jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                (len(rows), *leaf.shape[1:]),
                self._sharding(AXIS),
                lambda where: np.asarray(leaf)[rows[where[0]]],
            ),
            images,
        )

    def replicate(self, tree: Tree) -> Tree:
        """Arrays that are the same in every process, on all devices.

        What lies on all of them already stays as it is.
        """
        if self.num_devices == 1:
            return jax.tree.map(jnp.asarray, tree)
        everywhere = set(self.mesh.devices.flat)

        def put(leaf: Array) -> Array:
            if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere:
                return leaf
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                data = put(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return jax.make_array_from_callback(
                np.shape(leaf), self._sharding(), lambda where: np.asarray(leaf)[where]
            )

        return jax.tree.map(put, tree)

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def _run_groups(
    function: ClientFunction, at_once: int, args: Tree, shared: Tree, placed: Tree
) -> tuple[Tree, Tree]:
    """One device's clients [S, ...], `at_once` at a time."""
    live, placed = placed

    def group(args: Tree, live: Array) -> tuple[Tree, Tree]:
        each, summand = _batched(lambda *a: function(*a, *shared, *placed))(*args)
        return each, _sum(summand, live)

    count = len(live) // at_once
    if count == 1:
        return group(args, live)
    args, live = jax.tree.map(
        lambda leaf: leaf.reshape(count, at_once, *leaf.shape[1:]), (args, live)
    )

    def body(total: Tree, entry: Tree) -> tuple[Tree, Tree]:
        each, summand = group(*entry)
        return jax.tree.map(jnp.add, total, summand), each

    first = trees.take((args, live), 0)
    zero = trees.zeros(jax.eval_shape(lambda entry: group(*entry)[1], first))
    total, each = jax.lax.scan(body, zero, (args, live))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), each), total


def _run_pieces(
    function: StepsFunction, args: Tree, shared: Tree, placed: Tree
) -> tuple[Tree, Tree]:
    """One device's pieces [1, S, ...] of work on its clients' state [slots, ...]."""
    (state, rest), (pieces, placed) = args, placed
    client, first, count = pieces.client[0], pieces.first[0], pieces.count[0]

    def work(i: Array, args: Tree) -> tuple[Tree, Tree]:
        """Piece `i` of its lanes; their new states, and what they count together."""
        lanes, lane_rest = trees.take(args, jnp.maximum(client[i], 0))
        lanes, metrics = _batched(
            lambda lane, begin, rest: function(
                lane, begin, count[i], *rest, *shared, *placed
            )
        )(lanes, first[i], lane_rest)
        return lanes, _sum(metrics, client[i] >= 0)

    def piece(i: Array, carry: Tree) -> Tree:
        state, total = carry
        lanes, metrics = work(i, (state, rest))
        # An index past the end: nobody's state is dropped.
        who = client[i]
        row = jnp.where(who >= 0, who, len(jax.tree.leaves(state)[0]))
        state = jax.tree.map(
            lambda all_, new: all_.at[row].set(new, mode="drop"), state, lanes
        )
        return state, trees.add(total, metrics)

    zero = trees.zeros(jax.eval_shape(lambda args: work(0, args)[1], args))
    return jax.lax.fori_loop(0, len(count), piece, (state, zero))


def _batched(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`vmap`, without a batch axis in the program where the axis has one entry."""

    def run(*args: Tree) -> Tree:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        return jax.tree.map(lambda leaf: leaf[None], function(*trees.take(args, 0)))

    return run


def _sum(tree: Tree, live: Array) -> Tree:
    """Sum over the leading axis of what is `live`, be the rest finite or not."""
    return jax.tree.map(
        lambda leaf: jnp.sum(
            jnp.where(live.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), axis=0
        ),
        tree,
    )


def expert_map(function: Callable[..., Tree], *args: Tree) -> Tree:
    """`function` of each entry of the leading axis, without sums or devices.

    Some at once on accelerators, one after the other on CPUs, so that a hundred
    experts take the memory of a few.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda entry: function(*entry), args)
    return jax.lax.map(
        lambda entry: function(*entry), args, batch_size=_EXPERTS_AT_ONCE
    )


def build(size: np.ndarray, *, at_once: int = 0, num_devices: int = 0) -> ClientAxis:
    """Deal clients to devices.

    Args:
      size: [C] images of each client: devices get about the same number of images.
      at_once: clients in one `vmap`; 0: one on CPUs, whose cores are busy with one
        client's matrix products, all of a device's clients elsewhere.
      num_devices: the first so many; 0: all there are.

    Raises:
      ConfigError: there are fewer devices.
    """
    devices = first_devices(num_devices)
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    each = -(-len(size) // len(devices))
    if not at_once:
        at_once = 1 if devices[0].platform == "cpu" else each
    at_once = balanced(each, at_once)
    slots = deal(size, len(devices), -(-each // at_once) * at_once)
    return ClientAxis(mesh, slots, at_once)


def first_devices(num_devices: int) -> list[jax.Device]:
    """The first so many devices of all processes; 0: all.

    Raises:
      ConfigError: there are fewer.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise errors.ConfigError(
            f"compute.devices = {num_devices}: must be <= {len(devices)}, the devices"
            " there are"
        )
    return devices[: num_devices or len(devices)]


def balanced(count: int, at_most: int) -> int:
    """Group size <= `at_most` with the fewest groups and the least padding."""
    return -(-count // -(-count // at_most))


def deal(size: np.ndarray, num_devices: int, each: int) -> np.ndarray:
    """Clients to devices [devices, each], -1 where nobody is; the largest first.

    Always to the device with the fewest images so far that has room; each device's
    clients are in ascending order.
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
