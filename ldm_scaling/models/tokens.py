"""What the transformers over patches share: DiT, U-ViT and MM-DiT.

Shape legend: B batch, H height, W width, C channels, L tokens, D width of a token, N heads.
"""

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
from ldm_scaling.models import blocks

Dtype = Any
TIME_WIDTH = 256  # of the sinusoids of a timestep that DiT and MM-DiT embed, whatever their width

# torch's `xavier_uniform_`; queries, keys and values are drawn as if they were one layer, which
# they are in the papers' code.
XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
XAVIER_IN = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
XAVIER_PATCHES = nn.initializers.variance_scaling(
    1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
)
SMALL = nn.initializers.normal(0.02)
ZEROS = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """What a transformer over patches reads and writes; a network's own spec says the rest, of
    which `base_channels` is the width of its tokens.

    Attributes:
      patch: side of the squares of latents that become one token.
      context_dim: width of the text tokens.
      context_length: tokens that FLOPs are counted at.
      in_channels, out_channels: latent channels in and out. There are more in than out where the
        network sees a condition beside what it denoises, such as an image's latents.
      sample_size: side of the latents that positions are made for and FLOPs are counted at.
      guidance_dim: width of the embedding of a guidance rate that the network is told, see
        `UNetSpec`; 0 for one that is told none.
    Raises:
      UserError: when patches, heads and widths do not fit.
    """

    patch: int = 2
    context_dim: int = 1024
    context_length: int = 77
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 32
    guidance_dim: int = 0

    network: ClassVar[str] = "transformer"
    counts: ClassVar[tuple[str, ...]] = ("base_channels", "depth", "heads")

    def __post_init__(self):
        for name in (
            *self.counts, "patch", "context_dim", "context_length", "in_channels", "out_channels",
            "sample_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{self.network} {name}={value!r}: give a whole number of at least 1"
                )
        blocks.check_guidance(self, self.network)
        if self.base_channels % 4 or self.base_channels % self.heads:
            raise UserError(
                f"{self.network} width {self.base_channels} must be a multiple of 4 and of "
                f"heads={self.heads}"
            )
        if self.sample_size % self.patch:
            raise UserError(
                f"{self.network} sample_size={self.sample_size} must be a multiple of "
                f"patch={self.patch}"
            )

    @property
    def grid(self) -> int:
        """Side of the square of tokens that latents of the sample size make."""
        return self.sample_size // self.patch

    @property
    def downsampling(self) -> int:
        """What sides of latents must be a multiple of."""
        return self.patch

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents that are denoised, at the size that FLOPs are counted at."""
        return (self.sample_size, self.sample_size, self.out_channels)

    def grown(self, channels: int) -> TransformerSpec:
        """The network that sees so many channels of a condition too. See `unet.grow_input`."""
        return dataclasses.replace(self, in_channels=self.in_channels + channels)


def sincos(rows_H: np.ndarray, columns_W: np.ndarray, width: int) -> np.ndarray:
    """Sinusoids of places on a grid: half of them of the column, then half of the row, sines first.

    Args:
      rows_H, columns_W: the places, any real numbers.
      width: of the embedding, a multiple of 4.
    Returns:
      (H, W, width) float32.

    Source: Peebles & Xie 2023, after MAE's positions (He et al. 2021, arXiv 2111.06377).
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(np.arange(quarter) / quarter)

    def along(places):
        angles = np.asarray(places, np.float64)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    shape = (len(rows_H), len(columns_W), width // 2)
    of_columns = np.broadcast_to(along(columns_W)[None], shape)
    of_rows = np.broadcast_to(along(rows_H)[:, None], shape)
    return np.concatenate([of_columns, of_rows], axis=-1).astype(np.float32)


def patches(
    spec: TransformerSpec, x_BHWC: jax.Array, dtype: Dtype, gather: Callable | None,
    init: Callable = XAVIER_PATCHES,
) -> jax.Array:
    """The layer `conv_in`: a token for each patch, (B, H / patch, W / patch, D).

    Raises:
      UserError: for sides that do not split into patches.
    """
    if x_BHWC.shape[1] % spec.patch or x_BHWC.shape[2] % spec.patch:
        raise UserError(
            f"latents of {x_BHWC.shape[1]} x {x_BHWC.shape[2]} do not split into patches of "
            f"{spec.patch} x {spec.patch}: give sides that are multiples of {spec.patch}"
        )
    kw = {}
    if gather is not None:
        product = gather.at("conv_in")(jax.lax.conv_general_dilated)
        kw = {"conv_general_dilated": product, "sharded": True}
    side = (spec.patch, spec.patch)
    layer = blocks.Conv(
        spec.base_channels, side, side, padding="VALID", dtype=dtype, kernel_init=init,
        name="conv_in", **kw,
    )
    return layer(x_BHWC.astype(dtype))


def picture(x_BLD: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """Tokens, each a patch with its channels last, laid out again: (B, height, width, C)."""
    b, rows, columns = x_BLD.shape[0], height // patch, width // patch
    x = x_BLD.reshape(b, rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)


def sinusoids(
    spec: TransformerSpec, t_B: jax.Array, w_B: jax.Array | None, width: int, dtype: Dtype,
    gather: Callable | None,
) -> jax.Array:
    """A timestep's sinusoids, `blocks.with_guidance`: (B, width)."""
    emb_BD = blocks.timestep_embedding(t_B, width).astype(dtype)
    return blocks.with_guidance(emb_BD, w_B, spec, spec.network, gather)


def grow_guidance(params: Any, dim: int) -> Any:
    """Parameters of a network that is told a guidance rate too (`guidance_dim=dim`), by weights of
    zero: whatever the rate, it gives what it gave. For networks that embed a timestep's sinusoids
    by a layer `time_embedding_1`."""
    width = params["time_embedding_1"]["kernel"].shape[0]
    return {**params, "guidance_embedding": {"kernel": jnp.zeros((dim, width))}}


def wrapper(remat: str) -> Callable:
    """What a block's class goes through: under jit it is traced once for all places of its shape,
    a U-Net in half the time. Not where weights come in shards: each place has its own `gather`.

    Args:
      remat: `"none"`, or `"block"` to recompute each block in the backward pass.
    Raises:
      UserError: for another.
    """
    if remat not in ("none", "block"):
        raise UserError(f"remat={remat!r} is not one of none, block")
    return (lambda m: nn.jit(nn.remat(m))) if remat == "block" else nn.jit


def layer_norm(
    dtype: Dtype, name: str, epsilon: float = 1e-6, affine: bool = False
) -> nn.LayerNorm:
    """Layer normalisation, without parameters where the modulation has them."""
    return nn.LayerNorm(epsilon, dtype, use_bias=affine, use_scale=affine, name=name)


def modulate(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, each sample's own."""
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def modulations(
    emb_BD: jax.Array, count: int, width: int, dtype: Dtype, gather: Callable | None,
    init: Callable = ZEROS,
) -> jax.Array:
    """The layer `modulation`: shifts, scales and gates of an embedding, (B, count, width)."""
    layer = blocks.dense(count * width, dtype, "modulation", gather, kernel_init=init)
    return layer(blocks.silu(emb_BD)).reshape(-1, count, width)


def mlp(
    x_BLD: jax.Array, dtype: Dtype, gather: Callable | None, init: Callable = XAVIER,
    approximate: bool = True,
) -> jax.Array:
    """The layers `ff_in` and `ff_out`, 4 D wide between, around a GELU (by its tanh form)."""
    d = x_BLD.shape[-1]
    h = blocks.dense(4 * d, dtype, "ff_in", gather, kernel_init=init)(x_BLD)
    h = nn.gelu(h, approximate=approximate)
    return blocks.dense(d, dtype, "ff_out", gather, kernel_init=init)(h)


def to_heads(x_BLD: jax.Array, heads: int) -> jax.Array:
    """(B, N, L, D / N), as `models.attention` takes them."""
    b, length, d = x_BLD.shape
    return x_BLD.reshape(b, length, heads, d // heads).transpose(0, 2, 1, 3)


def from_heads(x_BNLW: jax.Array) -> jax.Array:
    """(B, L, D) of (B, N, L, D / N)."""
    b, n, length, w = x_BNLW.shape
    return x_BNLW.transpose(0, 2, 1, 3).reshape(b, length, n * w)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to a context's.

    Args:
      heads: heads; must divide the width of the tokens.
      bias: biases on the three input projections.
      apart: so many first tokens' queries go through attention apart: the others, an image's, then
        fill the tiles of a fused kernel. What comes out is the same.
      attention: what queries, keys and values go through, see `models.attention`.
      init, value_init, out_init: draw the kernels of the queries, of keys and values, and of what
        comes out.
      gather: see `blocks.dense`.
    """

    heads: int
    bias: bool = True
    apart: int = 0
    dtype: Dtype = jnp.float32
    attention: Callable = attention_lib.plain
    init: Callable = XAVIER_IN
    value_init: Callable = XAVIER_IN
    out_init: Callable = XAVIER
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, ctx_BMD: jax.Array | None = None) -> jax.Array:
        ctx_BMD = x_BLD if ctx_BMD is None else ctx_BMD
        d, dtype, gather = x_BLD.shape[-1], self.dtype, self.gather

        def project(name, y, init):
            layer = blocks.dense(
                d, dtype, name, gather, use_bias=self.bias, kernel_init=init
            )
            return to_heads(layer(y), self.heads)

        q = project("to_q", x_BLD, self.init)
        k = project("to_k", ctx_BMD, self.value_init)
        v = project("to_v", ctx_BMD, self.value_init)
        queries = [q[:, :, : self.apart], q[:, :, self.apart :]] if self.apart else [q]
        out = jnp.concatenate([self.attention(q, k, v) for q in queries], axis=2)
        return blocks.dense(d, dtype, "to_out", gather, kernel_init=self.out_init)(from_heads(out))
