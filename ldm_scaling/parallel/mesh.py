"""The device mesh: axes `data` and `fsdp`, the batch over both."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.errors import UserError

AXES = ("data", "fsdp")


def make(data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all, of every host).

    Args:
      data: replicas; -1 takes the devices that are left.
      fsdp: shards of parameters, optimiser and average; -1 likewise.
    Raises:
      UserError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp]
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices: the product must "
            "be their number; -1 on one axis takes what is left"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays placed with their first axis over every device; whole where it does not split.

    For one process that holds the whole batch; training uses its own process-local data.
    """

    def put(leaf):
        fits = leaf.shape[0] % mesh.size == 0
        return jax.device_put(leaf, batch_sharding(mesh) if fits else replicated(mesh))

    return jax.tree.map(put, tree)


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises `UserError` when a batch does not split evenly over the mesh."""
    if batch_size % mesh.size:
        raise UserError(
            f"{name}={batch_size} does not split over {mesh.size} devices: use a multiple of it"
        )
