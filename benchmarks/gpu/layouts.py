"""A train state whose convolutions' kernels lie in memory as cuDNN takes and gives them.

A kernel is (height, width, in, out) to the program, and to cuDNN's kernels for features with their
channels last (out, height, width, in). As XLA compiles a step for a GPU, kernels are turned before
use and gradients after it. Held in cuDNN's order (`jax.experimental.layout`) they are not: shapes
and values are the same, so checkpoints are.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from jax.experimental.layout import Format, Layout

from ldm_scaling.parallel import mesh as mesh_lib

if TYPE_CHECKING:
    from ldm_scaling.study.plan_parts import Part

_OUT_FIRST = Layout(major_to_minor=(3, 0, 1, 2))


def formats(state: Any) -> Any:
    """The format of every array of a state, shapes with shardings."""
    def one(shape: jax.ShapeDtypeStruct) -> Any:
        return Format(_OUT_FIRST, shape.sharding) if len(shape.shape) == 4 else shape.sharding

    return jax.tree.map(one, state)


def jitted(step: Any, state: Any, mesh: jax.sharding.Mesh) -> Any:
    """A train step (see `training.step.make`) of such a state."""
    held, whole = formats(state), mesh_lib.replicated(mesh)
    return jax.jit(
        step.__wrapped__, in_shardings=(held, mesh_lib.batch_sharding(mesh), whole),
        out_shardings=(held, whole), donate_argnums=0,
    )


def unplaced(state: Any) -> Any:
    """Shapes without shardings, which formats bring along."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), state)


def of_part(part: Part) -> Part:
    """A plan's train step, likewise."""
    state, *rest = part.args
    return dataclasses.replace(
        part, program=jitted(part.program, state, part.mesh), args=(unplaced(state), *rest)
    )
