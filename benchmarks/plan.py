"""Our train step against one with another U-Net in Flax, by the TPU's own compiler: memory, time,
traffic, before a TPU is there.

    pip install -e '.[tpu-plan]'
    pip install --no-deps --target=/tmp/peer diffusers==0.35.2
    python benchmarks/plan.py --peer=/tmp/peer [--member=866m --topology=v5e:16x16 --batch=2048]

The peer is diffusers' `FlaxUNet2DConditionModel`, of which MaxDiffusion's network is a descendant;
0.35 is the last version that has it. Both have the same sizes, loss, optimiser, average, batch and
mesh; parameters lie in as many parts. The peer's are left to the partitioner, as its users do, ours
are gathered by hand. Nothing runs: these are the compiler's figures.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_scaling import config as config_lib
from ldm_scaling import recipes
from ldm_scaling.parallel import aot, hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import plan, plan_parts
from ldm_scaling.tasks import text_to_image
from ldm_scaling.training import optimizer, state
from ldm_scaling.training import step as step_lib


def peer_of(spec: Any, folder: str, dtype: Any, fused: bool) -> Any:
    """The peer's network with the sizes of ours, in its memory-efficient form or the plain one."""
    sys.path.insert(0, folder)
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    return FlaxUNet2DConditionModel(
        sample_size=spec.sample_size, attention_head_dim=spec.heads, dtype=dtype,
        block_out_channels=tuple(spec.base_channels * m for m in spec.channel_mults),
        cross_attention_dim=spec.context_dim, use_memory_efficient_attention=fused,
    )


def peer_step(study: Any, member: str, devices: list, folder: str, fused: bool) -> tuple:
    """The peer's train step and its arguments' shapes; its number of parameters."""
    mesh, spec = plan_parts.mesh_of(study, devices), plan_parts.spec_of(study, member)
    dtype = hosts.compute_dtype(study.train.compute_dtype, mesh_lib.platform(mesh))
    network = peer_of(spec, folder, dtype, fused)
    context = plan_parts.context_shape(study, spec)

    def init(key):
        x = jnp.zeros((1, spec.in_channels, *spec.latent_shape[:2]))
        ctx = jnp.zeros((1, context[0], spec.context_dim))
        return network.init(key, x, jnp.ones((1,), jnp.int32), ctx)["params"]

    def denoise(params, x, t, cond):
        out = network.apply(
            {"params": params}, x.transpose(0, 3, 1, 2), t, cond["context"], train=True
        )
        return out.sample.transpose(0, 2, 3, 1)

    def sharding(leaf):
        # Output channels over the first ring, input channels over the second, where they divide.
        axes: list[Any] = [None] * leaf.ndim
        for axis, name in ((-1, "fsdp"), (-2, "fsdp_in")):
            if leaf.ndim >= 2 and leaf.shape[axis] % mesh.shape[name] == 0:
                axes[axis] = name
        return NamedSharding(mesh, PartitionSpec(*axes))

    make = optimizer.make(study.train)
    shapes = jax.eval_shape(lambda key: state.create(init(key), make), jax.random.key(0))
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(s)), shapes
    )
    loss = text_to_image.loss_fn(
        denoise, spec, study.train, study.diffusion, 1.0, np.zeros(context, np.float32)
    )
    batch = text_to_image.batch_shapes(
        study.train.batch_size, spec.latent_shape, context, study.data.latent_dtype, mesh
    )
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    step = step_lib.make(loss, study.train, mesh, abstract)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    return step, (abstract, batch, key), mesh, count


def line(name: str, program: aot.Program) -> str:
    """A row of the table."""
    memory, work = program.memory, program.work
    return (
        f"{name:28} {memory.total / 1e9:8.2f} {work.optimistic_seconds:8.3f} "
        f"{work.bytes / 1e9:9.1f} {work.flops / 1e12:8.2f} {program.compile_seconds:9.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="folder that holds diffusers 0.35")
    parser.add_argument("--member", default="866m")
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--batch", type=int, default=2048)
    args = parser.parse_args()
    tree = recipes.text_to_image(args.member)
    tree.train.batch_size, tree.train.remat = args.batch, "none"
    study = config_lib.parse(tree)
    devices = aot.topology(args.topology)
    print(f"{args.member}, batch {args.batch}, {args.topology}, blocks not recomputed")
    print(f"{'':28} {'GB':>8} {'s':>8} {'GB moved':>9} {'TFLOP':>8} {'compile s':>9}", flush=True)
    part = plan_parts.build(study, args.member, devices, "train")
    ours = sum(leaf.size for leaf in jax.tree.leaves(part.args[0].params))
    print(line("ours", plan.compile_part(part)), flush=True)
    for name, fused in (("diffusers, plain attention", False), ("diffusers, in chunks", True)):
        step, shapes, mesh, count = peer_step(study, args.member, devices, args.peer, fused)
        if count != ours:
            raise SystemExit(f"not the same network: {count:,} parameters, ours {ours:,}")
        try:
            print(line(name, aot.compile(step, *shapes, mesh=mesh)), flush=True)
        except aot.DoesNotFit as e:
            needed = f"{e.needed / 1e9:.1f} GB" if e.needed else "more than there is"
            print(f"{name:28} does not fit: {needed}", flush=True)


if __name__ == "__main__":
    main()
