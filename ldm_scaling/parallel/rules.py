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
_ADDED: list[tuple[str, PartitionSpec]] = []


def add(*rules: tuple[str, Sequence[str | None]]) -> None:
    """Rules of one's own networks, asked before all others, the first added first.

    They are asked of every network: let patterns name layers that no other has, such as
    `r"/mine_\\w+/kernel$"`.

    Args:
      rules: a regular expression that is searched for in a parameter's path, and the mesh axis,
        `fsdp` or `tensor`, that each of its dimensions is split over, or None; () holds it whole.
    Raises:
      UserError: for what is no such pair, or another axis.
    """
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise UserError(f"sharding rule {rule!r} is no pair of a pattern and axes")
        pattern, axes = rule
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"sharding rule {pattern!r} is no regular expression: {e}") from e
        if not isinstance(axes, tuple | list | PartitionSpec) or any(
            axis not in (None, "fsdp", "tensor") for axis in axes
        ):
            raise UserError(
                f"sharding rule {pattern!r} has axes {axes!r}: give a tuple of None, 'fsdp' and "
                "'tensor'"
            )
    new = [(pattern, PartitionSpec(*axes)) for pattern, axes in rules]
    _ADDED.extend(rule for rule in new if rule not in _ADDED)


def path_name(path: tuple) -> str:
    """`opt_state/0/mu/conv_in/kernel` of a tree path."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
    )


def specs(tree: Any, rules: Rules | None = None) -> Any:
    """The `PartitionSpec` of every leaf: the first rule that matches its path; scalars are whole.

    Args:
      tree: arrays or shapes.
      rules: None are those that were added, then `DEFAULT`.
    Raises:
      UserError: naming the leaves that no rule covers, or a rule with more axes than its leaf.
    """
    uncovered = []
    rules = (*_ADDED, *DEFAULT) if rules is None else rules

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
        end = uncovered[0].split(" ")[0].rpartition("/")[2]
        raise UserError(
            f"no sharding rule covers {len(uncovered)} parameters: {shown}; where the network is "
            f'defined, add one: ldm_scaling.parallel.rules.add((r"/{end}$", ())) holds it whole on '
            'every device, ("fsdp",) splits its first dimension'
        )
    return out


def shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
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
