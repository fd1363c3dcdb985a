"""Samplers of distilled models, which need one to a few steps: LCM and CoDi."""

from __future__ import annotations

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.consistency import boundary
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.step import Steps
from ldm_scaling.sampling.table import SamplerTable


def _table(solver: str, grid: Grid, prediction: str, **columns: np.ndarray) -> SamplerTable:
    # c_skip x brings a trace of the old noise along (1e-4 of it at t=5, 7e-6 at t=19).
    # From the end to the end, as from t=0 to "abar_0", nothing is left to do.
    there = (grid.alpha[:-1] == grid.alpha[1:]) & (grid.sigma[:-1] == grid.sigma[1:])
    for name, stays in {"a": 1.0, "b0": 0.0, "c": 0.0}.items():
        columns[name] = np.where(there, stays, columns.get(name, 0.0))
    p, q = parameterization.x0_coefficients(prediction, grid.alpha[:-1], grid.sigma[:-1])
    return SamplerTable(
        name=f"{solver}-{grid.name}-{grid.steps}", t=grid.timesteps, p=p, q=q, alpha=grid.alpha,
        sigma=grid.sigma, keeps_signal=False, keeps_noise=False, **columns,
    )


def lcm(grid: Grid, prediction: str) -> SamplerTable:
    """Multistep consistency sampling: to x0, and back to the next node with fresh noise.

    Source: Luo et al. 2023 (Latent Consistency Models), multistep sampling;
    diffusers, scheduling_lcm.py.
    """
    steps = Steps.of(grid)
    c_skip, c_out = boundary(grid.timesteps)
    return _table(
        "lcm", grid, prediction, a=steps.alpha1 * c_skip, b0=steps.alpha1 * c_out, c=steps.sigma1
    )


def codi(grid: Grid, prediction: str) -> SamplerTable:
    """CoDi's deterministic sampler: to x0, and back to the next node with the noise of x.

    At t=0 (in 8 and 50 of its own steps) nothing is left to do: there the authors' code adds the
    noise of x a second time.

    Source: Mei et al. 2024 (CoDi); the authors' public code, codi/pipeline_flax_controlnet.py.
    """
    steps = Steps.of(grid)
    c_skip, c_out = boundary(grid.timesteps)
    kept = steps.sigma1 / steps.sigma
    return _table(
        "codi", grid, prediction, a=steps.alpha1 * c_skip + kept,
        b0=steps.alpha1 * c_out - kept * steps.alpha,
    )
