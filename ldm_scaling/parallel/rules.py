"""Sharding rules: regular expressions over parameter paths, which must cover every parameter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import mesh as mesh_lib

Rules = Sequence[tuple[str, PartitionSpec]]

# Layers whose output channels are split between tensor shards, and those that sum up over them.
_SPLITS = r"(to_q|to_k|to_v|ff_in|ff_gate|conv1|time_emb_proj)"
_SUMS = r"(to_out|ff_out|conv2)"
_CONV = r"(conv\w*|\w*sample)"

# Kernels over their input channels, but over their outputs where tensor shards hold these; what
# is one number a channel is held whole. See `shardings` for what does not divide.
DEFAULT: Rules = (
    (r"/conv1/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"/conv2/kernel$", PartitionSpec(None, None, "tensor", "fsdp")),
    (rf"/{_SPLITS}/kernel$", PartitionSpec("fsdp", "tensor")),
    (rf"/{_SUMS}/kernel$", PartitionSpec("tensor", "fsdp")),
    (rf"/{_CONV}/kernel$", PartitionSpec(None, None, "fsdp")),
    (r"/kernel$", PartitionSpec("fsdp")),
    (r"/(bias|scale)$", PartitionSpec()),
    (r"/(embedding|positions)$", PartitionSpec()),  # of text encoders that are trained along
)


def path_name(path: tuple) -> str:
    """`opt_state/0/mu/conv_in/kernel` of a tree path."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
    )


def specs(tree: Any, rules: Rules = DEFAULT) -> Any:
    """The `PartitionSpec` of every leaf: the first rule that matches its path; scalars are whole.

    Raises:
      UserError: naming the leaves that no rule covers, or a rule with more axes than its leaf.
    """
    uncovered = []

    def spec(path, leaf):
        name = "/" + path_name(path)
        if leaf.ndim == 0:
            return PartitionSpec()
        for pattern, rule in rules:
            if re.search(pattern, name):
                if len(rule) > leaf.ndim:
                    raise UserError(
                        f"sharding rule {pattern!r} has {len(rule)} axes but {name} has shape "
                        f"{leaf.shape}: write a rule for it before that one"
                    )
                return rule
        uncovered.append(f"{name} {leaf.shape}")
        return PartitionSpec()

    out = jax.tree_util.tree_map_with_path(spec, tree)
    if uncovered:
        shown = ", ".join(uncovered[:5]) + (" ..." if len(uncovered) > 5 else "")
        raise UserError(f"no sharding rule covers {len(uncovered)} parameters: {shown}")
    return out


def shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT) -> Any:
    """The `NamedSharding` of every leaf.

    A dimension that the axis of its rule does not divide is held whole. `fsdp` moves to the other
    one of a kernel's last two, its channels, where that divides and is free; if not over all its
    devices, then over one ring of them, and is repeated over the rings.
    """
    sizes = {**mesh.shape, "fsdp": mesh_lib.fsdp(mesh)}

    def fit(leaf, spec):
        axes = [
            axis if axis and axis != "fsdp" and sizes[axis] > 1 and size % sizes[axis] == 0
            else None
            for size, axis in zip(leaf.shape, (*spec, *[None] * (leaf.ndim - len(spec))))
        ]
        if "fsdp" in spec and sizes["fsdp"] > 1:
            _place_fsdp(leaf.shape, axes, spec.index("fsdp"), mesh)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(fit, tree, specs(tree, rules))


def _place_fsdp(shape: tuple[int, ...], axes: list, at: int, mesh: Mesh) -> None:
    channels = [at, *(d for d in range(max(0, len(shape) - 2), len(shape)) if d != at)]
    whole = ("fsdp", "fsdp_in") if mesh.shape["fsdp_in"] > 1 else "fsdp"
    for axis, size in ((whole, mesh_lib.fsdp(mesh)), ("fsdp", mesh.shape["fsdp"])):
        for dim in channels:
            if axes[dim] is None and shape[dim] % size == 0:
                axes[dim] = axis
                return
