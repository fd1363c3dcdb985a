"""Parameters in the types that a network uses them in, so that a loop that calls it does not
convert them in every turn: XLA takes conversions out of no loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ldm_scaling.models import backbone

# The places that primitives keep the computation at that they call with all their operands.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def of(spec: backbone.Spec, dtype: Any) -> Callable[[Any], Any]:
    """`narrowed(params) -> params` for a network that computes in `dtype`: what it converts at
    every use is converted, the rest (what it uses as it is, or in several types) is left alone. The
    network's outputs are the same to the bit. Of float32 nothing is converted."""
    if jnp.dtype(dtype) == jnp.float32:
        return lambda params: params

    def one(leaf: jax.Array, used: jnp.dtype) -> jax.Array:
        return leaf if used == jnp.float32 else leaf.astype(used)

    def narrowed(params: Any) -> Any:
        return jax.tree.map(one, params, types(spec, dtype))

    return narrowed


@functools.cache
def types(spec: backbone.Spec, dtype: Any) -> Any:
    """The tree of types that parameters are used in; float32 of those that are left alone."""
    shapes = backbone.param_shapes(spec)
    x_BHWC, t_B, ctx_BLD, *told = backbone.example_inputs(spec)
    cond = {"context": ctx_BLD} | ({"guidance": told[0]} if told else {})
    traced = jax.make_jaxpr(backbone.denoise_fn(spec, dtype))(shapes, x_BHWC, t_B, cond).jaxpr
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten(
        _type_of(traced, var, leaf.dtype) for var, leaf in zip(traced.invars, leaves)
    )


def _type_of(jaxpr: core.Jaxpr, var: core.Var, own: Any) -> Any:
    """The one type that a variable is converted to wherever it is used, or its own."""
    found = _uses(jaxpr, var)
    return found.pop() if len(found) == 1 and None not in found else own


def _uses(jaxpr: core.Jaxpr, var: core.Var) -> set[Any]:
    """The types that a variable is converted to; None among them for a use as it is."""
    found: set[Any] = {None} if any(out is var for out in jaxpr.outvars) else set()
    for equation in jaxpr.eqns:
        for place, operand in enumerate(equation.invars):
            if operand is not var:
                continue
            inner = _called(equation)
            if equation.primitive.name == "convert_element_type":
                found.add(jnp.dtype(equation.params["new_dtype"]))
            elif inner is not None and len(inner.invars) == len(equation.invars):
                found |= _uses(inner, inner.invars[place])
            else:
                found.add(None)
    return found


def _called(equation: core.JaxprEqn) -> core.Jaxpr | None:
    for name in _CALLED:
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None
