"""What platform this is, and which of several processes."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp

from ldm_scaling import machine
from ldm_scaling.parallel import compiled


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The compute type of `float32`, `bfloat16` or `auto`: bfloat16 where matrix units gain.

    Args:
      name: the type.
      platform: `cpu`, `gpu` or `tpu`, what the program is for; this process's if None.
    """
    if name == "auto":
        platform = jax.default_backend() if platform is None else platform
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def cudnn_width(device: jax.Device) -> int:
    """The widest head that cuDNN's fused attention takes on a device, by its compute capability:
    256 from 9.0 on, 128 on 8.x, none on others."""
    found = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    generation = int(found[1]) if found else 0
    return 256 if generation >= 9 else 128 if generation == 8 else 0


def begin(shared: str | os.PathLike | None = None) -> None:
    """What a command that computes begins with, before JAX makes its first array: it uses all CPU
    cores, see `use_cpu_cores`, and keeps compiled programs, see `compiled.keep`.

    Args:
      shared: what several processes share, their workdir; None for one process.
    """
    use_cpu_cores()
    compiled.keep(shared)


def use_cpu_cores() -> None:
    """Makes JAX see one CPU device for every core, as far as powers of two and 8 go.

    A small network's operations are too short to share between threads: split over two devices of
    one core each, a batch trains 1.2 to 1.9 times as fast as on one device of two cores. Must run
    before JAX makes its first array; accelerators are not touched. What `XLA_FLAGS` or
    `jax_num_cpu_devices` ask for stays. Calls `machine.quiet_cuda`.
    """
    machine.quiet_cuda()
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked or jax.config.jax_num_cpu_devices != -1:
        return
    count = 1
    while 2 * count <= min(machine.cores(), 8):
        count *= 2
    jax.config.update("jax_num_cpu_devices", count)


def run_once_options() -> dict[str, int] | None:
    """Compiler options for a program that runs once: on a CPU, quick to compile over quick to run.

    An initialisation holds a hundred small random kernels that cost XLA:CPU twice as long at its
    usual effort.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def is_lead() -> bool:
    """Whether this process writes logs, pictures and records."""
    return jax.process_index() == 0


def describe(devices: list | None = None) -> str:
    """One line on devices, by default those of all processes, e.g. `4 x TPU v5e`."""
    devices = jax.devices() if devices is None else devices
    return f"{len(devices)} x {devices[0].device_kind}"
