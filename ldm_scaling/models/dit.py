"""DiT (Peebles & Xie 2023, arXiv 2212.09748), and its text form of PixArt-alpha (Chen et al. 2023,
arXiv 2310.00426). SiT (Ma et al. 2024, arXiv 2401.08740) is the same network, trained otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import blocks, functional, tokens, unet

CONDITIONINGS = ("cross", "pooled")
# As if keys and values were one layer, which they are in PixArt-alpha's code.
XAVIER_PAIR = nn.initializers.variance_scaling(2 / 3, "fan_avg", "uniform")


@dataclasses.dataclass(frozen=True)
class DiTSpec(tokens.TransformerSpec):
    """What fixes a DiT. See `tokens.TransformerSpec` for the rest.

    Attributes:
      base_channels: width of its tokens.
      depth: blocks.
      heads: attention heads.
      conditioning: how blocks are told of the time and the text.
        `"cross"`: PixArt-alpha's. Attention to the text tokens, which an MLP brings to the
        network's width; shifts, scales and gates are the time's, from one layer for all blocks, to
        which each block adds its own (adaLN-single).
        `"pooled"`: DiT's own. Each block makes its shifts, scales and gates (adaLN-Zero) of the
        time plus a linear layer of the text tokens' mean; with a class as one token, 1 at its
        place and else 0, that layer is DiT's table of classes.
    """

    base_channels: int
    depth: int
    heads: int
    conditioning: str = "cross"

    network: ClassVar[str] = "DiT"

    def __post_init__(self):
        super().__post_init__()
        if self.conditioning not in CONDITIONINGS:
            raise UserError(
                f"DiT conditioning={self.conditioning!r} is not one of {', '.join(CONDITIONINGS)}"
            )


class Offsets(nn.Module):
    """A block's own part of shifts, scales and gates that all blocks share."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, shared_BnD: jax.Array) -> jax.Array:
        n, d = shared_BnD.shape[1:]
        own_nD = self.param("bias", nn.initializers.normal(d**-0.5), (n, d))
        return shared_BnD + own_nD.astype(self.dtype)


class Block(nn.Module):
    """Self-attention, attention to a context if there is one, and an MLP, around residuals. The
    first and the last follow a modulated layer norm and go through a gate.

    Called with x_BLD, ctx_BMD or None, and what modulates: the time's embedding (B, D), or with a
    context what all blocks share (B, 6, D).
    """

    heads: int
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, ctx_BMD: jax.Array | None, told: jax.Array
    ) -> jax.Array:
        dtype, d = self.dtype, x_BLD.shape[-1]

        def attend(name, *args, **kw):
            gather = self.gather and self.gather.at(name)
            attend = tokens.Attention(
                self.heads, dtype=dtype, attention=self.attention, gather=gather, name=name, **kw
            )
            return attend(*args)

        if ctx_BMD is None:
            told_B6D = tokens.modulations(told, 6, d, dtype, self.gather)
        else:
            told_B6D = Offsets(dtype, name="modulation")(told)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(told_B6D, 1, 0)
        y = tokens.modulate(tokens.layer_norm(dtype, "norm1")(x_BLD), shift1, scale1)
        x = x_BLD + gate1[:, None] * attend("attn1", y)
        if ctx_BMD is not None:  # without a norm before it, as PixArt-alpha's code has it
            x = x + attend(
                "attn2", x, ctx_BMD, init=tokens.XAVIER, value_init=XAVIER_PAIR,
                out_init=tokens.ZEROS,
            )
        y = tokens.modulate(tokens.layer_norm(dtype, "norm2")(x), shift2, scale2)
        return x + gate2[:, None] * tokens.mlp(y, dtype, self.gather)


class DiT(functional.Network):
    """`DiT(spec).apply({"params": p}, x_BHWC, t_B, ctx_BLD)` -> (B, H, W, out_channels) float32;
    with `spec.guidance_dim` the guidance rates w_B follow.

    Positions are sinusoids of places on the grid that the spec's latents make: latents of other
    sides are read as finer or coarser pictures of the same field.
    """

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, ctx_BLD: jax.Array, w_B: jax.Array | None = None
    ) -> jax.Array:
        spec, dtype, gather = self.spec, self.dtype, self.gather
        d, cross = spec.base_channels, spec.conditioning == "cross"
        block = tokens.wrapper(self.remat)(Block)

        def dense(features, name, init=tokens.SMALL, **kw):
            return blocks.dense(features, dtype, name, gather, kernel_init=init, **kw)

        emb = tokens.sinusoids(spec, t_B, w_B, tokens.TIME_WIDTH, dtype, gather)
        emb_BD = dense(d, "time_embedding_2")(blocks.silu(dense(d, "time_embedding_1")(emb)))
        ctx = ctx_BLD.astype(dtype)
        if cross:
            told = tokens.modulations(emb_BD, 6, d, dtype, gather, tokens.SMALL)
            ctx = dense(d, "text_2")(nn.gelu(dense(d, "text_1")(ctx)))
            last_B2D = Offsets(dtype, name="modulation_out")(
                jnp.broadcast_to(emb_BD[:, None], (emb_BD.shape[0], 2, d))
            )
        else:
            told = emb_BD + dense(d, "text_embedding", use_bias=False)(jnp.mean(ctx, axis=1))
            ctx = None
            last_B2D = dense(2 * d, "modulation_out", tokens.ZEROS)(blocks.silu(told))
            last_B2D = last_B2D.reshape(-1, 2, d)

        x_BhwD = tokens.patches(spec, x_BHWC, dtype, gather)
        b, h, w, _ = x_BhwD.shape
        places = tokens.sincos(
            np.arange(h) * spec.grid / h, np.arange(w) * spec.grid / w, d
        )
        x = (x_BhwD + places.astype(dtype)).reshape(b, h * w, d)
        for i in range(spec.depth):
            name = f"block_{i}"
            own = gather and gather.at(name)
            x = block(spec.heads, dtype, self.attention, own, name=name)(x, ctx, told)
        x = tokens.layer_norm(dtype, "norm_out")(x)
        x = tokens.modulate(x, last_B2D[:, 0], last_B2D[:, 1])
        x = dense(spec.patch**2 * spec.out_channels, "proj_out", tokens.ZEROS)(x)
        return tokens.picture(x, *x_BHWC.shape[1:3], spec.patch).astype(jnp.float32)


# Drawn as the papers' code does: at first the network gives 0.
init, param_shapes, denoise_fn = functional.of(DiT)
example_inputs = functional.example_inputs
grow_input = unet.grow_input
grow_guidance = tokens.grow_guidance
