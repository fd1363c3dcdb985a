"""What every network that denoises has beside its module: parameters, their shapes, and `denoise`.

A module has the fields of `Network`, in that order, and is called as `UNet` is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib


class Network(nn.Module):
    """The fields of a network that denoises.

    Attributes:
      spec: which one.
      dtype: compute type; parameters are float32.
      remat: `"none"`, or `"block"` to recompute each block in the backward pass.
      attention: what queries, keys and values go through, see `models.attention`.
      gather: makes layers' weights whole where they are used, if they come in shards, see
        `parallel.gathering`.
    """

    spec: Any
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: Callable = attention_lib.plain
    gather: Callable | None = None


def example_inputs(
    spec: Any, batch: int = 1, tokens: int | None = None
) -> tuple[jax.Array, ...]:
    """Zeros of the shapes that a forward pass takes: x_BHWC, t_B, ctx_BLD of so many tokens or the
    spec's own; w_B if there is one."""
    return (
        jnp.zeros((batch, spec.sample_size, spec.sample_size, spec.in_channels)),
        jnp.zeros((batch,)),
        jnp.zeros((batch, tokens or spec.context_length, spec.context_dim)),
        *([jnp.zeros((batch,))] if spec.guidance_dim else []),
    )


@functools.cache
def of(network: type[nn.Module]) -> tuple[Callable, Callable, Callable]:
    """`init`, `param_shapes` and `denoise_fn` of a module."""

    def init(spec: Any, key: jax.Array) -> dict:
        """Random float32 parameters (use under `jax.eval_shape` to allocate nothing)."""
        return network(spec).init(key, *example_inputs(spec, batch=1))["params"]

    @functools.cache
    def param_shapes(spec: Any) -> Any:
        """Shapes and types of the parameters."""
        return jax.eval_shape(lambda: init(spec, jax.random.key(0)))

    def denoise_fn(
        spec: Any, dtype: Any = jnp.float32, remat: str = "none",
        attention: Callable = attention_lib.plain, gather: Callable | None = None,
    ) -> Callable:
        """The network as `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`: cond["context"] (B, L, D)
        and, for a network that sees one, cond["condition"] (B, H, W, C'), which is laid behind x's
        channels; for one that is told its guidance rate, cond["guidance"] (B,). The arguments are
        `Network`'s. It raises `UserError` for channels, text or sides that the network does not
        take, for a text or guidance rate that is missing, and for an output that is not
        (B, H, W, out_channels)."""
        module = network(spec, dtype, remat, attention, gather)

        def denoise(params, x_BHWC, t_B, cond):
            if not isinstance(cond, Mapping) or "context" not in cond:
                raise UserError(
                    f"cond is {list(cond) if isinstance(cond, Mapping) else type(cond).__name__}: "
                    "give a dict with the text's states, context (B, L, D)"
                )
            if "condition" in cond:
                beside_BHWC = cond["condition"].astype(x_BHWC.dtype)
                x_BHWC = jnp.concatenate([x_BHWC, beside_BHWC], axis=-1)
            ctx_BLD = cond["context"]
            for what, given, field in (
                ("latents, and a condition behind them,", x_BHWC.shape[-1], "in_channels"),
                ("text tokens", ctx_BLD.shape[-1], "context_dim"),
            ):
                if given != (wanted := getattr(spec, field)):
                    raise UserError(f"{what} of width {given}: the network's {field} is {wanted}, "
                                    "so give as many")
            told = [cond.get("guidance")] if spec.guidance_dim else []
            F_BHWC = module.apply({"params": params}, x_BHWC, t_B, ctx_BLD, *told)
            given = getattr(F_BHWC, "shape", type(F_BHWC).__name__)
            if given != (wanted := (*x_BHWC.shape[:-1], spec.out_channels)):
                raise UserError(f"{network.__name__} gives {given}, and by its spec's out_channels "
                                f"should give {wanted}: mend the module, or the spec")
            return F_BHWC

        return denoise

    return init, param_shapes, denoise_fn
