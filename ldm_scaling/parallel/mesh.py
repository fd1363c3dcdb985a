"""The device mesh: replicas, shards of the parameters, shards of a layer; the batch over the first
two."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.errors import UserError

# `fsdp` and `fsdp_in` are one axis to the user. It is two to the compiler, so that kernels whose
# channels do not divide by 256 do by 16 on both sides, and each gather runs on one ring of a torus.
AXES = ("data", "fsdp", "fsdp_in", "tensor")
BATCH_AXES = AXES[:3]
# The most of fsdp that goes to a kernel's output channels; widths of the family divide by 64.
_RING = 16


def make(
    data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 0, devices: list | None = None
) -> Mesh:
    """A mesh over `devices` (default: all, of every host).

    Args:
      data: replicas; -1 takes the devices that are left. Slices, which a slower network joins,
        hold whole replicas.
      fsdp: shards of parameters, optimiser and average, gathered for use; -1 likewise.
      tensor: shards of a layer's channels and heads, each computing its own; -1 likewise.
      slices: of a TPU pod; 0 is as many as the devices say they are in. Given, it must be that
        number; devices that belong to no slice (CPU, GPU) are cut into so many equal parts.
    Raises:
      UserError: when the sizes do not multiply to the number of devices, slices do not hold whole
        replicas, or there are not as many as given.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, given = [data, fsdp, tensor], f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"{given} does not fit {len(devices)} devices: the product must be their number; -1 on "
            "one axis takes what is left"
        )
    # Of GPUs this counts NVLink domains, which replicas may well span.
    tpu = devices[0].platform == "tpu"
    found = len({getattr(d, "slice_index", 0) for d in devices}) if tpu else 1
    if tpu and slices not in (0, found):
        where = f"{found} slices" if found > 1 else "one slice"
        raise UserError(
            f"mesh slices={slices}, but the devices are in {where}: leave it out, or give {found}"
        )
    slices = slices or found
    if sizes[0] % slices:
        raise UserError(
            f"{given} makes {sizes[0]} replicas, which {slices} slices do not share evenly: give "
            f"data={slices} or a multiple of it"
        )
    out = math.gcd(sizes[1], _RING)
    shape = (sizes[0], out, sizes[1] // out, sizes[2])
    if found > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices,
            allow_split_physical_axes=True,
        )
    elif tpu:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    _check_groups(grid)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _check_groups(grid: np.ndarray) -> None:
    """Raises `UserError` where tensor shards, which see the same examples, are of several hosts:
    each host reads examples of its own."""
    for group in grid.reshape(-1, grid.shape[-1]):
        hosts = {d.process_index for d in group}
        if len(hosts) > 1:
            raise UserError(
                f"mesh tensor={grid.shape[-1]} joins devices of the processes {sorted(hosts)}: a "
                "group must lie within one process; lower tensor, or use fsdp"
            )


def own(fsdp: int, devices: list) -> Mesh:
    """The mesh of one of several processes on its own devices, with as many of `fsdp` shards as
    these hold."""
    shards = len(devices) if fsdp == -1 else math.gcd(fsdp, len(devices))
    return make(fsdp=shards, devices=devices)


def platform(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`: what a program on this mesh is compiled for."""
    return mesh.devices.flat[0].platform


def fsdp(mesh: Mesh) -> int:
    """Shards of the parameters."""
    return mesh.shape["fsdp"] * mesh.shape["fsdp_in"]


def shards(mesh: Mesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def rounded(size: int, mesh: Mesh) -> int:
    """The batch of at least this size that splits evenly over the mesh."""
    return -(-size // shards(mesh)) * shards(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first axis over replicas and shards."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, name: str) -> None:
    """Raises `UserError` when a batch does not split evenly over the mesh."""
    if batch_size % shards(mesh):
        raise UserError(
            f"{name}={batch_size} does not split over {shards(mesh)} devices: use a multiple of it"
        )
