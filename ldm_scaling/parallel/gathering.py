"""Fully sharded data parallelism by hand: each device computes its own examples, and gathers each
layer's weights where it uses them (ZeRO stage 3, Rajbhandari et al. 2020, arXiv 1910.02054).

Left to the compiler's partitioner the same step takes more memory and time: it gathers in float32,
and may move activations instead of weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import rules


@dataclasses.dataclass(frozen=True, eq=False)
class Gather:
    """Products with weights of which each device holds a shard, inside of `spread`.

    `gather.at("layer")(product)` is `product(x, shard, ...)`, for a product that is linear in both:
    the weights are gathered for it, and again for the backward pass rather than kept, in the type
    that they come in. Their gradient is summed over the shards in that type on its way back, or in
    float32 if `wide`.

    Attributes:
      specs: path of a kernel -> its `PartitionSpec`.
      prefix: of the paths below.
      wide: whether gradients are summed in float32, whatever they come in.
    """

    specs: dict[str, PartitionSpec]
    prefix: str = ""
    wide: bool = False

    def at(self, name: str) -> Gather:
        """The same, for what lies below a name."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}/")

    def __call__(self, product: Callable) -> Callable:
        """The product with the whole kernel of this layer."""
        spec = self.specs[f"{self.prefix}kernel"]
        dims = tuple(
            (dim, (axes,) if isinstance(axes, str) else axes)
            for dim, axes in enumerate(spec) if axes is not None
        )

        def whole(x, shard, *args, **kwargs):
            def run(x, kernel):
                return product(x, kernel, *args, **kwargs)

            return _product(run, dims, self.wide, x, shard) if dims else run(x, shard)

        return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    run: Callable, dims: tuple, wide: bool, x: jax.Array, shard: jax.Array
) -> jax.Array:
    return run(x, _whole(dims, shard))


def _forward(run, dims, wide, x, shard):
    return run(x, _whole(dims, shard)), (x, shard)


def _backward(run, dims, wide, kept, cotangent):
    x, shard = kept
    # The barrier keeps the compiler from holding the first gather's result for this one.
    kernel = _whole(dims, lax.optimization_barrier(shard))
    d_x, d_kernel = jax.vjp(run, x, kernel)[1](cotangent)
    sums = jnp.float32 if wide else shard.dtype
    return d_x, _part(dims, d_kernel.astype(sums)).astype(shard.dtype)


_product.defvjp(_forward, _backward)


# One mesh axis after the other: a gather over both at once, the TPU's compiler turns into a sum of
# padded arrays, which sends twice as much.


def _whole(dims: tuple, shard: jax.Array) -> jax.Array:
    for dim, axes in dims:
        for axis in reversed(axes):
            shard = lax.all_gather(shard, axis, axis=dim, tiled=True)
    return shard


def _part(dims: tuple, kernel: jax.Array) -> jax.Array:
    for dim, axes in dims:
        for axis in axes:
            # Along a new first axis: it stays a scattered sum then.
            n = lax.axis_size(axis)
            shape = (*kernel.shape[:dim], n, kernel.shape[dim] // n, *kernel.shape[dim + 1 :])
            parts = jnp.moveaxis(kernel.reshape(shape), dim, 0)
            kernel = lax.psum_scatter(parts, axis, scatter_dimension=0)
    return kernel


def _manual(shardings: Any) -> Any:
    """Their `PartitionSpec`s without `tensor`, which stays the compiler's."""

    def one(sharding: NamedSharding) -> PartitionSpec:
        return PartitionSpec(*(None if axes == "tensor" else axes for axes in sharding.spec))

    return jax.tree.map(one, shardings)


def spread(
    make: Callable[[Gather | None, bool], Callable], shapes: Any, mesh: Mesh,
    gathers: bool = True,
) -> Callable:
    """`denoise(params, x_BHWC, t_B, cond)` over a mesh: parameters lie as `rules` say, the batch
    over replicas and shards. A batch that does not split is left to the compiler.

    Args:
      make: `make(gather, apart) -> denoise` of a network whose layers multiply through `gather`, if
        it is not None. `apart` says whether each device computes its own examples, or the compiler
        splits the program.
      shapes: the parameters' shapes.
      mesh: the devices.
      gathers: whether the layers multiply through `gather`. Where they do not, shards are left to
        the compiler.
    """
    platform = mesh_lib.platform(mesh)
    if mesh.size == 1:
        return make(None, True)
    if mesh_lib.shards(mesh) == 1 and platform != "tpu":
        # By hand over axes of one device beside `tensor`, XLA compiles no backward pass but for
        # TPUs, where attention's kernel needs it. The GPU's kernel is split by the compiler.
        return make(None, platform == "gpu")
    whole = make(None, False)
    specs = _manual(rules.shardings(shapes, mesh))
    paths = {
        rules.path_name(path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs)
    }
    sharded = any(any(spec) for spec in paths.values())
    if sharded and not gathers:
        return whole
    # A sum in bfloat16 beside axes that are the compiler's ends XLA:CPU, and with it the process.
    wide = platform == "cpu" and mesh.shape["tensor"] > 1
    local = make(Gather(paths, wide=wide) if sharded else None, True)
    batch = PartitionSpec(mesh_lib.BATCH_AXES)
    # With one tensor shard nothing is left to the compiler, which could not split a Pallas kernel.
    axes = mesh_lib.AXES if mesh.shape["tensor"] == 1 else mesh_lib.BATCH_AXES
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, batch, batch, batch), out_specs=batch,
        axis_names=set(axes), check_vma=False,
    )

    def denoise(params, x_BHWC, t_B, cond):
        if x_BHWC.shape[0] % mesh_lib.shards(mesh):
            return whole(params, x_BHWC, t_B, cond)
        return run(params, x_BHWC, t_B, cond)

    return denoise
