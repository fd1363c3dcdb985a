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

Dtype = Any


def timestep_embedding(t_B: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoids of a timestep, cosines first (DDPM's, as Stable Diffusion orders them).

    Args:
      t_B: timesteps, any real number.
      dim: width of the embedding, even.
    Returns:
      (B, dim) float32.
    """
    half = dim // 2
    # In float64: at t = 1000 an error of the last place in float32 moves an angle by 1e-4.
    frequencies = (max_period ** -(np.arange(half) / half)).astype(np.float32)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def conv(features: int, size: int, dtype: Dtype, name: str, *, stride: int = 1, **kw) -> nn.Conv:
    """A square convolution with symmetric padding, as PyTorch pads (also at stride 2)."""
    pad = size // 2
    return nn.Conv(
        features, (size, size), (stride, stride), padding=[(pad, pad), (pad, pad)], dtype=dtype,
        name=name, **kw,
    )


def norm(groups: int, eps: float, dtype: Dtype, name: str) -> nn.GroupNorm:
    """Group normalisation; its statistics are float32 whatever the compute type."""
    return nn.GroupNorm(groups, epsilon=eps, dtype=dtype, name=name)


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
    """

    features: int
    groups: int
    eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, emb_BD: jax.Array | None = None) -> jax.Array:
        h = nn.silu(norm(self.groups, self.eps, self.dtype, "norm1")(x_BHWC))
        h = conv(self.features, 3, self.dtype, "conv1")(h)
        if emb_BD is not None:
            shift = nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(emb_BD))
            h = h + shift[:, None, None, :]
        h = nn.silu(norm(self.groups, self.eps, self.dtype, "norm2")(h))
        h = conv(self.features, 3, self.dtype, "conv2")(h)
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv(self.features, 1, self.dtype, "conv_shortcut")(x_BHWC)
        return x_BHWC + h


def attention(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(W)) v with float32 logits, in the operands' type: (B, N, L, W).

    Heads before tokens, and plain batched products: on XLA:CPU the same sums written as one einsum
    over (b, l, n, w) run 6 times slower forward and 3 times slower backward.
    """
    scale = 1.0 / math.sqrt(q_BNLW.shape[-1])
    logits_BNLM = jnp.matmul(
        q_BNLW * scale, k_BNMW.swapaxes(2, 3), preferred_element_type=jnp.float32
    )
    # Softmax with its division after the second product (as flash attention does): one pass
    # less over (L, M), and backward 2.7 times faster than jax.nn.softmax on XLA:CPU.
    peak = jax.lax.stop_gradient(jnp.max(logits_BNLM, axis=-1, keepdims=True))
    weights = jnp.exp(logits_BNLM - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v_BNMW.dtype), v_BNMW, preferred_element_type=jnp.float32)
    return (out / total).astype(v_BNMW.dtype)


def textbook_attention(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """The same as `attention` (to rounding), as papers write it: the form that FLOPs are counted
    of, so that a faster one does not change a network's cost."""
    logits_BNLM = jnp.matmul(q_BNLW, k_BNMW.swapaxes(2, 3)) / math.sqrt(q_BNLW.shape[-1])
    return jnp.matmul(jax.nn.softmax(logits_BNLM, axis=-1), v_BNMW)


class Attention(nn.Module):
    """Multi-head attention without projection biases but on the output. Softmax in float32.

    Args:
      heads: heads; must divide the width of the queries' tokens.
      bias: biases on the three input projections (the autoencoder has them).
      attention: what queries, keys and values go through, see `attention`.
    """

    heads: int
    bias: bool = False
    dtype: Dtype = jnp.float32
    attention: Callable = attention

    @nn.compact
    def __call__(self, x_BLD: jax.Array, ctx_BMD: jax.Array | None = None) -> jax.Array:
        ctx_BMD = x_BLD if ctx_BMD is None else ctx_BMD
        b, length, d = x_BLD.shape
        width = d // self.heads

        def project(name, y):
            y = nn.Dense(d, use_bias=self.bias, dtype=self.dtype, name=name)(y)
            return y.reshape(b, y.shape[1], self.heads, width).transpose(0, 2, 1, 3)

        q, k, v = project("to_q", x_BLD), project("to_k", ctx_BMD), project("to_v", ctx_BMD)
        out = self.attention(q, k, v).transpose(0, 2, 1, 3).reshape(b, length, d)
        return nn.Dense(d, dtype=self.dtype, name="to_out")(out)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU, each after a layer norm and around a residual."""

    heads: int
    dtype: Dtype = jnp.float32
    attention: Callable = attention

    @nn.compact
    def __call__(self, x_BLD: jax.Array, ctx_BMD: jax.Array) -> jax.Array:
        d = x_BLD.shape[-1]

        def attend(name, *tokens):
            attend = Attention(self.heads, dtype=self.dtype, attention=self.attention, name=name)
            return attend(*tokens)

        def layer_norm(name):
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        x = x_BLD + attend("attn1", layer_norm("norm1")(x_BLD))
        x = x + attend("attn2", layer_norm("norm2")(x), ctx_BMD)
        y = layer_norm("norm3")(x)
        # Two products, where checkpoints hold one of twice the width: its split is slow backward.
        h = nn.Dense(4 * d, dtype=self.dtype, name="ff_in")(y)
        gate = nn.Dense(4 * d, dtype=self.dtype, name="ff_gate")(y)
        h = h * nn.gelu(gate, approximate=False)
        return x + nn.Dense(d, dtype=self.dtype, name="ff_out")(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, conditioned on the context's tokens."""

    heads: int
    groups: int
    dtype: Dtype = jnp.float32
    attention: Callable = attention

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, ctx_BMD: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        y = norm(self.groups, 1e-6, self.dtype, "norm")(x_BHWC).reshape(b, h * w, c)
        y = nn.Dense(c, dtype=self.dtype, name="proj_in")(y)
        y = TransformerBlock(self.heads, self.dtype, self.attention, name="block")(y, ctx_BMD)
        y = nn.Dense(c, dtype=self.dtype, name="proj_out")(y)
        return x_BHWC + y.reshape(b, h, w, c)
