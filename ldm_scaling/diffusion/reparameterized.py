"""Another parameterisation for a network: what it says stays the same, in other words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.loss import Denoise, checked
from ldm_scaling.diffusion.schedule import Schedule


def reparameterized(denoise: Denoise, schedule: Schedule, have: str, want: str) -> Denoise:
    """A `denoise` with the same parameters that outputs `want` where the network outputs `have`.

    A student so made starts as its teacher's exact function, and is trained and sampled in v or x0:
    x0 from eps is divided by alpha, which few-step losses do not bear (Salimans & Ho 2022,
    section 4). Exact at whole timesteps, linear in t between.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        schedule: the noise schedule that t counts on.
        have: what it outputs, one of `parameterization.PREDICTIONS`.
        want: what it shall.

    Raises:
        UserError: for an unknown prediction, or epsilon with a zero-terminal-SNR schedule.
    """
    for prediction in (have, want):
        parameterization.check(prediction, schedule)
    if have == want:
        return denoise
    alpha, sigma = schedule.alpha, schedule.sigma
    x0_p, x0_q = parameterization.x0_coefficients(have, alpha, sigma)
    eps_p, eps_q = parameterization.eps_coefficients(have, alpha, sigma)
    # Targets are linear in x0 and eps, and these in x and F: want = p x + q F.
    p_T, q_T = (
        parameterization.target(want, x0, eps, alpha, sigma).astype(np.float32)
        for x0, eps in ((x0_p, eps_p), (x0_q, eps_q))
    )
    known_T = np.arange(schedule.num_timesteps, dtype=np.float32)

    def changed(params: Any, x_BHWC: Array, t_B: Array, cond: Any) -> Array:
        F_BHWC = checked(denoise(params, x_BHWC, t_B, cond), x_BHWC).astype(jnp.float32)
        p, q = (
            jnp.interp(t_B, known_T, values).reshape(-1, *(1,) * (x_BHWC.ndim - 1))
            for values in (p_T, q_T)
        )
        return p * x_BHWC + q * F_BHWC

    return changed
