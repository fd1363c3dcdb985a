"""Sharding rules: regular expressions over parameter paths, which must cover every parameter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.errors import UserError

Rules = Sequence[tuple[str, PartitionSpec]]

# Kernels over their output channels; what is one number a channel is held whole.
DEFAULT: Rules = (
    (r"conv\w*/kernel$|sample/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"/kernel$", PartitionSpec(None, "fsdp")),
    (r"/(bias|scale)$", PartitionSpec()),
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
    """The `NamedSharding` of every leaf. An axis that the mesh's does not divide is held whole."""

    def fit(leaf, spec):
        axes = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, spec, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(fit, tree, specs(tree, rules))
