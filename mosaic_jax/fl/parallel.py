"""Where clients run: on which device of a mesh, and how many of them at once.

Algorithms are written for one client; `ClientAxis` runs them for all clients. Clients
are dealt to the devices of a one-dimensional mesh, so that each device has the same
number of clients and about the same number of images. A device holds the images of its
own clients only. It runs them in groups of `at_once`, batched by `vmap` within a group
and one group after the other, so that the memory in use is that of one group. The
layout changes results by rounding only.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from mosaic_jax.core import errors, programs, sharing, trees
from mosaic_jax.core.types import Array, FederatedDataset, LabelledImages, Tree
from mosaic_jax.fl import schedule

AXIS = "clients"
# Number of experts that an accelerator evaluates at once.
_EXPERTS_AT_ONCE = 16

# function(*entries, *shared, *placed) -> (results of a client, summands)
ClientFunction = Callable[..., tuple[Tree, Tree]]
# function(state, first, count, *entries, *shared, *placed) -> state
StepsFunction = Callable[..., Tree]


@dataclasses.dataclass(frozen=True)
class ClientAxis:
    """The layout of the leading client axis [C, ...] on devices.

    Attributes:
      mesh: of the devices, with one axis, `AXIS`.
      slots: [devices, clients per device] int, number of the client in each slot; -1 is
        an empty slot (a copy of client 0 runs there and is thrown away).
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
        """Number of devices of all processes."""
        return len(self.slots)

    def of(self, count: int) -> "ClientAxis":
        """A layout for any `count` clients on the same devices.

        Every device must hold all images: `place` them with `whole`.
        """
        return build(np.ones(count), at_once=self.at_once, num_devices=self.num_devices)

    def map(
        self,
        function: Callable[..., Tree],
        *args: Tree,
        shared: Tree = (),
        placed: Tree = (),
    ) -> Tree:
        """Run `function(*entries, *shared, *placed)` for each client.

        Args:
          function: of one client. It may close over keys and settings; large arrays
            must be arguments.
          args: leaves [C, ...], of which each client gets its entry.
          shared: a sequence of arguments that are the same for all clients.
          placed: a sequence of results of `place`; each device passes its own part.

        Returns:
          The results of all clients, leaves [C, ...].
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
        """Like `map`, for a function with a second result that is summed over clients.

        The second results are never stacked, so they take the memory of one group.

        Args:
          function: of one client; returns its result and its summand.
          args: leaves [C, ...], of which each client gets its entry.
          shared: a sequence of arguments that are the same for all clients.
          placed: a sequence of results of `place`; each device passes its own part.

        Returns:
          The results of all clients, leaves [C, ...], and the sum.
        """
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
    ) -> Tree:
        """Run the steps of the clients in some pieces of a schedule.

        Args:
          function: runs the steps `first` to `first` + `count` - 1 of one client.
          state: of the clients, leaves [C, ...].
          args: further leaves [C, ...], of which each client gets its entry.
          pieces: of a `schedule.Plan`.
          shared: a sequence of arguments that are the same for all clients.
          placed: a sequence of results of `place`; each device passes its own part.

        Returns:
          The new state, leaves [C, ...].
        """
        run = functools.partial(_run_pieces, function)
        return self._run(run, (state, args), shared, (pieces, placed))[0]

    def plan(self, steps: np.ndarray, every: int) -> schedule.Plan:
        """A schedule of unequal numbers of `steps` [C], in windows of `every`."""
        steps = np.where(self.slots >= 0, np.asarray(steps)[self.slots], 0)
        lanes = min(schedule.num_lanes(row, self.at_once) for row in steps)
        plans = [schedule.DevicePlan(row, lanes, every) for row in steps]
        return schedule.Plan(plans, lanes, every)

    def _run(
        self,
        run: Callable[..., tuple[Tree, Tree]],
        args: Tree,
        shared: Tree,
        placed: Tree,
    ) -> tuple[Tree, Tree]:
        """`run(args, shared, placed) -> (each, total)` on the part of each device."""
        slots = self.slots.reshape(-1)
        identity = np.array_equal(slots, np.arange(self.num_clients))
        if not identity:
            args = trees.take(args, np.maximum(slots, 0))
        if self.num_devices > 1:
            per_device, split, whole = run, PartitionSpec(AXIS), PartitionSpec()

            def summed(args: Tree, shared: Tree, placed: Tree) -> tuple[Tree, Tree]:
                with sharing.over(None):
                    each, total = per_device(args, shared, placed)
                return each, jax.lax.psum(total, AXIS)

            run = jax.shard_map(
                summed,
                mesh=self._traced_mesh,
                in_specs=(split, whole, split),
                out_specs=(split, whole),
                check_vma=False,
            )
        each, total = run(args, shared, placed)
        if not identity:
            # Slots of clients 0, 1, ..., with empty slots last.
            order = np.argsort(np.where(slots >= 0, slots, len(slots)), kind="stable")
            each = trees.take(each, order[: self.num_clients])
        if self.num_devices > 1:
            # On every device, as by `replicate`: inputs and outputs of programs have
            # the same layout, so it compiles once, and every process can read them.
            everywhere = NamedSharding(self._traced_mesh, PartitionSpec())
            each = jax.lax.with_sharding_constraint(each, everywhere)
        return each, total

    def place(self, data: FederatedDataset, *, whole: bool = False) -> FederatedDataset:
        """Put a data set on the devices, each of which gets the images of its clients.

        The result's `index` counts the images of the client's device. With `whole`
        every device gets all images, so that any client can run on any device.
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
                own = start + np.arange(int(size[i]))
                local[i] = np.resize(own, index.shape[1])
                start += len(own)
        rows = np.concatenate([np.resize(rows, length) for rows in held]).astype(int)
        client = self.replicate(data.client.replace(index=local))
        return FederatedDataset(self._dealt(data.images, rows), client)

    def gather(self, data: FederatedDataset, rows: np.ndarray) -> FederatedDataset:
        """Put some clients on the devices, with the images of these alone.

        This is a layout of these m clients, see `of`. Shapes depend on m alone: a
        client in slot s of its device has the images s * M, ..., s * M + M - 1 there,
        of its row of `data.client.index` [C, M]. Where there are several processes,
        each reads the images for its own devices.

        Args:
          data: of all clients, in host memory.
          rows: [m] int, the clients.

        Returns:
          The data of these clients, [m, ...].
        """
        client = trees.take(data.client, rows)
        held = np.asarray(client.index)
        # A copy of client 0 is in empty slots.
        images = self._dealt(data.images, held[np.maximum(self.slots, 0)].reshape(-1))
        device, slot = np.nonzero(self.slots >= 0)
        index, width = np.empty_like(held), held.shape[1]
        index[self.slots[device, slot]] = slot[:, None] * width + np.arange(width)
        return FederatedDataset(images, self.replicate(client.replace(index=index)))

    def _dealt(self, images: LabelledImages, rows: np.ndarray) -> LabelledImages:
        """The images with numbers `rows`, an equal part of them on each device."""

        def deal(leaf: Array) -> Array:
            if self.num_devices == 1:
                return self.replicate(leaf[rows])

            def part(where: Any) -> np.ndarray:
                return np.asarray(leaf[rows[where[0]]])

            shape = (len(rows), *leaf.shape[1:])
            return jax.make_array_from_callback(shape, self._sharding(AXIS), part)

        return jax.tree.map(deal, images)

    def sharing(self) -> contextlib.AbstractContextManager[None]:
        """Within it, all devices share the server's batches, see `core.sharing`."""
        return sharing.over(self._traced_mesh if self.num_devices > 1 else None)

    def replicate(self, tree: Tree) -> Tree:
        """Copy arrays, which are the same in every process, to all devices.

        Arrays that are on all of them already are not copied.
        """
        if self.num_devices == 1:
            return jax.tree.map(jnp.asarray, tree)
        everywhere = set(self.mesh.devices.flat)

        def put(leaf: Array) -> Array:
            if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere:
                return leaf
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                data = jnp.asarray(put(jax.random.key_data(leaf)))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return jax.make_array_from_callback(
                np.shape(leaf), self._sharding(), lambda where: np.asarray(leaf)[where]
            )

        return jax.tree.map(put, tree)

    @property
    def _traced_mesh(self) -> Mesh | AbstractMesh:
        """That of programs: without devices where they are compiled for others."""
        return self.mesh if programs.target() is None else self.mesh.abstract_mesh

    def _sharding(self, *axes: str) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def _run_groups(
    function: ClientFunction, at_once: int, args: Tree, shared: Tree, placed: Tree
) -> tuple[Tree, Tree]:
    """Run one device's clients [S, ...], `at_once` at a time."""
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

    # Traced once for its shapes and for the loop.
    group = jax.jit(group, inline=True)

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
    """Run one device's pieces [1, S, ...] on its clients' state [slots, ...].

    The second result, which would be summed over devices, is empty.
    """
    (state, rest), (pieces, placed) = args, placed
    client, first, count = pieces.client[0], pieces.first[0], pieces.count[0]

    def piece(i: Array, state: Tree) -> Tree:
        """Run piece `i` on all lanes."""
        lanes, lane_rest = trees.take((state, rest), jnp.maximum(client[i], 0))
        lanes = _batched(
            lambda lane, begin, rest: function(
                lane, begin, count[i], *rest, *shared, *placed
            )
        )(lanes, first[i], lane_rest)
        # The state of an idle lane gets an index past the end, so it is dropped.
        who = client[i]
        row = jnp.where(who >= 0, who, len(jax.tree.leaves(state)[0]))
        return jax.tree.map(
            lambda all_, new: all_.at[row].set(new, mode="drop"), state, lanes
        )

    return jax.lax.fori_loop(0, len(count), piece, state), ()


