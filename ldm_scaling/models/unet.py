"""Stable Diffusion's U-Net (Rombach et al. 2022), its width and depth set by a `UNetSpec`."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import default_kernel_init

from ldm_scaling.errors import UserError
from ldm_scaling.models import blocks, functional, tokens


@dataclasses.dataclass(frozen=True)
class UNetSpec:
    """What fixes a U-Net. The defaults are Stable Diffusion v1's, so width alone makes the family.

    Attributes:
      base_channels: c; level i has c * channel_mults[i] channels.
      context_dim: width of the text tokens (1024 in the paper's family, 768 in SD v1).
      channel_mults: one entry a level.
      attention_levels: which levels have transformers; the middle always has one.
      blocks_per_level: residual blocks a level on the way down (one more on the way up).
      heads: attention heads, the same at every width, or one entry a level as in SD v2.
      groups: groups of the group normalisation.
      in_channels, out_channels: latent channels in and out. There are more in than out where the
        network sees a condition beside what it denoises, such as an image's latents.
      sample_size: side of the latents that FLOPs are counted at.
      context_length: tokens that FLOPs are counted at.
      guidance_dim: width of the embedding of a guidance rate that the network is told, as after
        guided distillation (256 in published ones); 0 for one that is told none.
      zero_init: whether the last layer of every block and of the network begins at zero, as in
        Stable Diffusion's code (CompVis' `zero_module`), so that at first blocks add nothing and
        the network gives 0; else they are drawn as the others.
    Raises:
      UserError: when heads, groups or levels do not fit the widths.
    """

    base_channels: int
    context_dim: int = 1024
    channel_mults: tuple[int, ...] = (1, 2, 4, 4)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    blocks_per_level: int = 2
    heads: int | tuple[int, ...] = 8
    groups: int = 32
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    context_length: int = 77
    guidance_dim: int = 0
    # Not in `repr`, by which costs are found: it changes none.
    zero_init: bool = dataclasses.field(default=False, repr=False, metadata={"later": True})

    def __post_init__(self):
        for name in ("channel_mults", "attention_levels", "heads"):
            value = getattr(self, name)
            if name != "heads" or isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        heads = self.heads if isinstance(self.heads, tuple) else (self.heads,)
        numbers = [(name, getattr(self, name)) for name in (
            "base_channels", "context_dim", "blocks_per_level", "groups", "in_channels",
            "out_channels", "sample_size", "context_length",
        )]
        numbers += [("heads", n) for n in heads]
        for name, value in numbers:
            if not isinstance(value, int) or value < 1:
                raise UserError(f"U-Net {name}={value!r}: give a whole number of at least 1")
        blocks.check_guidance(self, "U-Net")
        if len(self.channel_mults) != len(self.attention_levels) or not self.channel_mults:
            raise UserError(
                f"U-Net channel_mults={self.channel_mults} and attention_levels="
                f"{self.attention_levels} need the same number of levels, at least 1"
            )
        if isinstance(self.heads, tuple) and len(heads) != len(self.channel_mults):
            raise UserError(
                f"U-Net heads={heads}: give one number, or one for each of the "
                f"{len(self.channel_mults)} levels"
            )
        if self.base_channels % 2:
            raise UserError(f"U-Net base_channels={self.base_channels} must be even")
        for level, mult in enumerate(self.channel_mults):
            width = self.base_channels * mult
            if width % self.groups or width % self.heads_at(level):
                raise UserError(
                    f"U-Net width {width} (= {self.base_channels} x {mult}) must be a multiple of "
                    f"groups={self.groups} and of heads={self.heads_at(level)}"
                )
        if self.sample_size % 2 ** (len(self.channel_mults) - 1):
            raise UserError(
                f"U-Net sample_size={self.sample_size} must halve {len(self.channel_mults) - 1} "
                f"times for its {len(self.channel_mults)} levels"
            )

    def heads_at(self, level: int) -> int:
        """Attention heads of a level; the middle has those of the last."""
        return self.heads if isinstance(self.heads, int) else self.heads[level]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents that are denoised, at the size that FLOPs are counted at."""
        return (self.sample_size, self.sample_size, self.out_channels)

    @property
    def downsampling(self) -> int:
        """What sides of latents must be a multiple of."""
        return 2 ** (len(self.channel_mults) - 1)

    def grown(self, channels: int) -> UNetSpec:
        """The network that sees so many channels of a condition too. See `grow_input`."""
        return dataclasses.replace(self, in_channels=self.in_channels + channels)


