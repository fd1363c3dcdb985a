"""The consistency function: from any noisy latent to where its trajectory ends, in one call.

It ends at timestep 0, the schedule's smallest noise, and there it is the identity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import Array

from ldm_scaling.diffusion.loss import Denoise, checked
from ldm_scaling.diffusion.nodes import Nodes, at

_SIGMA_DATA = 0.5
_TIME_SCALE = 10.0


def boundary(timestep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c_skip, c_out: a consistency model's output is c_skip x + c_out x0, which is x at t = 0.

    Source: Song et al. 2023 (Consistency Models), eq. 5; Luo et al. 2023 (LCM) for the constants.
    """
    scaled = _TIME_SCALE * np.asarray(timestep, np.float64)
    square = scaled**2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / square, scaled / np.sqrt(square)


def bounded(nodes: Nodes, z_BHWC: Array, m_BHWC: Array, i_B: Array) -> Array:
    """c_skip z + c_out m at node i, for what a network says of z: its x0, or its eps.

    Source: Song et al. 2023 (Consistency Models), eq. 5.
    """
    c_skip, c_out = (at(c, i_B, z_BHWC.ndim) for c in boundary(nodes.timesteps))
    return c_skip * z_BHWC + c_out * m_BHWC


def function(
    denoise: Denoise, params: Any, z_BHWC: Array, i_B: Array, cond: Any, nodes: Nodes
) -> Array:
    """f(z, t) = c_skip z + c_out x0(z, t): float32, z itself at timestep 0 whatever the network is.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        params: its parameters.
        z_BHWC: noisy latents.
        i_B: the node of each.
        cond: conditioning, a pytree of arrays with leading axis B.
        nodes: what i counts, and what F means.

    Source: Luo et al. 2023 (Latent Consistency Models), section 4.1.
    """
    F_BHWC = checked(denoise(params, z_BHWC, nodes.t(i_B), cond), z_BHWC)
    return bounded(nodes, z_BHWC, nodes.x0(z_BHWC, F_BHWC, i_B), i_B)
