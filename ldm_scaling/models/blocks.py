"""Blocks that the U-Net and the autoencoder share; NHWC, the order of operations is SD's own.

Shape legend: B batch, H height, W width, C channels, L tokens, D width of a token, N heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import default_kernel_init

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib

Dtype = Any


def timestep_embedding(t_B: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of a timestep, cosines first (DDPM's, as Stable Diffusion orders them).

    Args:
      t_B: timesteps, any real number.
      dim: width of the embedding, even.
    Returns:
      (B, dim) float32.
    """
    half = dim // 2
    # In float64: at t = 1000 an error of the last place in float32 moves an angle by 1e-4.
    frequencies = (10_000.0 ** -(np.arange(half) / half)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def guidance_embedding(w_B: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of a guidance rate, sines first, of w - 1: in published networks no guidance is 0.

    Args:
      w_B: rates w of F_u + w (F_c - F_u).
      dim: width of the embedding, even, at least 4.
    Returns:
      (B, dim) float32.

    Source: Meng et al. 2023 (On Distillation of Guided Diffusion Models), section 3; Luo et al.
    2023 (LCM); diffusers' `get_guidance_scale_embedding`, after VDM's embedding of time.
    """
    half = dim // 2
    frequencies = (10_000.0 ** -(np.arange(half) / (half - 1))).astype(np.float32)
    angles = (1000.0 * (w_B.astype(jnp.float32) - 1.0))[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class _Sharded:
    """A layer that may be given its part of the kernel in place of the whole."""

    def param(self, name: str, init_fn: Callable, *init_args: Any, **init_kwargs: Any) -> Any:
        if self.sharded and not self.is_initializing():
            return self.get_variable("params", name)  # Flax would refuse its shape.
        return super().param(name, init_fn, *init_args, **init_kwargs)


class Dense(_Sharded, nn.Dense):
    """flax's, for parts of kernels too."""

    sharded: bool = False


class Conv(_Sharded, nn.Conv):
    """flax's, for parts of kernels too."""

    sharded: bool = False


def dense(
    features: int, dtype: Dtype, name: str, gather: Callable | None = None, **kw
) -> nn.Dense:
    """A linear layer over the last axis.

    Args:
      gather: `gather.at(name)(product)` is the product with the kernel that its operand is a part
        of, see `parallel.gathering`.
    """
    if gather is not None:
        kw |= {"dot_general": gather.at(name)(jax.lax.dot_general), "sharded": True}
    return Dense(features, dtype=dtype, name=name, **kw)


def check_guidance(spec: Any, network: str) -> None:
    """Raises `UserError` for a spec's `guidance_dim` that no embedding has."""
    wide = spec.guidance_dim
    if not isinstance(wide, int) or wide < 0 or wide % 2 or wide == 2:
        raise UserError(f"{network} guidance_dim={wide!r}: give 0, or an even number from 4 on")


def with_guidance(
    emb_BD: jax.Array, w_B: jax.Array | None, spec: Any, network: str, gather: Callable | None,
    **kw: Any,
) -> jax.Array:
    """An embedding, to which that of a guidance rate is added through the layer
    `guidance_embedding` if the spec's network is told one; `kw` is of that layer.

    Raises:
      UserError: for a rate that is missing, or that the network is not told.
    """
    if (w_B is None) == bool(spec.guidance_dim):
        needs = "needs each sample's" if w_B is None else "knows no"
        raise UserError(f"{network} with guidance_dim={spec.guidance_dim} {needs} guidance rate")
    if w_B is None:
        return emb_BD
    told = guidance_embedding(w_B, spec.guidance_dim).astype(emb_BD.dtype)
    layer = dense(
        emb_BD.shape[-1], emb_BD.dtype, "guidance_embedding", gather, use_bias=False, **kw
    )
    return emb_BD + layer(told)


def conv(
    features: int, size: int, dtype: Dtype, name: str, *, stride: int = 1,
    gather: Callable | None = None, **kw,
) -> nn.Conv:
    """A square convolution with symmetric padding, as PyTorch pads (also at stride 2)."""
    if gather is not None:
        product = gather.at(name)(jax.lax.conv_general_dilated)
        kw |= {"conv_general_dilated": product, "sharded": True}
    pad = size // 2
    return Conv(
        features, (size, size), (stride, stride), padding=[(pad, pad), (pad, pad)], dtype=dtype,
        name=name, **kw,
    )


class GroupNorm(nn.Module):
    """Group normalisation, see `group_norm`.

    Args:
      groups: of channels; must divide their number.
      epsilon: added to the variance.
      activated: whether SiLU follows.
    """

    groups: int
    epsilon: float
    dtype: Dtype = jnp.float32
    activated: bool = False

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        scale_C = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias_C = self.param("bias", nn.initializers.zeros_init(), (channels,))
        return group_norm(
            x_BHWC, scale_C, bias_C, self.groups, self.epsilon, self.dtype, self.activated
        )


def group_norm(
    x_BHWC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int, epsilon: float,
    dtype: Dtype, activated: bool = False,
) -> jax.Array:
    """Group normalisation (Wu & He 2018, arXiv 1803.08494), then SiLU if `activated`; statistics
    in float32, the result in `dtype`.

    Sums are taken per channel, and groups of channels are joined in what is left of them: features
    split into groups would be copied into another layout and back on a TPU.
    """
    channels = x_BHWC.shape[-1]
    x = x_BHWC.astype(jnp.float32)
    space = tuple(range(1, x.ndim - 1))

    def mean(y):
        y_BGc = jnp.mean(y, space).reshape(-1, groups, channels // groups)
        return jnp.mean(y_BGc, -1, keepdims=True)

    mean_BG1 = mean(x)
    variance_BG1 = jnp.maximum(mean(x * x) - mean_BG1**2, 0.0)
    rate_BG1 = jax.lax.rsqrt(variance_BG1 + epsilon)
    rate_BGc = rate_BG1 * scale_C.reshape(groups, -1)
    shift_BGc = bias_C.reshape(groups, -1) - mean_BG1 * rate_BGc
    rate, shift = (
        jnp.expand_dims(y.reshape(-1, channels), space) for y in (rate_BGc, shift_BGc)
    )
    y_BHWC = (x * rate + shift).astype(dtype)
    return silu(y_BHWC) if activated else y_BHWC


def norm(
    groups: int, eps: float, dtype: Dtype, name: str, activated: bool = False
) -> GroupNorm:
    """Group normalisation; its statistics are float32 whatever the compute type."""
    return GroupNorm(groups, eps, dtype, activated, name=name)


# What a gradient needs of these is computed again from their operands, in float32: kept, it takes
# as much memory as they do. It is written otherwise than forward, where the compiler would join
# equal expressions and keep them after all.


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x) (Elfwing et al. 2017, arXiv 1702.03118)."""
    return nn.silu(x)


def _silu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    y, d = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    weight = 1.0 / (1.0 + jnp.exp(-y))
    return ((d * weight * (1.0 + y * (1.0 - weight))).astype(x.dtype),)


@jax.custom_vjp
def geglu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x gate Phi(gate), with the exact normal distribution function (Shazeer 2020, arXiv
    2002.05202)."""
    # In float32 throughout: in a narrower type XLA for GPUs writes and reads a product within it.
    y = gate.astype(jnp.float32)
    phi = 0.5 * y * jax.lax.erfc(-y / math.sqrt(2.0))
    return (x.astype(jnp.float32) * phi).astype(x.dtype)


def _geglu_backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    x, gate, d = (y.astype(jnp.float32) for y in (*kept, cotangent))
    below = 0.5 * (1.0 + jax.lax.erf(gate / math.sqrt(2.0)))
    slope = below + gate * jnp.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
    dtype = cotangent.dtype
    return (d * gate * below).astype(dtype), (d * x * slope).astype(dtype)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)
geglu.defvjp(lambda x, gate: (geglu(x, gate), (x, gate)), _geglu_backward)


def upsample(x_BHWC: jax.Array) -> jax.Array:
    """Nearest-neighbour doubling of both sides."""
    b, h, w, c = x_BHWC.shape
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a residual; the timestep enters between the two.

    Args:
      features: channels out.
      groups: groups of the normalisation.
      eps: its epsilon (1e-5 in the U-Net, 1e-6 in the autoencoder).
      gather: see `dense`; in all blocks, that of the block's own place.
      out_init: what draws the kernel of the last layer.
    """

    features: int
    groups: int
    eps: float = 1e-5
    dtype: Dtype = jnp.float32
    gather: Callable | None = None
    out_init: Callable = default_kernel_init

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, emb_BD: jax.Array | None = None) -> jax.Array:
        width, dtype, gather = self.features, self.dtype, self.gather
        h = norm(self.groups, self.eps, dtype, "norm1", activated=True)(x_BHWC)
        h = conv(width, 3, dtype, "conv1", gather=gather)(h)
        if emb_BD is not None:
            shift = dense(width, dtype, "time_emb_proj", gather)(silu(emb_BD))
            h = h + shift[:, None, None, :]
        h = norm(self.groups, self.eps, dtype, "norm2", activated=True)(h)
        h = conv(width, 3, dtype, "conv2", gather=gather, kernel_init=self.out_init)(h)
        if x_BHWC.shape[-1] != width:
            x_BHWC = conv(width, 1, dtype, "conv_shortcut", gather=gather)(x_BHWC)
        return x_BHWC + h


class Attention(nn.Module):
    """Multi-head attention without projection biases but on the output. Softmax in float32.

    Args:
      heads: heads; must divide the width of the queries' tokens.
      bias: biases on the three input projections (the autoencoder has them).
      attention: what queries, keys and values go through, see `models.attention`.
    """

    heads: int
    bias: bool = False
    dtype: Dtype = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, ctx_BMD: jax.Array | None = None) -> jax.Array:
        ctx_BMD = x_BLD if ctx_BMD is None else ctx_BMD
        b, length, d = x_BLD.shape
        width = d // self.heads

        def project(name, y):
            y = dense(d, self.dtype, name, self.gather, use_bias=self.bias)(y)
            return y.reshape(b, y.shape[1], self.heads, width).transpose(0, 2, 1, 3)

        q, k, v = project("to_q", x_BLD), project("to_k", ctx_BMD), project("to_v", ctx_BMD)
        out = self.attention(q, k, v).transpose(0, 2, 1, 3).reshape(b, length, d)
        return dense(d, self.dtype, "to_out", self.gather)(out)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU, each after a layer norm and around a residual."""

    heads: int
    dtype: Dtype = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, ctx_BMD: jax.Array) -> jax.Array:
        d = x_BLD.shape[-1]

        def attend(name, *tokens):
            gather = self.gather and self.gather.at(name)
            attend = Attention(
                self.heads, dtype=self.dtype, attention=self.attention, gather=gather, name=name
            )
            return attend(*tokens)

        def layer_norm(name):
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        x = x_BLD + attend("attn1", layer_norm("norm1")(x_BLD))
        x = x + attend("attn2", layer_norm("norm2")(x), ctx_BMD)
        y = layer_norm("norm3")(x)
        # Two products, where checkpoints hold one of twice the width: its split is slow backward.
        h = dense(4 * d, self.dtype, "ff_in", self.gather)(y)
        gate = dense(4 * d, self.dtype, "ff_gate", self.gather)(y)
        h = geglu(h, gate)
        return x + dense(d, self.dtype, "ff_out", self.gather)(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, conditioned on the context's tokens.

    Args:
      out_init: what draws the kernel of the last layer.
    """

    heads: int
    groups: int
    dtype: Dtype = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None
    out_init: Callable = default_kernel_init

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, ctx_BMD: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        y = norm(self.groups, 1e-6, self.dtype, "norm")(x_BHWC).reshape(b, h * w, c)
        y = dense(c, self.dtype, "proj_in", self.gather)(y)
        gather = self.gather and self.gather.at("block")
        block = TransformerBlock(self.heads, self.dtype, self.attention, gather, name="block")
        y = block(y, ctx_BMD)
        y = dense(c, self.dtype, "proj_out", self.gather, kernel_init=self.out_init)(y)
        return x_BHWC + y.reshape(b, h, w, c)