class UNet(functional.Network):
    """`UNet(spec).apply({"params": p}, x_BHWC, t_B, ctx_BLD)` -> (B, H, W, out_channels) float32;
    with `spec.guidance_dim` the guidance rates w_B follow."""

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, ctx_BLD: jax.Array, w_B: jax.Array | None = None
    ) -> jax.Array:
        spec, dtype = self.spec, self.dtype
        height, width = x_BHWC.shape[1:3]
        if height % spec.downsampling or width % spec.downsampling:
            raise UserError(
                f"U-Net latents of {height} x {width}: give sides that are multiples of "
                f"{spec.downsampling}"
            )
        wrap = tokens.wrapper(self.remat)
        res_block, transformer = wrap(blocks.ResBlock), wrap(blocks.SpatialTransformer)

        last_init = tokens.ZEROS if spec.zero_init else default_kernel_init

        def gather(name):
            return self.gather and self.gather.at(name)

        def res(features, name):
            return res_block(
                features, spec.groups, dtype=dtype, gather=gather(name), out_init=last_init,
                name=name,
            )

        def attend(level, name):
            return transformer(
                spec.heads_at(level), spec.groups, dtype, self.attention, gather(name), last_init,
                name=name,
            )

        def conv(features, size, name, **kw):
            return blocks.conv(features, size, dtype, name, gather=self.gather, **kw)

        def dense(features, name):
            return blocks.dense(features, dtype, name, self.gather)

        c = spec.base_channels
        emb = blocks.timestep_embedding(t_B, c).astype(dtype)
        emb = blocks.with_guidance(emb, w_B, spec, "U-Net", self.gather)
        emb = dense(4 * c, "time_embedding_1")(emb)
        emb = dense(4 * c, "time_embedding_2")(blocks.silu(emb))
        ctx = ctx_BLD.astype(dtype)

        h = conv(c, 3, "conv_in")(x_BHWC.astype(dtype))
        skips = [h]
        last = len(spec.channel_mults) - 1
        for i, (mult, attention) in enumerate(
            zip(spec.channel_mults, spec.attention_levels, strict=True)
        ):
            for j in range(spec.blocks_per_level):
                h = res(c * mult, f"down_{i}_res_{j}")(h, emb)
                if attention:
                    h = attend(i, f"down_{i}_attn_{j}")(h, ctx)
                skips.append(h)
            if i != last:
                h = conv(c * mult, 3, f"down_{i}_downsample", stride=2)(h)
                skips.append(h)

        h = res(h.shape[-1], "mid_res_0")(h, emb)
        h = attend(last, "mid_attn")(h, ctx)
        h = res(h.shape[-1], "mid_res_1")(h, emb)

        for i in reversed(range(len(spec.channel_mults))):
            for j in range(spec.blocks_per_level + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = res(c * spec.channel_mults[i], f"up_{i}_res_{j}")(h, emb)
                if spec.attention_levels[i]:
                    h = attend(i, f"up_{i}_attn_{j}")(h, ctx)
            if i != 0:
                h = blocks.upsample(h)
                h = conv(c * spec.channel_mults[i], 3, f"up_{i}_upsample")(h)

        h = blocks.norm(spec.groups, 1e-5, dtype, "norm_out", activated=True)(h)
        h = conv(spec.out_channels, 3, "conv_out", kernel_init=last_init)(h)
        return h.astype(jnp.float32)


def recipe(spec: UNetSpec) -> tuple[str, ...]:
    """What a network's training has that those of earlier versions lacked, see `backbone.Kind`."""
    return ("zeros that the last layers of blocks begin at",) if spec.zero_init else ()


def grow_input(params: Any, channels: int) -> Any:
    """Parameters with a first layer that takes so many channels more, behind those it has, by
    weights of zero: whatever is in them, the network gives what it gave (Saharia et al. 2022 and
    Stable Diffusion's inpainting begin so)."""
    kernel = params["conv_in"]["kernel"]
    kernel = jnp.pad(kernel, [(0, 0), (0, 0), (0, channels), (0, 0)])
    return {**params, "conv_in": {**params["conv_in"], "kernel": kernel}}


def grow_guidance(params: Any, dim: int) -> Any:
    """Parameters of a network that is told a guidance rate too (`guidance_dim=dim`), by weights of
    zero: whatever the rate, it gives what it gave."""
    width = params["conv_in"]["kernel"].shape[-1]
    return {**params, "guidance_embedding": {"kernel": jnp.zeros((dim, width))}}


init, param_shapes, denoise_fn = functional.of(UNet)
example_inputs = functional.example_inputs
