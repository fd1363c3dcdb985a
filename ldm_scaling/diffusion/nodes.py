"""Nodes that a traced computation indexes: noising, and what a network's output at one means."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes by number i, and a network that is called at them.

    Everything is float64 here and cast once, where an array takes it up.

    Attributes:
        timesteps: (N,) what the network is told.
        alpha: (N,) signal scales; or (N+1,), if a node follows at which no network is called.
        sigma: noise scales, the same.
        prediction: what the network outputs, one of `parameterization.PREDICTIONS`.

    Raises:
        UserError: for an unknown prediction, or one that a node rules out, see
            `parameterization.x0_coefficients`.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    prediction: str

    def __post_init__(self):
        # Made now, outside of any trace, and so that a mistake is found here.
        self._x0, self._eps  # noqa: B018

    @classmethod
    def of(cls, schedule: Schedule, prediction: str) -> Nodes:
        """All timesteps of a schedule: node i is timestep i."""
        return cls(
            np.arange(schedule.num_timesteps), schedule.alpha, schedule.sigma, prediction
        )

    @functools.cached_property
    def _x0(self) -> tuple[np.ndarray, np.ndarray]:
        N = len(self.timesteps)
        return parameterization.x0_coefficients(self.prediction, self.alpha[:N], self.sigma[:N])

    @functools.cached_property
    def _eps(self) -> tuple[np.ndarray, np.ndarray]:
        N = len(self.timesteps)
        return parameterization.eps_coefficients(self.prediction, self.alpha[:N], self.sigma[:N])

    def t(self, i_B: Array) -> Array:
        """What the network is told, t_B, float32."""
        return jnp.asarray(self.timesteps, jnp.float32)[i_B]

    def noisy(self, x0_BHWC: Array, eps_BHWC: Array, i_B: Array) -> Array:
        """alpha x0 + sigma eps at node i. With a network's x0 and eps at another node this is the
        DDIM step from there (Song et al. 2021, eq. 12 without noise)."""
        return (
            at(self.alpha, i_B, x0_BHWC.ndim) * x0_BHWC
            + at(self.sigma, i_B, x0_BHWC.ndim) * eps_BHWC
        )

    def x0(self, x_BHWC: Array, F_BHWC: Array, i_B: Array) -> Array:
        """The x0 that an output F at x, node i, stands for."""
        return self._linear(self._x0, x_BHWC, F_BHWC, i_B)

    def eps(self, x_BHWC: Array, F_BHWC: Array, i_B: Array) -> Array:
        """The eps that an output F at x, node i, stands for."""
        return self._linear(self._eps, x_BHWC, F_BHWC, i_B)

    def _linear(self, pq: tuple[np.ndarray, np.ndarray], x: Array, F: Array, i_B: Array) -> Array:
        p, q = (at(values, i_B, x.ndim) for values in pq)
        return p * x + q * F.astype(jnp.float32)


def at(values_N: np.ndarray, i_B: Array, ndim: int) -> Array:
    """Values of nodes i, float32, with ones appended to the shape up to `ndim` axes."""
    return jnp.asarray(values_N, jnp.float32)[i_B].reshape(-1, *(1,) * (ndim - 1))
