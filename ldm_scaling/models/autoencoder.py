"""The KL autoencoder of Stable Diffusion (`AutoencoderKL`), its width and depth set by a spec."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import blocks


@dataclasses.dataclass(frozen=True)
class AutoencoderSpec:
    """What fixes an autoencoder; the defaults are SD v1's KL-f8.

    Attributes:
      base_channels: channels at full resolution.
      channel_mults: one entry a level; the picture's side shrinks by 2 ** (levels - 1).
      blocks_per_level: residual blocks a level in the encoder (one more in the decoder).
      latent_channels: channels of the latents.
      groups: groups of the group normalisation.
      mid_attention: self-attention at the lowest resolution.
    Raises:
      UserError: when groups do not divide the widths.
    """

    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    mid_attention: bool = True

    def __post_init__(self):
        object.__setattr__(self, "channel_mults", tuple(self.channel_mults))
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise UserError(f"autoencoder channel_mults={self.channel_mults}: give one or more")
        for name in ("base_channels", "blocks_per_level", "latent_channels", "groups"):
            if getattr(self, name) < 1:
                raise UserError(f"autoencoder {name}={getattr(self, name)!r} must be at least 1")
        for mult in self.channel_mults:
            if (self.base_channels * mult) % self.groups:
                raise UserError(
                    f"autoencoder width {self.base_channels * mult} is not a multiple of "
                    f"groups={self.groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.channel_mults) - 1)


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents: mean and log variance, (B, h, w, latent_channels)."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """One draw."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> jax.Array:
        """KL divergence to the standard normal, summed over each latent: (B,)."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


class _Middle(nn.Module):
    spec: AutoencoderSpec
    dtype: Any
    attention: Callable

    @nn.compact
    def __call__(self, x):
        spec = self.spec
        b, h, w, c = x.shape
        x = blocks.ResBlock(c, spec.groups, 1e-6, self.dtype, name="res_0")(x)
        if spec.mid_attention:
            y = blocks.norm(spec.groups, 1e-6, self.dtype, "attn_norm")(x).reshape(b, h * w, c)
            attend = blocks.Attention(
                1, bias=True, dtype=self.dtype, attention=self.attention, name="attn"
            )
            y = attend(y)
            x = x + y.reshape(b, h, w, c)
        return blocks.ResBlock(c, spec.groups, 1e-6, self.dtype, name="res_1")(x)


class Encoder(nn.Module):
    """Pictures in [-1, 1] to the posterior's moments, (B, h, w, 2 * latent_channels)."""

    spec: AutoencoderSpec
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        spec, dtype = self.spec, self.dtype
        h = blocks.conv(spec.base_channels, 3, dtype, "conv_in")(x_BHWC.astype(dtype))
        last = len(spec.channel_mults) - 1
        for i, mult in enumerate(spec.channel_mults):
            width = spec.base_channels * mult
            for j in range(spec.blocks_per_level):
                h = blocks.ResBlock(width, spec.groups, 1e-6, dtype, name=f"down_{i}_res_{j}")(h)
            if i != last:
                # SD pads only right and below before its strided convolution.
                h = nn.Conv(
                    width, (3, 3), (2, 2), padding=[(0, 1), (0, 1)], dtype=dtype,
                    name=f"down_{i}_downsample",
                )(h)
        h = _Middle(spec, dtype, self.attention, name="mid")(h)
        h = blocks.norm(spec.groups, 1e-6, dtype, "norm_out", activated=True)(h)
        h = blocks.conv(2 * spec.latent_channels, 3, dtype, "conv_out")(h)
        return blocks.conv(2 * spec.latent_channels, 1, dtype, "quant_conv")(h).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents (unscaled) to pictures, about [-1, 1], not clipped."""

    spec: AutoencoderSpec
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain

    @nn.compact
    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        spec, dtype = self.spec, self.dtype
        h = blocks.conv(spec.latent_channels, 1, dtype, "post_quant_conv")(z_BHWC.astype(dtype))
        h = blocks.conv(spec.base_channels * spec.channel_mults[-1], 3, dtype, "conv_in")(h)
        h = _Middle(spec, dtype, self.attention, name="mid")(h)
        for i in reversed(range(len(spec.channel_mults))):
            width = spec.base_channels * spec.channel_mults[i]
            for j in range(spec.blocks_per_level + 1):
                h = blocks.ResBlock(width, spec.groups, 1e-6, dtype, name=f"up_{i}_res_{j}")(h)
            if i != 0:
                h = blocks.upsample(h)
                h = blocks.conv(width, 3, dtype, f"up_{i}_upsample")(h)
        h = blocks.norm(spec.groups, 1e-6, dtype, "norm_out", activated=True)(h)
        return blocks.conv(3, 3, dtype, "conv_out")(h).astype(jnp.float32)


def init(spec: AutoencoderSpec, key: jax.Array) -> dict:
    """Random float32 parameters: `{"encoder": ..., "decoder": ...}`."""
    side = spec.downsampling * 8
    key_e, key_d = jax.random.split(key)
    x, z = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 8, 8, spec.latent_channels))
    return {
        "encoder": Encoder(spec).init(key_e, x)["params"],
        "decoder": Decoder(spec).init(key_d, z)["params"],
    }


@functools.cache
def param_shapes(spec: AutoencoderSpec) -> dict:
    """Shapes and types of the parameters."""
    return jax.eval_shape(initializer(spec), jax.random.key(0))


@functools.cache
def initializer(spec: AutoencoderSpec) -> Callable[[jax.Array], dict]:
    """`init` as a function of the key: one object for each spec, to be traced but once."""
    return functools.partial(init, spec)


def encode(
    spec: AutoencoderSpec, params: dict, x_BHWC: jax.Array, dtype=jnp.float32,
    attention: Callable = attention_lib.plain,
) -> Posterior:
    """Posterior over latents of pictures in [-1, 1]. Log variances are clipped to [-30, 20]."""
    moments = Encoder(spec, dtype, attention).apply({"params": params["encoder"]}, x_BHWC)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


def decode(
    spec: AutoencoderSpec, params: dict, z_BHWC: jax.Array, dtype=jnp.float32,
    attention: Callable = attention_lib.plain,
) -> jax.Array:
    """Pictures (B, H, W, 3) of unscaled latents, about [-1, 1], not clipped."""
    return Decoder(spec, dtype, attention).apply({"params": params["decoder"]}, z_BHWC)
