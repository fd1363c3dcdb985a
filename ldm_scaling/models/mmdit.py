"""MM-DiT, the network of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206): picture and text
are two streams of tokens, each with its own weights, which attend to both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import blocks, functional, tokens, unet

# SD3's grid of positions is 192 wide, for latents that make 64 x 64 tokens.
_ROOM = 3


@dataclasses.dataclass(frozen=True)
class MMDiTSpec(tokens.TransformerSpec):
    """What fixes an MM-DiT: its depth alone makes the paper's family. See `tokens.TransformerSpec`
    for the rest.

    Attributes:
      depth: blocks, and attention heads.
      head_width: width of a head.
    """

    depth: int
    head_width: int = 64

    network: ClassVar[str] = "MM-DiT"
    counts: ClassVar[tuple[str, ...]] = ("depth", "head_width")

    @property
    def heads(self) -> int:
        """Attention heads: one for each block."""
        return self.depth

    @property
    def base_channels(self) -> int:
        """Width of the tokens."""
        return self.head_width * self.depth


class Before(nn.Module):
    """A stream's part before attention: queries, keys and values of its modulated tokens, each
    (B, N, L, W), and what modulates its part behind, (B, 4, D). Queries and keys are normalised.

    Args:
      ends: whether nothing of the stream comes behind: then it asks nothing, and both are None.
    """

    heads: int
    ends: bool
    dtype: Any = jnp.float32
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, emb_BD: jax.Array) -> tuple:
        d, dtype = x_BLD.shape[-1], self.dtype
        told_BnD = tokens.modulations(emb_BD, 2 if self.ends else 6, d, dtype, self.gather)
        shift, scale = told_BnD[:, 0], told_BnD[:, 1]
        y = tokens.modulate(tokens.layer_norm(dtype, "norm")(x_BLD), shift, scale)

        def project(name):
            layer = blocks.dense(d, dtype, name, self.gather, kernel_init=tokens.XAVIER_IN)
            return tokens.to_heads(layer(y), self.heads)

        def normed(name, y_BNLW):
            return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)(y_BNLW)

        q = None if self.ends else normed("norm_q", project("to_q"))
        k, v = normed("norm_k", project("to_k")), project("to_v")
        return q, k, v, None if self.ends else told_BnD[:, 2:]


class Behind(nn.Module):
    """A stream's part behind attention: what it found, and an MLP, around gated residuals."""

    dtype: Any = jnp.float32
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, found_BNLW: jax.Array, told_B4D: jax.Array) -> jax.Array:
        dtype = self.dtype
        gate1, shift, scale, gate2 = jnp.moveaxis(told_B4D, 1, 0)
        out = blocks.dense(
            x_BLD.shape[-1], dtype, "to_out", self.gather, kernel_init=tokens.XAVIER
        )
        x = x_BLD + gate1[:, None] * out(tokens.from_heads(found_BNLW))
        y = tokens.modulate(tokens.layer_norm(dtype, "norm")(x), shift, scale)
        return x + gate2[:, None] * tokens.mlp(y, dtype, self.gather)


class Block(nn.Module):
    """Both streams, (B, L, D) and (B, M, D), through attention to both and an MLP each. The last
    block returns None for the text: nothing comes of it any more."""

    heads: int
    last: bool
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(
        self, image_BLD: jax.Array, text_BMD: jax.Array, emb_BD: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        def at(name):
            return self.gather and self.gather.at(name)

        def before(name, x, ends):
            return Before(self.heads, ends, self.dtype, at(name), name=name)(x, emb_BD)

        q, k, v, told = before("image_in", image_BLD, False)
        text_q, text_k, text_v, text_told = before("text_in", text_BMD, self.last)
        k, v = (jnp.concatenate(both, axis=2) for both in ((k, text_k), (v, text_v)))

        # Each stream's queries apart: the image's fill the tiles of a fused kernel so.
        def behind(name, x, q, told):
            layer = Behind(self.dtype, at(name), name=name)
            return layer(x, self.attention(q, k, v), told)

        image = behind("image_out", image_BLD, q, told)
        text = None if self.last else behind("text_out", text_BMD, text_q, text_told)
        return image, text


class MMDiT(functional.Network):
    """`MMDiT(spec).apply({"params": p}, x_BHWC, t_B, ctx_BLD)` -> (B, H, W, out_channels) float32;
    with `spec.guidance_dim` the guidance rates w_B follow.

    SD3 modulates by the time and by pooled states of two CLIP towers. Here text comes as token
    states alone, and their mean over all tokens, padding too, takes the pooled states' place.
    Positions are sinusoids of places that lie about the middle of a grid three times as wide as the
    one that the spec's latents make, a third apart; latents of other sides take more or less of it.
    """

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, ctx_BLD: jax.Array, w_B: jax.Array | None = None
    ) -> jax.Array:
        spec, dtype, gather = self.spec, self.dtype, self.gather
        d = spec.base_channels
        block = tokens.wrapper(self.remat)(Block)

        def dense(features, name, init=tokens.SMALL):
            return blocks.dense(features, dtype, name, gather, kernel_init=init)

        def embed(name, x):
            return dense(d, f"{name}_2")(blocks.silu(dense(d, f"{name}_1")(x)))

        ctx = ctx_BLD.astype(dtype)
        emb = tokens.sinusoids(spec, t_B, w_B, tokens.TIME_WIDTH, dtype, gather)
        emb_BD = embed("time_embedding", emb) + embed("text_embedding", jnp.mean(ctx, axis=1))
        text = dense(d, "text", tokens.XAVIER)(ctx)

        x_BhwD = tokens.patches(spec, x_BHWC, dtype, gather)
        b, h, w, _ = x_BhwD.shape
        rows, columns = (
            ((_ROOM * spec.grid - side) // 2 + np.arange(side)) / _ROOM for side in (h, w)
        )
        x = x_BhwD + tokens.sincos(rows, columns, d).astype(dtype)
        x = x.reshape(b, h * w, d)
        for i in range(spec.depth):
            name = f"block_{i}"
            own, last = gather and gather.at(name), i == spec.depth - 1
            layer = block(spec.heads, last, dtype, self.attention, own, name=name)
            x, text = layer(x, text, emb_BD)
        last_B2D = dense(2 * d, "modulation_out", tokens.ZEROS)(blocks.silu(emb_BD))
        last_B2D = last_B2D.reshape(-1, 2, d)
        x = tokens.layer_norm(dtype, "norm_out")(x)
        x = tokens.modulate(x, last_B2D[:, 0], last_B2D[:, 1])
        x = dense(spec.patch**2 * spec.out_channels, "proj_out", tokens.ZEROS)(x)
        return tokens.picture(x, *x_BHWC.shape[1:3], spec.patch).astype(jnp.float32)


# Drawn as DiT's: at first the network gives 0.
init, param_shapes, denoise_fn = functional.of(MMDiT)
example_inputs = functional.example_inputs
grow_input = unet.grow_input
grow_guidance = tokens.grow_guidance
