"""Compilers for accelerators that are not here, by JAX's plugins for them."""

import os
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from mosaic_jax.core.types import Tree
from mosaic_jax.fl import parallel

# As XLA describes them: cores, arithmetic units of a core, its shared memory, bytes of
# cache, GHz, bytes of memory, bytes per second, compute capability.
_GPUS = {
    "a100": (108, 64, 166912, 41943040, 1.41, 85_095_874_560, 2_039_000_000_000, 8),
    "h100": (132, 128, 232448, 52428800, 1.98, 84_942_979_072, 3_352_320_000_000, 9),
    "h200": (132, 128, 232448, 62914560, 1.98, 150_121_000_960, 4_800_000_000_000, 9),
}
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {per_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {per_block}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def prepare(num_devices: int) -> None:
    """Set what JAX reads before it first looks for devices.

    Args:
      num_devices: CPU devices that stand in for those of the target.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            "--xla_gpu_autotune_level=0",  # there is nothing to tune on
            f"--xla_force_host_platform_device_count={num_devices}",
        )
    )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # The assembler of the package nvidia-cuda-nvcc-cu12.
    nvcc = pathlib.Path(sysconfig.get_path("purelib"), "nvidia", "cuda_nvcc", "bin")
    os.environ["PATH"] = f"{nvcc}{os.pathsep}{os.environ['PATH']}"


def topology(name: str, num_devices: int) -> Any:
    """The devices of a target, as JAX's compilers need them; there are no others.

    Args:
      name: of the target, as in `mosaic_jax.run.devices`.
      num_devices: at least so many; TPUs come in fours.
    """
    if name in _GPUS:
        cores, units, block, cache, clock, memory, bandwidth, capability = _GPUS[name]
        text = _GPU.format(
            name=name,
            cores=cores,
            units=units,
            per_block=block,
            per_core=block + 1024,
            cache=cache,
            clock=clock,
            memory=memory,
            bandwidth=bandwidth,
            capability=capability,
        )
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x1x{num_devices}",
            target_config=text,
        )
    side = "2x2" if num_devices <= 4 else "2x4"
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{side}")


class Shapes:
    """Turns arrays into shapes on some devices, which need not be here."""

    def __init__(self, devices: Sequence[Any]) -> None:
        """On `devices`, on all of them where an array does not say on which."""
        self._mesh = Mesh(
            np.array(devices), (parallel.AXIS,), axis_types=(AxisType.Auto,)
        )

    def __call__(self, tree: Tree) -> Tree:
        """`tree`, shapes in place of its arrays; all else stays."""
        return jax.tree.map(self._one, tree)

    def _one(self, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return leaf
        if self._mesh.size == 1:
            sharding = SingleDeviceSharding(self._mesh.devices.flat[0])
        else:
            found = getattr(leaf, "sharding", None)
            spec = getattr(found, "spec", PartitionSpec())
            sharding = NamedSharding(self._mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
