"""Which timesteps are trained at, and how often."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ldm_scaling.config import named
from ldm_scaling.diffusion.schedule import Schedule, log_noise

# So that no draw is at an infinite quantile.
_TINY = 2.0**-25
Draw = Callable[..., Array]


def by_quantile(quantile: Callable[..., Array]) -> Draw:
    """The density of which `quantile(u_B, **options)` is the u-quantile of t / T, in (0, 1)."""

    def draw(key: Array, count: int, schedule: Schedule, **options: float) -> Array:
        u_B = jax.random.uniform(key, (count,), jnp.float32, _TINY)
        t_B = jnp.floor(schedule.num_timesteps * quantile(u_B, **options)).astype(jnp.int32)
        return jnp.clip(t_B, 0, schedule.num_timesteps - 1)

    return draw


def shifted(u_B: Array, *, shift: float) -> Array:
    """u moved to a shift, as by `schedule.flow` (Esser et al. 2024, eq. 23)."""
    return shift * u_B / (1 + (shift - 1) * u_B)


def logit_normal(u_B: Array, *, mean: float, std: float) -> Array:
    """log of t / (T - t) is normal; a mean above 0 is more noise (Esser et al. 2024, eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u_B))


def mode(u_B: Array, *, scale: float) -> Array:
    """u + scale (u - sin^2(pi u / 2)): more often in the middle (Esser et al. 2024, eq. 20)."""
    return u_B + scale * (u_B - jnp.sin(jnp.pi / 2 * u_B) ** 2)


def _uniform(key: Array, count: int, schedule: Schedule) -> Array:
    return jax.random.randint(key, (count,), 0, schedule.num_timesteps, jnp.int32)


def _log_normal(key: Array, count: int, schedule: Schedule, *, mean: float, std: float) -> Array:
    level_B = mean + std * jax.random.normal(key, (count,), jnp.float32)
    known_T = log_noise(schedule.noise)
    middle = jnp.asarray((known_T[1:] + known_T[:-1]) / 2, jnp.float32)
    return jnp.searchsorted(middle, level_B).astype(jnp.int32)


DENSITIES = named.filled(named.DENSITIES, {
    "uniform": _uniform, "shifted": by_quantile(shifted), "logit_normal": by_quantile(logit_normal),
    "mode": by_quantile(mode), "log_normal": _log_normal,
})
"""Densities by name: `make(key, count, schedule, **options) -> t_B`, int32 in [0, T), such as
`by_quantile` makes. One's own are added here."""


def draw(density: str, key: Array, count: int, schedule: Schedule) -> Array:
    """Random timesteps, t_B int32 in [0, T): the same whether JAX has 64 bits or not.

    Args:
        density: one of `DENSITIES`, with options. Under "log_normal" the logarithm of the noise
            level sigma / alpha is normal and t the nearest to it (Karras et al. 2022 (EDM), table
            1; its mean -1.2 for sigma_data = 0.5 is the default here).
        key: a JAX random key.
        count: B.
        schedule: the noise schedule.

    Raises:
        UserError: for an unknown density or option.
    """
    name, options = named.parse("timesteps", density, DENSITIES)
    return DENSITIES[name].make(key, count, schedule, **options)
