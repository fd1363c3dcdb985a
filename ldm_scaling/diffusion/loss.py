"""The denoising loss: random for training, at fixed timesteps and noise for validation."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion import timesteps as timesteps_lib
from ldm_scaling.diffusion import weighting as weighting_lib
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError

Denoise = Callable[[Any, Array, Array, Any], Array]

# 2^32 / golden ratio: multiples of it modulo 2^32 fill the circle evenly (Weyl's sequence).
_GOLDEN = 2654435769


def checked(F_BHWC: Any, x_BHWC: Array) -> Array:
    """A network's output.

    Raises:
        UserError: unless it is one array of its input's shape: another would be broadcast.
    """
    given = getattr(F_BHWC, "shape", type(F_BHWC).__name__)
    if given != x_BHWC.shape:
        raise UserError(
            f"denoise gives {given} for x_BHWC of shape {x_BHWC.shape}: it must give one array of "
            "that shape"
        )
    return F_BHWC


def loss_at(
    denoise: Denoise, params: Any, x0_BHWC: Array, cond: Any, t_B: Array, eps_BHWC: Array,
    schedule: Schedule, prediction: str,
) -> Array:
    """Mean squared error of the network's output at given timesteps and noise.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        params: its parameters.
        x0_BHWC: clean latents.
        cond: conditioning, a pytree of arrays with leading axis B.
        t_B: int32 timesteps in [0, T).
        eps_BHWC: standard normal noise.
        schedule: the noise schedule.
        prediction: what the network outputs, one of `parameterization.PREDICTIONS`.

    Returns:
        loss_B, float32, the mean over H, W and C.

    Raises:
        UserError: for an unknown prediction, epsilon with a zero-terminal-SNR schedule, or an
            output of another shape than x0's.
    """
    parameterization.check(prediction, schedule)
    x0_BHWC, eps_BHWC = x0_BHWC.astype(jnp.float32), eps_BHWC.astype(jnp.float32)
    per_sample = (-1,) + (1,) * (x0_BHWC.ndim - 1)
    alpha_B111 = jnp.asarray(schedule.alpha, jnp.float32)[t_B].reshape(per_sample)
    sigma_B111 = jnp.asarray(schedule.sigma, jnp.float32)[t_B].reshape(per_sample)
    x_BHWC = alpha_B111 * x0_BHWC + sigma_B111 * eps_BHWC
    wanted_BHWC = parameterization.target(prediction, x0_BHWC, eps_BHWC, alpha_B111, sigma_B111)
    F_BHWC = checked(denoise(params, x_BHWC, t_B.astype(jnp.float32), cond), x_BHWC)
    F_BHWC = F_BHWC.astype(jnp.float32)
    return jnp.mean((F_BHWC - wanted_BHWC) ** 2, axis=tuple(range(1, x0_BHWC.ndim)))


def diffusion_loss(
    denoise: Denoise, params: Any, x0_BHWC: Array, cond: Any, key: Array, schedule: Schedule,
    prediction: str, timesteps: str = "uniform", weighting: str = "none",
) -> Array:
    """The training loss of each sample, its timestep random and its noise standard normal.

    Arguments, return value (loss_B, float32) and errors are `loss_at`'s, and

    Args:
        key: a JAX random key.
        timesteps: their density, see `timesteps.draw`.
        weighting: of the loss by timestep, see `weighting.weights`.

    Source: Ho et al. 2020, eq. 14, for any parameterisation.
    """
    t_key, eps_key = jax.random.split(key)
    t_B = timesteps_lib.draw(timesteps, t_key, x0_BHWC.shape[0], schedule)
    eps_BHWC = jax.random.normal(eps_key, x0_BHWC.shape, jnp.float32)
    loss_B = loss_at(denoise, params, x0_BHWC, cond, t_B, eps_BHWC, schedule, prediction)
    weight_T = weighting_lib.weights(weighting, schedule, prediction)
    return loss_B if weight_T is None else jnp.asarray(weight_T, jnp.float32)[t_B] * loss_B


def validation_points(
    index_B: Array, shape: tuple[int, ...], num_timesteps: int, seed: int, draws: int = 1,
    place_B: Array | None = None,
) -> tuple[Array, Array]:
    """The fixed timesteps and noise of validation samples.

    The timesteps of one sample fall one into each of `draws` equal strata of [0, T); where within
    the stratum follows Weyl's golden-ratio sequence over the samples' places, so any run of
    consecutive places covers [0, T) evenly too. Numbers at a stride do not: every 987th, a
    Fibonacci number, would have nearly the same timestep.

    Args:
        index_B: dataset indices, integers: of the noise.
        shape: the shape of one sample.
        num_timesteps: T.
        seed: another seed gives other timesteps and noise.
        draws: timesteps per sample, K.
        place_B: the samples' places in the validation set, integers: of the timesteps. The indices
            if not given, which must be consecutive then.

    Returns:
        t_BK int32 and eps_BK... float32 of shape (B, K, *shape).
    """
    start = np.random.default_rng(seed).integers(2**32, dtype=np.uint32)
    place_B = index_B if place_B is None else place_B
    turns_B = start + place_B.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    # 24 bits: exact in float32.
    unit_B = (turns_B >> 8).astype(jnp.float32) * 2.0**-24
    strata_K = jnp.arange(draws, dtype=jnp.float32)
    t_BK = jnp.floor((strata_K + unit_B[:, None]) * (num_timesteps / draws)).astype(jnp.int32)
    # Float32 may round the last stratum's end up to T.
    t_BK = jnp.minimum(t_BK, num_timesteps - 1)

    def noise(index: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(key, (draws, *shape), jnp.float32)

    return t_BK, jax.vmap(noise)(index_B)


def validation_loss(
    denoise: Denoise, params: Any, x0_BHWC: Array, cond: Any, index_B: Array,
    schedule: Schedule, prediction: str, draws: int = 1, place_B: Array | None = None,
) -> Array:
    """The loss of each sample at a noise that its dataset index fixes, and at timesteps that its
    place in the validation set does.

    Comparable across models and checkpoints, whatever the batch size, the order of the samples or
    the number of hosts; see `validation_points`. The network sees a batch of B * draws.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        params: its parameters.
        x0_BHWC: clean latents.
        cond: conditioning, a pytree of arrays with leading axis B.
        index_B: the samples' dataset indices, integers.
        schedule: the noise schedule.
        prediction: what the network outputs, one of `parameterization.PREDICTIONS`.
        draws: stratified timesteps per sample.
        place_B: the samples' places, see `validation_points`.

    Returns:
        loss_B, float32, the mean over H, W, C and draws.

    Raises:
        UserError: as `loss_at`, for a number of draws outside 1..T, or for indices or places that
            are no array of B.
    """
    if not (isinstance(draws, numbers.Integral) and 1 <= draws <= schedule.num_timesteps):
        raise UserError(
            f"validation with {draws} draws per sample: give 1 to {schedule.num_timesteps}, the "
            "number of timesteps"
        )
    batch = x0_BHWC.shape[0]
    place_B = index_B if place_B is None else place_B
    for name, given_B in (("index_B", index_B), ("place_B", place_B)):
        if (given := getattr(given_B, "shape", type(given_B).__name__)) != (batch,):
            raise UserError(
                f"validation: {name} is {given}, but x0_BHWC {x0_BHWC.shape}: give an array with "
                "one number a sample"
            )
    t_BK, eps_BKHWC = validation_points(
        index_B, x0_BHWC.shape[1:], schedule.num_timesteps, 0, draws, place_B
    )
    loss_N = loss_at(
        denoise, params, jnp.repeat(x0_BHWC, draws, axis=0),
        jax.tree.map(lambda leaf: jnp.repeat(leaf, draws, axis=0), cond), t_BK.reshape(-1),
        eps_BKHWC.reshape(batch * draws, *x0_BHWC.shape[1:]), schedule, prediction,
    )
    return loss_N.reshape(batch, draws).mean(axis=1)
