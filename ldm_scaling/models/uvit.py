"""U-ViT in its text form (Bao et al. 2023, arXiv 2209.12152): time and text are tokens beside the
picture's, and long skips join blocks as in a U-Net."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import blocks, dino_vit, functional, tokens, unet

# torch's own draw of a convolution's kernel, which the paper's code leaves as it is.
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
TORCH_PATCHES = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2), out_axis=3
)


@dataclasses.dataclass(frozen=True)
class UViTSpec(tokens.TransformerSpec):
    """What fixes a U-ViT. See `tokens.TransformerSpec` for the rest.

    Attributes:
      base_channels: width of its tokens.
      depth: blocks, an odd number: as many before the middle one as behind it.
      heads: attention heads.
      conv_out: whether a 3x3 convolution ends it; the largest published has none.
    """

    base_channels: int
    depth: int
    heads: int
    conv_out: bool = True

    network: ClassVar[str] = "U-ViT"

    def __post_init__(self):
        super().__post_init__()
        if not self.depth % 2:
            raise UserError(f"U-ViT depth={self.depth} must be odd: one block is the middle")


class Block(nn.Module):
    """Self-attention and an MLP, each after a layer norm and around a residual; first an earlier
    block's tokens join, if they are given: beside the others, through a linear layer.

    Args:
      apart: see `tokens.Attention`.
    """

    heads: int
    apart: int
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, skip_BLD: jax.Array | None = None) -> jax.Array:
        x, dtype = x_BLD, self.dtype
        if skip_BLD is not None:
            both = jnp.concatenate([x, skip_BLD], axis=-1)
            layer = blocks.dense(
                x.shape[-1], dtype, "skip", self.gather, kernel_init=tokens.SMALL
            )
            x = layer(both)
        attend = tokens.Attention(
            self.heads, False, self.apart, dtype, self.attention, tokens.SMALL, tokens.SMALL,
            tokens.SMALL, self.gather and self.gather.at("attn1"), name="attn1",
        )
        x = x + attend(tokens.layer_norm(dtype, "norm1", 1e-5, affine=True)(x))
        y = tokens.layer_norm(dtype, "norm2", 1e-5, affine=True)(x)
        return x + tokens.mlp(y, dtype, self.gather, tokens.SMALL, approximate=False)


class UViT(functional.Network):
    """`UViT(spec).apply({"params": p}, x_BHWC, t_B, ctx_BLD)` -> (B, H, W, out_channels) float32;
    with `spec.guidance_dim` the guidance rates w_B follow.

    Positions are learned, one for the time, for each text token and for each place on the grid of
    the spec's latents; for latents of other sides the grid's are resampled (bicubic).

    Raises:
      UserError: for more text tokens than there are positions for.
    """

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, ctx_BLD: jax.Array, w_B: jax.Array | None = None
    ) -> jax.Array:
        spec, dtype, gather = self.spec, self.dtype, self.gather
        d, length = spec.base_channels, ctx_BLD.shape[1]
        block = tokens.wrapper(self.remat)(Block)

        def dense(features, name):
            return blocks.dense(features, dtype, name, gather, kernel_init=tokens.SMALL)

        emb_BD = tokens.sinusoids(spec, t_B, w_B, d, dtype, gather)
        ctx = dense(d, "text")(ctx_BLD.astype(dtype))
        x_BhwD = tokens.patches(spec, x_BHWC, dtype, gather, TORCH_PATCHES)
        b, h, w, _ = x_BhwD.shape
        x = jnp.concatenate([emb_BD[:, None], ctx, x_BhwD.reshape(b, h * w, d)], axis=1)
        x = x + self._positions(length, h, w).astype(dtype)

        def run(i, *args):
            own = gather and gather.at(f"block_{i}")
            layer = block(
                spec.heads, 1 + length, dtype, self.attention, own, name=f"block_{i}"
            )
            return layer(*args)

        half, skips = spec.depth // 2, []
        for i in range(half):
            x = run(i, x)
            skips.append(x)
        x = run(half, x)
        for i in range(half + 1, spec.depth):
            x = run(i, x, skips.pop())
        x = tokens.layer_norm(dtype, "norm_out", 1e-5, affine=True)(x[:, 1 + length :])
        x = dense(spec.patch**2 * spec.out_channels, "proj_out")(x)
        y_BHWC = tokens.picture(x, *x_BHWC.shape[1:3], spec.patch)
        if spec.conv_out:
            y_BHWC = blocks.conv(
                spec.out_channels, 3, dtype, "conv_out", gather=gather, kernel_init=TORCH
            )(y_BHWC)
        return y_BHWC.astype(jnp.float32)

    def _positions(self, length: int, height: int, width: int) -> jax.Array:
        """(1 + length + height * width, D) of the learned ones."""
        spec, n = self.spec, self.spec.grid
        beside = 1 + spec.context_length
        if length > spec.context_length:
            raise UserError(
                f"U-ViT with context_length={spec.context_length} knows no place for {length} text "
                "tokens: give no more, or another network"
            )
        learned = self.param("positions", tokens.SMALL, (beside + n * n, spec.base_channels))
        grid = learned[beside:]
        if (height, width) != (n, n):
            rows, columns = (dino_vit.resampling(n, out, 0.0) for out in (height, width))
            grid = grid.reshape(n, n, -1)
            grid = jnp.einsum("hn,wm,nmd->hwd", rows, columns, grid, precision="highest")
            grid = grid.reshape(height * width, -1)
        return jnp.concatenate([learned[: 1 + length], grid])


init, param_shapes, denoise_fn = functional.of(UViT)
example_inputs = functional.example_inputs
grow_input = unet.grow_input
grow_guidance = unet.grow_guidance
