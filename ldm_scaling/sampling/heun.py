"""Heun's method: two calls a step, as a table of two rows a step."""

from __future__ import annotations

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.step import Steps
from ldm_scaling.sampling.table import SamplerTable


def heun(grid: Grid, prediction: str) -> SamplerTable:
    """Heun's method in x / alpha over sigma / alpha.

    A step is Euler's, then a second row at its end that puts the mean of both slopes in place of
    the first. A step to no noise, or from pure noise (where sigma / alpha is infinite), is Euler's
    alone. N steps that end without noise cost 2N - 1 calls, others 2N.

    Source: Karras et al. 2022, algorithm 1; diffusers, scheduling_heun_discrete.py; k-diffusion,
    sampling.py, sample_heun.
    """
    steps = Steps.of(grid)
    t_end = np.append(grid.timesteps[1:], grid.timestep_at_end)
    euler = steps.sigma1 / steps.sigma
    names = ("node", "t", "a", "b0", "b1")
    rows = []
    for k in range(grid.steps):
        b0 = 1.0 if steps.clean[k] else steps.alpha1[k] - steps.alpha[k] * euler[k]
        rows.append((k, grid.timesteps[k], euler[k], b0, 0.0))
        if 0 < steps.rho[k] < 1:
            # Half of dt (slope at the end - slope at the start), where x~ cancels.
            b = steps.alpha1[k] * (1 - steps.rho[k]) / (2 * steps.rho[k])
            rows.append((k + 1, t_end[k], 1.0, b, -b))
    columns = dict(zip(names, np.array(rows).T, strict=True))
    node = columns.pop("node").astype(int)
    alpha, sigma = grid.alpha[node], grid.sigma[node]
    p, q = parameterization.x0_coefficients(prediction, alpha, sigma)
    return SamplerTable(
        name=f"heun-{grid.name}-{grid.steps}", p=p, q=q,
        alpha=np.append(alpha, grid.alpha[-1]), sigma=np.append(sigma, grid.sigma[-1]), **columns,
    )
