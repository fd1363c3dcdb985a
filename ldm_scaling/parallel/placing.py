"""Arrays to the devices of a mesh and back, on one process or several.

What is placed on devices of several processes must be the same in each of them; each gives its own
devices their part, and nothing is sent. What comes back is sent where a process lacks a part: then
all must ask for it, in the same order.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ldm_scaling.parallel import mesh as mesh_lib


def put(tree: Any, shardings: Any) -> Any:
    """Arrays, numpy's or of one device, placed as a tree of shardings says, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays whole on every device."""
    return put(tree, mesh_lib.replicated(mesh))


def put_batch(mesh: Mesh, tree: Any) -> Any:
    """Arrays placed with their first axis over replicas and shards; whole where it does not split.

    Every process holds the whole batch, and each takes its own part of it; training uses what each
    process has read by itself.
    """

    def sharding(leaf):
        fits = leaf.shape[0] % mesh_lib.shards(mesh) == 0
        return mesh_lib.batch_sharding(mesh) if fits else mesh_lib.replicated(mesh)

    return jax.tree.map(lambda leaf: _put(leaf, sharding(leaf)), tree)


def one_copy(tree: Any) -> Any:
    """Arrays of this process's devices without their replicas: each on the devices that hold one
    copy of it. Nothing is moved, the buffers are the same. What lies on no mesh is left as it is.
    """

    def first(leaf: Any) -> Any:
        own = getattr(leaf, "sharding", None)
        if not isinstance(own, NamedSharding):
            return leaf
        axes = [(axis,) if isinstance(axis, str) else axis or () for axis in own.spec]
        split = set(itertools.chain(*axes))
        place = [slice(None) if name in split else slice(1) for name in own.mesh.axis_names]
        devices = own.mesh.devices[tuple(place)]
        held = {shard.device: shard.data for shard in leaf.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            leaf.shape, NamedSharding(Mesh(devices, own.mesh.axis_names), own.spec),
            [held[device] for device in devices.flat],
        )

    return jax.tree.map(first, tree)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, numpy, in every process."""

    def get(leaf):
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)
