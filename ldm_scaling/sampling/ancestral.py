"""The first solvers: DDIM, which is Euler's method, and DDPM, ancestral sampling."""

from __future__ import annotations

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.step import Steps, one_row_a_step
from ldm_scaling.sampling.table import SamplerTable


def _with_fresh_noise(solver: str, grid: Grid, prediction: str, eta: float) -> SamplerTable:
    """The first-order row whose end has eta^2 (1 - rho^2) of its noise's variance fresh."""
    steps = Steps.of(grid)
    kept = np.maximum(1 - eta**2 + (eta * steps.rho) ** 2, 0)
    a = steps.sigma1 / steps.sigma * np.sqrt(kept)
    c = steps.sigma1 * np.minimum(eta * np.sqrt(1 - steps.rho**2), 1)
    b0 = steps.alpha1 - steps.alpha * a
    return one_row_a_step(solver, grid, prediction, a=a, b0=b0, c=c)


def ddim(grid: Grid, prediction: str, *, eta: float = 0.0) -> SamplerTable:
    """DDIM: deterministic at eta=0, ancestral (DDPM's small variance) at eta=1.

    With eta=0 this is Euler's method in x / alpha over sigma / alpha (Karras et al. 2022).

    Source: Song et al. 2021, eq. 12 and 16.

    Raises:
        UserError: unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"ddim with eta={eta}: give 0 (deterministic) to 1 (ancestral)")
    return _with_fresh_noise(f"ddim_eta{eta:g}" if eta else "ddim", grid, prediction, eta)


def euler_ancestral(grid: Grid, prediction: str, *, eta: float = 1.0) -> SamplerTable:
    """Euler's method down to less noise than asked for, and fresh noise up to it.

    The same rows as `ddim` while eta <= 1; beyond, up to all of the noise is fresh.

    Source: k-diffusion, sampling.py, sample_euler_ancestral and get_ancestral_step.

    Raises:
        UserError: unless 0 <= eta <= 1e6, where all of it is, however short the steps.
    """
    if not 0 <= eta <= 1e6:
        raise UserError(f"euler_ancestral with eta={eta}: give 0 to 1e6")
    return _with_fresh_noise(f"euler_ancestral_eta{eta:g}", grid, prediction, eta)


def _size(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    size = np.hypot(alpha, sigma)
    return np.where(np.abs(size - 1) < 1e-12, 1.0, size)  # to the last bit


def ddpm(
    grid: Grid, prediction: str, *, variance: str = "fixed_small", final_noise: bool = False
) -> SamplerTable:
    """Ancestral sampling on the respaced grid.

    Args:
        grid: the nodes.
        prediction: what the network outputs.
        variance: "fixed_small", the posterior's for known x0 (beta tilde), or "fixed_large", the
            forward step's (beta), which leaves more noise than the node should hold.
        final_noise: whether "fixed_large" adds noise to a last step that ends without noise and
            starts at t > 0. diffusers' does (standard deviation 0.041 at t=1, but 0.998 at a
            single step from t=999); Ho et al.'s algorithm 2, and this by default, do not.

    Source: Ho et al. 2020, eq. 7 and section 3.2; Nichol & Dhariwal 2021, section 4, for the
    respaced grid.

    Raises:
        UserError: for another variance, or `final_noise` without "fixed_large".
    """
    variances = ("fixed_small", "fixed_large")
    if variance not in variances:
        raise UserError(f"unknown ddpm variance {variance!r}: choose one of {', '.join(variances)}")
    large = variance == "fixed_large"
    if final_noise and not large:
        raise UserError("final_noise=True belongs to variance='fixed_large': leave it out")
    steps = Steps.of(grid)
    # Variance preserving, where the papers' formulas hold, and then to the grid's own scales.
    size, size1 = _size(steps.alpha, steps.sigma), _size(steps.alpha1, steps.sigma1)
    alpha, sigma, alpha1, sigma1 = (
        steps.alpha / size, steps.sigma / size, steps.alpha1 / size1, steps.sigma1 / size1
    )
    kept = (alpha / alpha1) ** 2
    a = size1 / size * (np.sqrt(kept) * (sigma1 / sigma) ** 2)
    b0 = size1 * (alpha1 * (1 - kept) / sigma**2)
    c = size1 * (np.sqrt(1 - kept) * (1 if large else sigma1 / sigma))
    solver = "ddpm" + ("_large" if large else "") + ("_final_noise" if final_noise else "")
    return one_row_a_step(
        solver, grid, prediction, a=a, b0=b0, c=c, keeps_noise=not large,
        noise_at_end=c[-1] if final_noise and grid.timesteps[-1] > 0 else 0.0,
    )
