"""Which timesteps are trained at, and how often."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from ldm_scaling.config import named
from ldm_scaling.diffusion.schedule import Schedule, log_noise

# So that no draw is at an infinite quantile.
_TINY = 2.0**-25


def quantile(density: str, u_B: Array) -> Array:
    """The u-quantile of t / T in (0, 1), of densities that no schedule decides.

    | density      | t / T                                                       |
    |--------------|-------------------------------------------------------------|
    | uniform      | u                                                           |
    | shifted      | shift u / (1 + (shift - 1) u)                               |
    | logit_normal | log of t / (T - t) is normal; a mean above 0 is more noise  |
    | mode         | u + scale (u - sin^2(pi u / 2)): more often in the middle   |

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1 and eq. 19, 20, 23.

    Args:
        density: its name with options, see `config.named`.
        u_B: in (0, 1).

    Raises:
        UserError: for an unknown density or option.
    """
    name, options = named.parse("timesteps", density, named.TIMESTEPS)
    if name == "uniform":
        return u_B
    if name == "shifted":
        shift = options["shift"]
        return shift * u_B / (1 + (shift - 1) * u_B)
    if name == "mode":
        return u_B + options["scale"] * (u_B - jnp.sin(jnp.pi / 2 * u_B) ** 2)
    if name == "logit_normal":
        return jax.nn.sigmoid(options["mean"] + options["std"] * jax.scipy.special.ndtri(u_B))
    raise ValueError(f"density {density!r} is one of noise levels, not of t / T")


def draw(density: str, key: Array, count: int, schedule: Schedule) -> Array:
    """Random timesteps, t_B int32 in [0, T).

    Args:
        density: a name with options: those of `quantile`, or "log_normal", under which the
            logarithm of the noise level sigma / alpha is normal and t the nearest to it (Karras et
            al. 2022 (EDM), table 1; its mean -1.2 for sigma_data = 0.5 is the default here).
        key: a JAX random key.
        count: B.
        schedule: the noise schedule.

    Raises:
        UserError: for an unknown density or option.
    """
    name, options = named.parse("timesteps", density, named.TIMESTEPS)
    T = schedule.num_timesteps
    if name == "uniform":
        return jax.random.randint(key, (count,), 0, T)
    if name == "log_normal":
        level_B = options["mean"] + options["std"] * jax.random.normal(key, (count,))
        known_T = log_noise(schedule.noise)
        middle = jnp.asarray((known_T[1:] + known_T[:-1]) / 2, jnp.float32)
        return jnp.searchsorted(middle, level_B).astype(jnp.int32)
    u_B = jax.random.uniform(key, (count,), minval=_TINY)
    t_B = jnp.floor(T * quantile(density, u_B)).astype(jnp.int32)
    return jnp.clip(t_B, 0, T - 1)
