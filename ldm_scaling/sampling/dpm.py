"""DPM-Solver++ in all its forms: orders 1 to 3, several steps or one, with and without noise."""

from __future__ import annotations

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.history import History, moments
from ldm_scaling.sampling.step import Steps, one_row_a_step
from ldm_scaling.sampling.table import SamplerTable

# diffusers' threshold; the authors' own code has 10.
_FEW_STEPS = 15
_CHOICES = {
    "variant": ("multistep", "singlestep"),
    "solver_type": ("midpoint", "heun"),
    "third_order": ("public", "exact"),
}


def dpm_solver_pp(
    grid: Grid, prediction: str, *, order: int = 2, variant: str = "multistep", eta: float = 0.0,
    solver_type: str = "midpoint", lower_order_final: bool = True, third_order: str = "public",
    midpoints: bool = False,
) -> SamplerTable:
    """DPM-Solver++.

    Args:
        grid: the nodes.
        prediction: what the network outputs.
        order: 1, 2, or 3 (multistep only).
        variant: "multistep" looks back at the x0 of earlier nodes ("2M", "3M"); "singlestep" takes
            the nodes in pairs, a step of first order and one of second order over both ("2S").
        eta: how much noise a step refreshes: 0 none, 1 as the reverse SDE ("SDE" in names).
        solver_type: how a second-order step takes the slope of x0: "midpoint" (the authors'
            default), or "heun", which is exact for an x0 linear in log-SNR.
        lower_order_final: multistep: with fewer than 15 steps the last is of first order and the
            one before of second at most. Singlestep: an even number of nodes ends in two steps of
            first order instead of a pair, at any number.
        third_order: "public", as all published code has it, or "exact", which is of order 3: the
            former halves the term of the second derivative.
        midpoints: singlestep: place a node in the middle (in log-SNR) of each step, so that each
            is a pair of its own and costs two calls, but for one to no noise, of no length or from
            pure noise. Otherwise the grid's own nodes are paired, and N steps cost N calls.

    The first step is of first order, the second of second at most, and a last one that ends
    without noise of first.

    Source: Lu et al. 2022 (DPM-Solver++), algorithms 1 and 2, eq. 9; diffusers,
    scheduling_dpmsolver_multistep.py and scheduling_dpmsolver_singlestep.py; k-diffusion,
    sampling.py: sample_dpmpp_2m_sde and sample_dpmpp_3m_sde for eta, sample_dpmpp_2s_ancestral
    (eta=0) for midpoints.

    Raises:
        UserError: for another value, or for values that do not go together.
    """
    given = {"variant": variant, "solver_type": solver_type, "third_order": third_order}
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise UserError(
                f"dpm_solver_pp with {name}={value!r}: choose one of {', '.join(_CHOICES[name])}"
            )
    if order not in (1, 2, 3):
        raise UserError(f"dpm_solver_pp with order={order}: choose 1, 2 or 3")
    if not 0 <= eta < np.inf:
        raise UserError(f"dpm_solver_pp with eta={eta}: give 0 (deterministic) or more")
    if variant == "singlestep":
        if order != 2 or eta:
            raise UserError(
                f"dpm_solver_pp with variant='singlestep', order={order}, eta={eta}: singlestep "
                "has order 2 and eta 0 only"
            )
        return _singlestep(grid, prediction, solver_type, lower_order_final, midpoints)
    if midpoints:
        raise UserError("midpoints=True belongs to variant='singlestep': leave it out")
    return _multistep(grid, prediction, order, eta, solver_type, lower_order_final, third_order)


def _multistep(
    grid: Grid, prediction: str, order: int, eta: float, solver_type: str,
    lower_order_final: bool, third_order: str,
) -> SamplerTable:
    steps, k = Steps.of(grid), np.arange(grid.steps)
    order_N = np.minimum(order, k + 1)
    if lower_order_final and grid.steps < _FEW_STEPS:
        order_N = np.minimum(order_N, grid.steps - k)
    order_N[steps.clean] = 1

    a = steps.sigma1 / steps.sigma * steps.rho**eta
    # alpha' I_0, and in this form the signal is kept to the last bit.
    P = steps.alpha1 - steps.alpha * a
    I_0, I_1, I_2 = moments((1 + eta) * steps.h, 3)
    slope = np.where((order_N == 2) & (solver_type == "midpoint"), I_0 / 2, I_1)
    curve = I_2 if third_order == "exact" else I_2 / 2
    m0, m1, m2 = np.eye(3)[..., None]
    _, D1, D2 = History.of(steps.h, order_N).differences(m0, m1, m2)
    b0, b1, b2 = P * m0 + steps.alpha1 * (slope * D1 + curve * D2)
    name = f"dpmpp_{'1s' if order == 1 else f'{order}m'}" + (f"_sde_eta{eta:g}" if eta else "")
    c = steps.sigma1 * np.sqrt(1 - steps.rho ** (2 * eta))
    return one_row_a_step(name, grid, prediction, a=a, b0=b0, b1=b1, b2=b2, c=c)


def _singlestep(
    grid: Grid, prediction: str, solver_type: str, lower_order_final: bool, midpoints: bool
) -> SamplerTable:
    if midpoints:
        middle = grid.with_midpoints()
        second = ~np.isin(middle.timesteps, grid.timesteps)
        grid = middle
    else:
        second = np.arange(grid.steps) % 2 == 1
        second[-1] &= not lower_order_final
    steps = Steps.of(grid)
    second &= ~steps.clean

    a = steps.sigma1 / steps.sigma
    b0, b1 = steps.alpha1 - steps.alpha * a, np.zeros(grid.steps)
    # The second row of a pair goes over both steps from where the first began. That x is what the
    # row is given, x~ = (sigma'/sigma) x + P m1, taken back.
    k = np.flatnonzero(second)
    h = steps.h[k - 1] + steps.h[k]
    whole = steps.alpha1[k] - steps.alpha[k - 1] * steps.sigma1[k] / steps.sigma[k - 1]
    I_0, I_1 = moments(h, 2)
    slope = steps.alpha1[k] * (I_0 / 2 if solver_type == "midpoint" else I_1)
    # 1/r0 = h / h_before, and 1 from pure noise, where both are infinite.
    slope *= 1 + steps.h[k] / steps.h[k - 1]
    b1[k] = whole - slope - a[k] * b0[k - 1]
    b0[k] = slope
    name = "dpmpp_2s" + ("_midpoints" if midpoints else "")
    return one_row_a_step(name, grid, prediction, a=a, b0=b0, b1=b1)
