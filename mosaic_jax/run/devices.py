"""Accelerators that a study can be sized for without having one."""

import dataclasses

import jax

from mosaic_jax.core import errors, programs, schema
from mosaic_jax.core.costs import Loop


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet.

    Attributes:
      title: of tables.
      platform: "gpu" or "tpu".
      bandwidth: of its memory, in bytes per second.
      peak: dense bfloat16 FLOPs per second of its matrix units.
      memory: bytes.
      kind: part of the name that JAX has for it.
    """

    title: str
    platform: str
    bandwidth: float
    peak: float
    memory: int
    kind: str

    @property
    def free(self) -> int:
        """Bytes that programs get: JAX takes three quarters of a GPU's memory."""
        return self.memory * 3 // 4 if self.platform == "gpu" else self.memory

    def seconds(self, num_bytes: float, flops: float, kernels: float) -> float:
        """Least time for some work: a roofline, and a start of every kernel.

        Args:
          num_bytes: moved to and from memory.
          flops: of products and convolutions.
          kernels: number of them.
        """
        work = max(num_bytes / self.bandwidth, flops / (OF_PEAK * self.peak))
        return work + START * kernels

    def roofline(self, loop: Loop, unknown: float = 1) -> float:
        """Least time for a loop; those of unknown length take `unknown` iterations."""
        own = self.seconds(loop.own.bytes, loop.own.flops, loop.own.kernels)
        inner = sum(self.roofline(one, unknown) for one in loop.loops)
        return (unknown if loop.trips is None else loop.trips) * (own + inner)


# Share of the peak that large products reach, and seconds to start a kernel.
OF_PEAK = 0.75
START = 2e-6

DEVICES = {
    "a100": Device("A100 80 GB", "gpu", 2.039e12, 312e12, 80 * 2**30, "A100"),
    "h100": Device("H100 80 GB", "gpu", 3.352e12, 989e12, 80 * 2**30, "H100"),
    "h200": Device("H200 141 GB", "gpu", 4.8e12, 989e12, 141 * 10**9, "H200"),
    "v5e": Device("TPU v5e", "tpu", 0.819e12, 197e12, 16 * 2**30, "TPU v5 lite"),
    "v6e": Device("TPU v6e", "tpu", 1.638e12, 918e12, 32 * 2**30, "TPU v6 lite"),
}


def find(name: str) -> Device:
    """The device that a flag names.

    Raises:
      ConfigError: it is not known.
    """
    if name not in DEVICES:
        raise errors.ConfigError(
            f"--target = {name!r}: {schema.near(name, list(DEVICES))}"
        )
    return DEVICES[name]


def target(device: Device) -> programs.Target:
    """What programs are traced for."""
    return programs.Target(device.platform, device.free)


def here() -> Device | None:
    """The device that is here; None if it is a CPU, or one that is not known."""
    kind = jax.devices()[0].device_kind
    return next((one for one in DEVICES.values() if one.kind in kind), None)
