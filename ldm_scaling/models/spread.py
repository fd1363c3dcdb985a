"""How a frozen network's batches lie on the devices: rows apart, weights everywhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True)
class Spread:
    """Batches of `batch` rows, of which each of the `mesh`'s devices takes an equal part."""

    batch: int
    mesh: jax.sharding.Mesh

    def room_for(self, rows: int) -> int:
        """Rows to fill `rows` up to: a power of two for each device, so that few sizes are compiled
        and few rows idle; but no more than a batch.
        """
        devices = self.mesh.devices.size
        return min(self.batch, devices << max(-(-rows // devices) - 1, 0).bit_length())

    def jit(self, run: Callable, **kw) -> Any:
        """`jax.jit` with `compiler_options` for these devices."""
        options = compiler_options(self.mesh.devices.flat[0].platform)
        return jax.jit(run, compiler_options=options, **kw)

    def everywhere(self, tree: Any) -> Any:
        """Arrays, such as weights, to every device."""
        return jax.device_put(tree, self._sharding(None))

    def rows(self, tree: Any) -> Any:
        """Arrays of `batch` rows, or another multiple of the devices, to a part on each device."""
        return jax.device_put(tree, self._sharding("data"))

    def _sharding(self, axis: str | None) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(axis))


@functools.cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """What a frozen network is compiled with.

    XLA:CPU's default schedule begins early what could run at the same time, such as what it makes
    of the weights of every layer, and so takes 80 MB at once where 26 would do (LPIPS with VGG16,
    8 pairs at 32 px). Memory of more than 32 MB comes fresh from the system at every call: 35 of
    113 ms. An XLA that does not have the option (it is not documented) does without.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    nothing = jax.ShapeDtypeStruct((), jax.numpy.float32, sharding=cpu)
    try:
        jax.jit(lambda x: x).lower(nothing).compile(options)
    except jax.errors.JaxRuntimeError as e:
        if "No such compile option" not in str(e):
            raise
        return None
    return options


def over(
    devices: Sequence[jax.Device] | None, batch: int | None, *, cpu: int, accelerator: int
) -> Spread:
    """Batches over `devices`, by default all of this process.

    Args:
      devices: what to spread each batch over.
      batch: rows of a batch, a multiple of the devices; by default so many for each of them:
      cpu, accelerator: rows for a CPU device and for another.

    Raises:
      UserError: for a batch that does not divide.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if batch is None:
        batch = len(devices) * (cpu if devices[0].platform == "cpu" else accelerator)
    if batch < 1 or batch % len(devices):
        raise UserError(f"a batch of {batch} does not divide over {len(devices)} devices")
    return Spread(batch, jax.sharding.Mesh(np.array(devices), ("data",)))
