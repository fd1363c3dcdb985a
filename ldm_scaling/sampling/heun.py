"""Heun's method: two calls a step, as a table of two rows a step."""

from __future__ import annotations

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.step import Steps
from ldm_scaling.sampling.table import SamplerTable

OVER = ("noise", "line")


def heun(grid: Grid, prediction: str, *, over: str = "noise") -> SamplerTable:
    """Heun's method.

    Args:
        grid: the nodes.
        prediction: what the network outputs.
        over: "noise": in x / alpha over sigma / alpha; "line": in x along the straight line from
            node to node, dx = x0 d alpha + eps d sigma. On a straight schedule this is Heun's
            method for the flow, and with constant alpha both are the same.

    A step is Euler's, then a second row at its end that puts the mean of both slopes in place of
    the first. A step to no noise is Euler's alone, so is one of no length (the last of karras
    spacing with final="abar_0"), and over "noise" one from pure noise, where sigma / alpha is
    infinite. N steps cost 2N calls less one for each of these: 2N - 1 where they end without noise.

    Source: Karras et al. 2022, algorithm 1; diffusers, scheduling_heun_discrete.py; k-diffusion,
    sampling.py, sample_heun; diffusers, scheduling_flow_match_heun_discrete.py for "line".

    Raises:
        UserError: for another `over`.
    """
    if over not in OVER:
        raise UserError(f"heun with over={over!r}: choose one of {', '.join(OVER)}")
    steps = Steps.of(grid)
    t_end = np.append(grid.timesteps[1:], grid.timestep_at_end)
    euler = steps.sigma1 / steps.sigma
    names = ("node", "t", "a", "b0", "b1")
    rows = []
    for k in range(grid.steps):
        b0 = 1.0 if steps.clean[k] else steps.alpha1[k] - steps.alpha[k] * euler[k]
        rows.append((k, grid.timesteps[k], euler[k], b0, 0.0))
        if not steps.clean[k] and steps.rho[k] < 1 and (over == "line" or steps.rho[k] > 0):
            # Half of dt (slope at the end - slope at the start), where x~ cancels.
            if over == "line":
                b = (steps.alpha1[k] * steps.sigma[k] / steps.sigma1[k] - steps.alpha[k]) / 2
            else:
                b = steps.alpha1[k] * (1 - steps.rho[k]) / (2 * steps.rho[k])
            rows.append((k + 1, t_end[k], 1.0, b, -b))
    columns = dict(zip(names, np.array(rows).T, strict=True))
    node = columns.pop("node").astype(int)
    alpha, sigma = grid.alpha[node], grid.sigma[node]
    p, q = parameterization.x0_coefficients(prediction, alpha, sigma)
    return SamplerTable(
        name=f"heun{'' if over == 'noise' else f'_{over}'}-{grid.name}-{grid.steps}", p=p, q=q,
        alpha=np.append(alpha, grid.alpha[-1]), sigma=np.append(sigma, grid.sigma[-1]), **columns,
    )
