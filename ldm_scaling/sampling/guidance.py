"""Guidance: two calls of the network in one, and the corrections that are not linear."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ldm_scaling.diffusion.loss import Denoise, checked
from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True)
class Correction:
    """What no table of linear coefficients can say. Each is compiled into the sampler.

    Attributes:
        rescale: pulls the guided output's standard deviation back towards the conditional one's,
            0 not at all, 1 wholly. Source: Lin et al. 2023 (Common Diffusion Noise Schedules),
            eq. 15 and 16, there phi = 0.7.
        threshold: dynamic thresholding: the quantile of |x0|, per sample, that x0 is clipped to
            and divided by; 0 is off, Imagen's is 0.995. Meant for pixels: latents have no known
            range. Source: Saharia et al. 2022 (Imagen), section 2.3.
        threshold_max: the clipping value is held between 1 and this; Imagen's has no bound,
            diffusers' sample_max_value is 1 unless told, which clips to [-1, 1] and no more.

    Raises:
        UserError: for values outside those ranges, or threshold_max without threshold.
    """

    rescale: float = 0.0
    threshold: float = 0.0
    threshold_max: float = math.inf

    def __post_init__(self):
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale}: give 0 (off) to 1")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold={self.threshold}: give 0 (off) to 1, a quantile")
        if not self.threshold_max >= 1:
            raise UserError(f"threshold_max={self.threshold_max}: give 1 or more")
        if self.threshold_max < math.inf and not self.threshold:
            raise UserError(
                f"threshold_max={self.threshold_max} does nothing without threshold: give one, "
                "such as threshold=0.995, or leave it out"
            )

    def x0(self, m0: Array) -> Array:
        """The network's x0 after thresholding."""
        if not self.threshold:
            return m0
        axes = tuple(range(1, m0.ndim))
        s = jnp.quantile(jnp.abs(m0), self.threshold, axis=axes, keepdims=True)
        s = jnp.clip(s, 1.0, self.threshold_max)
        return jnp.clip(m0, -s, s) / s

    def output(self, guided: Array, conditional: Array) -> Array:
        """The guided output after rescaling; one without any spread stays."""
        if not self.rescale:
            return guided
        std, std_guided = _spread(conditional), _spread(guided)
        still = std_guided == 0
        ratio = jnp.where(still, 1.0, std / jnp.where(still, 1.0, std_guided))
        return guided * (self.rescale * ratio + (1 - self.rescale))


def _spread(F: Array) -> Array:
    """Standard deviation of each sample, whose gradient is 0 where it is 0."""
    variance = jnp.var(F, tuple(range(1, F.ndim)), keepdims=True)
    some = variance > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1.0)), 0.0)


NONE = Correction()


def with_unconditional(cond: Any, uncond: Any) -> Any:
    """The pytree of a batch of 2B that holds each sample's conditioning, then its `uncond`.

    Interleaved, not stacked, so that a batch split over devices stays where it is. What a dict
    `uncond` lacks of a dict `cond` is no prompt's: both evaluations see it.

    Raises:
        UserError: if `uncond` has what `cond` lacks, or a leaf that does not broadcast to `cond`'s.
    """

    given = uncond
    if isinstance(cond, dict) and isinstance(uncond, dict):
        uncond = cond | uncond
    if jax.tree.structure(cond) != jax.tree.structure(uncond):
        raise UserError(
            f"guidance: cond holds {jax.tree.structure(cond)}, but uncond "
            f"{jax.tree.structure(given)}: give the empty prompt's of the same names"
        )

    def pair(path, leaf, empty):
        if jnp.shape(empty) not in ((1, *leaf.shape[1:]), leaf.shape):
            raise UserError(
                f"guidance: cond{jax.tree_util.keystr(path)} has shape {leaf.shape}, but uncond's "
                f"has {jnp.shape(empty)}: give (1, {', '.join(map(str, leaf.shape[1:]))})"
            )
        both = jnp.stack([leaf, jnp.broadcast_to(empty, leaf.shape).astype(leaf.dtype)], axis=1)
        return both.reshape(-1, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(pair, cond, uncond)


def guided(
    denoise: Denoise, params: Any, x_BHWC: Array, t_B: Array, both: Any, w_B: Array,
    correction: Correction = NONE, pair: Array | None = None, weaker: Denoise | None = None,
) -> Array:
    """F_u + w (F_c - F_u) in float32 or better, from one call of the network on a batch of 2B.

    w = 1 is no guidance (Stable Diffusion's convention; Ho & Salimans 2022, eq. 6, call that 0).

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        params: its parameters; with `weaker` those of both networks.
        x_BHWC: noisy latents.
        t_B: the timestep of each sample.
        both: conditioning of the doubled batch, see `with_unconditional`.
        w_B: the guidance rate of each sample.
        correction: of the output.
        pair: a traced bool: where it is False, F_c alone is evaluated, on a batch of B, and w must
            be 1. None is True, and a program without that branch.
        weaker: a network that evaluates F_u in the place of `denoise`, in a call of its own
            (Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself).
    """
    batch = x_BHWC.shape[0]

    def half(i: int) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(batch, 2, *leaf.shape[1:])[:, i], both)

    def once(network: Denoise, params: Any, i: int) -> Array:
        return in_floats(checked(network(params, x_BHWC, t_B, half(i)), x_BHWC))

    def alone() -> Array:
        return once(denoise, params if weaker is None else params[0], 0)

    def twice() -> Array:
        if weaker is None:
            x_NHWC = jnp.repeat(x_BHWC, 2, axis=0)
            F_NHWC = checked(denoise(params, x_NHWC, jnp.repeat(t_B, 2), both), x_NHWC)
            F_B2HWC = in_floats(F_NHWC).reshape(batch, 2, *F_NHWC.shape[1:])
            conditional, unconditional = F_B2HWC[:, 0], F_B2HWC[:, 1]
        else:
            conditional, unconditional = alone(), once(weaker, params[1], 1)
        w_B111 = w_B.astype(conditional.dtype).reshape(-1, *(1,) * (x_BHWC.ndim - 1))
        F_BHWC = unconditional + w_B111 * (conditional - unconditional)
        return correction.output(F_BHWC, conditional)

    return twice() if pair is None else lax.cond(pair, twice, alone)


def in_floats(F: Array) -> Array:
    """What a network returns, in float32 or better."""
    return F.astype(jnp.promote_types(F.dtype, jnp.float32))
