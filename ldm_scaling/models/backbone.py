"""Every network that denoises, behind one set of functions: what kind it is, its spec says.

A new kind is a module with these functions and a row of `_MODULES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import dit, edm2, mmdit, unet, uvit

Spec = unet.UNetSpec | dit.DiTSpec | uvit.UViTSpec | mmdit.MMDiTSpec | edm2.EDM2Spec
"""What fixes a network. All have `base_channels`, `in_channels`, `out_channels`, `sample_size`,
`latent_shape`, `downsampling`, `heads`, `context_dim`, `context_length`, `guidance_dim` and
`grown`."""

_MODULES: dict[type, ModuleType] = {
    unet.UNetSpec: unet, dit.DiTSpec: dit, uvit.UViTSpec: uvit, mmdit.MMDiTSpec: mmdit,
    edm2.EDM2Spec: edm2,
}


def init(spec: Spec, key: jax.Array) -> Any:
    """Random float32 parameters (use under `jax.eval_shape` to allocate nothing)."""
    return _MODULES[type(spec)].init(spec, key)


@functools.cache
def initializer(spec: Spec) -> Callable[[jax.Array], Any]:
    """`init` as a function of the key: one object for each spec, to be traced but once."""
    return functools.partial(init, spec)


def param_shapes(spec: Spec) -> Any:
    """Shapes and types of the parameters."""
    return _MODULES[type(spec)].param_shapes(spec)


def example_inputs(spec: Spec, batch: int = 1) -> tuple[jax.Array, ...]:
    """Zeros of the shapes that a forward pass takes: x_BHWC, t_B, ctx_BLD; w_B if there is one."""
    return _MODULES[type(spec)].example_inputs(spec, batch)


def denoise_fn(
    spec: Spec, dtype: Any = jnp.float32, remat: str = "none",
    attention: Callable = attention_lib.plain, gather: Callable | None = None,
) -> Callable:
    """The network as `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`, see `functional.of`."""
    return _MODULES[type(spec)].denoise_fn(spec, dtype, remat, attention, gather)


def most_tokens(spec: Spec) -> int | None:
    """The most text tokens that a network takes; None of one that takes any number."""
    return spec.context_length if isinstance(spec, uvit.UViTSpec) else None


def heads(spec: Spec) -> set[int]:
    """The numbers of attention heads in its layers."""
    return {spec.heads} if isinstance(spec.heads, int) else set(spec.heads)


def grow_input(spec: Spec, params: Any, channels: int) -> Any:
    """Parameters of `spec` with a first layer that takes so many channels more, by weights of zero:
    the network gives what it gave, see `unet.grow_input`."""
    return _MODULES[type(spec)].grow_input(params, channels)


def grow_guidance(spec: Spec, params: Any, dim: int) -> Any:
    """Parameters of `spec` told a guidance rate too (`guidance_dim=dim`), by weights of zero: the
    network gives what it gave, see `unet.grow_guidance`."""
    return _MODULES[type(spec)].grow_guidance(params, dim)