def _batched(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`vmap`, without a batch axis in the program if it has a single entry."""

    def run(*args: Tree) -> Tree:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        return jax.tree.map(lambda leaf: leaf[None], function(*trees.take(args, 0)))

    return run


def _sum(tree: Tree, live: Array) -> Tree:
    """Sum over the entries of the leading axis that are `live`."""
    return jax.tree.map(
        lambda leaf: jnp.sum(
            jnp.where(live.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), axis=0
        ),
        tree,
    )


def expert_map(function: Callable[..., Tree], *args: Tree) -> Tree:
    """Apply `function` to each entry of the leading axis of `args`.

    Accelerators run a few entries at once, CPUs one after the other, so that a hundred
    experts take the memory of a few.
    """
    # XLA does not divide the samples of grouped convolutions, which several become.
    if programs.platform() == "cpu" or sharing.num_devices() > 1:
        return jax.lax.map(lambda entry: function(*entry), args)
    return jax.lax.map(
        lambda entry: function(*entry), args, batch_size=_EXPERTS_AT_ONCE
    )


def build(size: np.ndarray, *, at_once: int = 0, num_devices: int = 0) -> ClientAxis:
    """Deal clients to devices.

    Args:
      size: [C] images of each client: devices get about the same number of images.
      at_once: clients in one `vmap`; 0: one on CPUs, whose cores a single client's
        matrix products keep busy, all of a device's clients elsewhere.
      num_devices: number of devices; 0: all there are.

    Raises:
      ConfigError: there are fewer devices than `num_devices`.
    """
    devices = first_devices(num_devices)
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    each = -(-len(size) // len(devices))
    if not at_once:
        at_once = 1 if programs.platform() == "cpu" else each
    at_once = schedule.balanced(each, at_once)
    slots = schedule.deal(size, len(devices), -(-each // at_once) * at_once)
    return ClientAxis(mesh, slots, at_once)


def make_devices(num_devices: int) -> None:
    """Have so many devices made of the cores of a CPU, where there are no others.

    Each runs clients of its own, which keeps cores busy whose share of one client's
    operations is too small for them. Nothing happens where devices are in use already,
    or there are fewer cores.
    """
    if 1 < num_devices <= (os.cpu_count() or 1):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", num_devices)


def first_devices(num_devices: int) -> list[Any]:
    """The first `num_devices` devices of all processes; 0: all of them.

    Raises:
      ConfigError: there are fewer devices.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise errors.ConfigError(
            f"compute.devices = {num_devices}: must be <= {len(devices)}, the devices"
            " there are"
        )
    return devices[: num_devices or len(devices)]
