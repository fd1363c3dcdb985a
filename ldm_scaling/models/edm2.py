"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696), its config G.

The network alone: c_in, c_skip and c_out are the `edm` schedule's under v prediction, see
`diffusion.schedule.edm`, and any other schedule will do. Without dropout, which the paper's larger
sizes have.

Weights are brought to unit norm where they are used (eq. 47 there), and those that are stored are
set back to it after each step (eq. 66, `project`): a longer weight would turn less by the same
step. How far each layer's turn is theirs too, see `rates`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import blocks, functional, magnitude, tokens

RESIDUAL_WEIGHT = 0.3  # of a branch beside what it is added to
EQUAL_WEIGHT = 0.5  # of skips beside the main path, and of text beside time
MOST = 256.0  # activations are cut off there
_TIME_SPAN = math.log(80.0 / 0.002) / 4.0


@dataclasses.dataclass(frozen=True)
class EDM2Spec:
    """What fixes an EDM2 U-Net. The defaults are those for latents of ImageNet-512, so width alone
    makes the published sizes.

    Classes are a text of one token, 1 at the class's place and else 0. Any text is conditioned on
    as these are: through one layer, of the mean of its tokens brought to magnitude 1.

    Attributes:
      base_channels: c; level i has c * channel_mults[i] channels.
      context_dim: width of the text tokens.
      channel_mults: one entry a level.
      attention_levels: which levels attend to themselves; the middle always does.
      blocks_per_level: residual blocks a level on the way down (one more on the way up).
      head_channels: channels of an attention head, at every width.
      in_channels, out_channels: latent channels in and out; those in beyond those out are a
        condition beside what is denoised, such as an image's latents.
      sample_size: side of the latents that FLOPs are counted at.
      context_length: tokens that FLOPs are counted at.
      guidance_dim: width of the embedding of a guidance rate that the network is told, see
        `UNetSpec`; 0 for one that is told none.
    Raises:
      UserError: when heads, levels or channels do not fit.
    """

    base_channels: int
    context_dim: int = 1024
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    blocks_per_level: int = 3
    head_channels: int = 64
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    context_length: int = 77
    guidance_dim: int = 0

    def __post_init__(self):
        for name in ("channel_mults", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = [(name, getattr(self, name)) for name in (
            "base_channels", "context_dim", "blocks_per_level", "head_channels", "in_channels",
            "out_channels", "sample_size", "context_length",
        )]
        numbers += [("channel_mults", n) for n in self.channel_mults]
        for name, value in numbers:
            if not isinstance(value, int) or value < 1:
                raise UserError(f"EDM2 {name}={value!r}: give a whole number of at least 1")
        blocks.check_guidance(self, "EDM2")
        if self.in_channels < self.out_channels:
            raise UserError(
                f"EDM2 in_channels={self.in_channels} must be at least out_channels="
                f"{self.out_channels}: it reads what it denoises"
            )
        if len(self.channel_mults) != len(self.attention_levels) or not self.channel_mults:
            raise UserError(
                f"EDM2 channel_mults={self.channel_mults} and attention_levels="
                f"{self.attention_levels} need the same number of levels, at least 1"
            )
        attends = (*self.attention_levels[:-1], True)
        for mult, attention in zip(self.channel_mults, attends, strict=True):
            if attention and self.base_channels * mult % self.head_channels:
                raise UserError(
                    f"EDM2 width {self.base_channels * mult} (= {self.base_channels} x {mult}) "
                    f"must be a multiple of head_channels={self.head_channels}"
                )
        if self.sample_size % self.downsampling:
            raise UserError(
                f"EDM2 sample_size={self.sample_size} must halve {len(self.channel_mults) - 1} "
                f"times for its {len(self.channel_mults)} levels"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the latents that are denoised, at the size that FLOPs are counted at."""
        return (self.sample_size, self.sample_size, self.out_channels)

    @property
    def downsampling(self) -> int:
        """What sides of latents must be a multiple of."""
        return 2 ** (len(self.channel_mults) - 1)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of the levels that attend; the middle has those of the last."""
        attends = (*self.attention_levels[:-1], True)
        return tuple(
            self.base_channels * mult // self.head_channels
            for mult, here in zip(self.channel_mults, attends) if here
        )

    def grown(self, channels: int) -> EDM2Spec:
        """The network that sees so many channels of a condition too. See `grow_input`."""
        return dataclasses.replace(self, in_channels=self.in_channels + channels)


@functools.cache
def waves(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies, normal times 2 pi, and phases of the embedding of time: (width,) float32 each.

    Drawn once for all networks, by a generator whose numbers NumPy keeps: they are not trained.
    """
    rng = np.random.RandomState(0)
    drawn = rng.standard_normal(width), rng.uniform(size=width)
    return tuple((2 * np.pi * a).astype(np.float32) for a in drawn)


def time_features(t_B: jax.Array, width: int) -> jax.Array:
    """Random Fourier features of the time (eq. 75), (B, width) float32 of magnitude 1.

    EDM2 embeds ln(sigma) / 4. Here a thousand timesteps, of whatever schedule, are spread evenly
    over as wide an interval as that has from sigma = 0.002 to 80: where sigmas are even in their
    logarithm, this is EDM2's embedding but for its phases, which are random anyway.
    """
    frequencies, phases = waves(width)
    x_B = t_B.astype(jnp.float32) * (_TIME_SPAN / 1000.0)
    return math.sqrt(2.0) * jnp.cos(x_B[:, None] * frequencies + phases)


class Attention(nn.Module):
    """Cosine attention of pixels to each other: queries, keys and values of magnitude 1."""

    head_channels: int
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        b, h, w, c = x_BHWC.shape
        x_BLD = x_BHWC.reshape(b, h * w, c)

        def project(name):
            y_BLD = magnitude.dense(c, self.dtype, name, self.gather)(x_BLD)
            return magnitude.normalise(tokens.to_heads(y_BLD, c // self.head_channels))

        out_BNLW = self.attention(project("to_q"), project("to_k"), project("to_v"))
        out = magnitude.dense(c, self.dtype, "to_out", self.gather)(tokens.from_heads(out_BNLW))
        return out.reshape(b, h, w, c)


class Block(nn.Module):
    """A residual block around two convolutions, and then attention.

    The time and the text scale channels between the convolutions, through a gain that begins at 0.
    On the way down the main path is brought to the block's width first, and each pixel of it to
    magnitude 1; on the way up the branch sees both skips and main path at their own.

    Args:
      features: channels out.
      way: `"down"` or `"up"`.
      resample: whether sides halve (down) or double (up) before all else.
      head_channels: see `EDM2Spec`; 0 for a block without attention.
      gather: see `blocks.dense`; that of the block's own place.
    """

    features: int
    way: str
    resample: bool = False
    head_channels: int = 0
    dtype: Any = jnp.float32
    attention: Callable = attention_lib.plain
    gather: Callable | None = None

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, emb_BD: jax.Array) -> jax.Array:
        width, dtype, gather, down = self.features, self.dtype, self.gather, self.way == "down"

        def shortcut(x):
            if x.shape[-1] == width:
                return x
            return magnitude.conv(width, 1, dtype, "conv_shortcut", gather)(x)

        x = x_BHWC
        if self.resample:
            x = magnitude.downsample(x) if down else blocks.upsample(x)
        if down:
            x = magnitude.normalise(shortcut(x))
        y = magnitude.conv(width, 3, dtype, "conv1", gather)(magnitude.silu(x))
        gain = self.param("gain", nn.initializers.zeros_init(), ())
        told_BC = magnitude.dense(width, dtype, "time_emb_proj", gather)(emb_BD)
        y = y * (1 + gain.astype(dtype) * told_BC)[:, None, None, :]
        y = magnitude.conv(width, 3, dtype, "conv2", gather)(magnitude.silu(y))
        if not down:
            x = shortcut(x)
        x = magnitude.mix(x, y, RESIDUAL_WEIGHT)
        if self.head_channels:
            own = gather and gather.at("attn1")
            attend = Attention(self.head_channels, dtype, self.attention, own, name="attn1")
            x = magnitude.mix(x, attend(x), RESIDUAL_WEIGHT)
        return jnp.clip(x, -MOST, MOST)


class EDM2(functional.Network):
    """`EDM2(spec).apply({"params": p}, x_BHWC, t_B, ctx_BLD)` -> (B, H, W, out_channels) float32;
    with `spec.guidance_dim` the guidance rates w_B follow.

    Two layers are not EDM2's, plain ones whose weights begin at zero, so that a network that is
    given them goes on from what it was: of a condition's channels, added to the first layer's, and
    of a guidance rate, added to the embedding.
    """

    @nn.compact
    def __call__(
        self, x_BHWC: jax.Array, t_B: jax.Array, ctx_BLD: jax.Array, w_B: jax.Array | None = None
    ) -> jax.Array:
        spec, dtype, gather = self.spec, self.dtype, self.gather
        height, length = x_BHWC.shape[1:3]
        if height % spec.downsampling or length % spec.downsampling:
            raise UserError(
                f"EDM2 latents of {height} x {length}: give sides that are multiples of "
                f"{spec.downsampling}"
            )
        make, zeros = tokens.wrapper(self.remat)(Block), nn.initializers.zeros_init()

        def block(level, way, name, attends=False, resample=False):
            return make(
                c * spec.channel_mults[level], way, resample, attends and spec.head_channels,
                dtype, self.attention, gather and gather.at(name), name=name,
            )

        c = spec.base_channels
        wide = c * max(spec.channel_mults)
        emb = time_features(t_B, c).astype(dtype)
        emb = magnitude.dense(wide, dtype, "time_embedding", gather)(emb)
        mean_BD = jnp.mean(ctx_BLD.astype(jnp.float32), axis=1)
        square_B1 = jnp.mean(mean_BD * mean_BD, axis=-1, keepdims=True)
        # At magnitude 1 exactly, as EDM2 has its classes; zeros stay zeros.
        text_BD = (mean_BD * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-8))).astype(dtype)
        text = magnitude.dense(wide, dtype, "text_embedding", gather)(text_BD)
        emb = magnitude.mix(emb, text, EQUAL_WEIGHT)
        emb = blocks.with_guidance(emb, w_B, spec, "EDM2", gather, kernel_init=zeros)
        emb = magnitude.silu(emb)

        x, beside = jnp.split(x_BHWC.astype(dtype), [spec.out_channels], axis=-1)
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # in place of biases
        x = magnitude.conv(c, 3, dtype, "conv_in", gather)(x)
        if beside.shape[-1]:
            x += blocks.conv(
                c, 3, dtype, "conv_condition", gather=gather, use_bias=False, kernel_init=zeros
            )(beside)

        skips, last = [x], len(spec.channel_mults) - 1
        for i, attends in enumerate(spec.attention_levels):
            if i:
                x = block(i - 1, "down", f"down_{i}_downsample", resample=True)(x, emb)
                skips.append(x)
            for j in range(spec.blocks_per_level):
                x = block(i, "down", f"down_{i}_block_{j}", attends)(x, emb)
                skips.append(x)
        x = block(last, "up", "mid_block_0", True)(x, emb)
        x = block(last, "up", "mid_block_1")(x, emb)
        for i in reversed(range(len(spec.channel_mults))):
            if i != last:
                x = block(i + 1, "up", f"up_{i}_upsample", resample=True)(x, emb)
            for j in range(spec.blocks_per_level + 1):
                x = magnitude.join(x, skips.pop(), EQUAL_WEIGHT)
                x = block(i, "up", f"up_{i}_block_{j}", spec.attention_levels[i])(x, emb)
        gain = self.param("gain", zeros, ())
        x = magnitude.conv(spec.out_channels, 3, dtype, "conv_out", gather)(x)
        return x.astype(jnp.float32) * gain


def grow_input(params: Any, channels: int) -> Any:
    """Parameters with weights of zero for so many channels more of a condition, see `EDM2`:
    whatever is in them, the network gives what it gave."""
    known = params.get("conv_condition", {}).get("kernel")
    width = params["conv_in"]["kernel"].shape[-1]
    new = jnp.zeros((3, 3, channels, width))
    kernel = new if known is None else jnp.concatenate([known, new], axis=2)
    return {**params, "conv_condition": {"kernel": kernel}}


def grow_guidance(params: Any, dim: int) -> Any:
    """Parameters of a network that is told a guidance rate too (`guidance_dim=dim`), by weights of
    zero: whatever the rate, it gives what it gave."""
    width = params["time_embedding"]["kernel"].shape[-1]
    return {**params, "guidance_embedding": {"kernel": jnp.zeros((dim, width))}}


_PLAIN = ("conv_condition", "guidance_embedding")
RECIPE = ("unit norms after each step", "rates by fan-in")
"""What its training has beside the other networks'."""


def _is_unit(path: tuple) -> bool:
    """Whether a parameter is a kernel that is used at unit norm."""
    return path[-1].key == "kernel" and path[-2].key not in _PLAIN


def project(params: Any) -> Any:
    """Parameters with kernels at unit norm (eq. 66); gains and the two plain layers as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: magnitude.unit(w) if _is_unit(path) else w, params
    )


def rates(spec: EDM2Spec, base: EDM2Spec | None = None) -> Any:
    """By parameter, what the optimiser's steps are multiplied by, such that they are EDM2's.

    EDM2 stores kernels of fan-in n at the norm root n, so that a step of Adam, at most about the
    rate alpha for each weight, turns every layer by about alpha; gains move by alpha. Of kernels at
    unit norm this is the rate alpha / root n, and alpha of gains. Here alpha is the run's learning
    rate times the root of the kernels' mean fan-in, a mean over all outputs: as a whole the kernels
    then move as far as those of other networks at that learning rate.

    Args:
      spec: the network.
      base: that whose alpha is taken, times root (base / width): EDM2's published rates, 0.0170 at
        64 channels to 0.0065 at 448, fall so within 6%. None for its own.
    """
    base = base or spec
    its = [
        leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(base))
        if _is_unit(path)
    ]
    mean = sum(map(math.prod, its)) / sum(shape[-1] for shape in its)
    alpha = math.sqrt(mean * base.base_channels / spec.base_channels)

    def rate(path: tuple, leaf: Any) -> float:
        if _is_unit(path):
            return alpha / math.sqrt(math.prod(leaf.shape[:-1]))
        return alpha if path[-1].key == "gain" else 1.0

    return jax.tree_util.tree_map_with_path(rate, param_shapes(spec))


# At first the network gives 0.
init, param_shapes, denoise_fn = functional.of(EDM2)
example_inputs = functional.example_inputs
