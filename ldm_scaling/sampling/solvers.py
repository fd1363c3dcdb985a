"""The solvers: each is a function from a grid to a table of coefficients.

Notation of a step from node k to its neighbour: alpha, sigma here and alpha', sigma' there (in the
code alpha1, sigma1); rho = exp(-h) = (sigma'/alpha') / (sigma/alpha), with h the step in half
log-SNR. Written with rho, every row is finite at zero terminal SNR, where h is infinite.

To add a solver, write a function that returns a `SamplerTable` and list it in `SOLVERS`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid as grids
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.table import SamplerTable


def _one_call_a_step(
    solver: str, grid: Grid, prediction: str, *, a: np.ndarray, b0: np.ndarray,
    b1: np.ndarray | None = None, c: np.ndarray | None = None, noise_at_end: float = 0.0,
    keeps_noise: bool = True,
) -> SamplerTable:
    """The table with a row per node; a last node without noise is reached by x' = m0."""
    zeros = np.zeros(grid.steps)
    columns = {"a": a, "b0": b0, "b1": zeros if b1 is None else b1, "c": zeros if c is None else c}
    clean = grid.sigma[1:] == 0
    ends = {"a": 0.0, "b0": 1.0, "b1": 0.0, "c": noise_at_end}
    columns = {name: np.where(clean, ends[name], column) for name, column in columns.items()}
    p, q = parameterization.x0_coefficients(prediction, grid.alpha[:-1], grid.sigma[:-1])
    return SamplerTable(
        name=f"{solver}-{grid.name}-{grid.steps}", t=grid.timesteps, p=p, q=q, b2=zeros,
        alpha=grid.alpha, sigma=grid.sigma, keeps_noise=keeps_noise, **columns,
    )


def _nodes(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma, alpha', sigma' and rho of every step."""
    alpha, sigma, alpha1, sigma1 = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    if np.any(sigma == 0):
        raise UserError(f"grid {grid.name!r} leaves a node without noise: only its end may be so")
    rho = np.minimum((sigma1 * alpha) / (alpha1 * sigma), 1)
    return alpha, sigma, alpha1, sigma1, rho


def ddim(grid: Grid, prediction: str, *, eta: float = 0.0) -> SamplerTable:
    """DDIM: deterministic at eta=0, ancestral (DDPM's small variance) at eta=1.

    Source: Song et al. 2021, eq. 12 and 16.

    Raises:
        UserError: unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"ddim with eta={eta}: give 0 (deterministic) to 1 (ancestral)")
    alpha, sigma, alpha1, sigma1, rho = _nodes(grid)
    c = eta * sigma1 * np.sqrt(1 - rho**2)
    a = np.sqrt(sigma1**2 - c**2) / sigma
    solver = f"ddim_eta{eta:g}" if eta else "ddim"
    return _one_call_a_step(solver, grid, prediction, a=a, b0=alpha1 - alpha * a, c=c)


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
    alpha, sigma, alpha1, sigma1, _ = _nodes(grid)
    kept = (alpha / alpha1) ** 2
    a = np.sqrt(kept) * (sigma1 / sigma) ** 2
    b0 = alpha1 * (1 - kept) / sigma**2
    c = np.sqrt(1 - kept) * (1 if large else sigma1 / sigma)
    solver = "ddpm" + ("_large" if large else "") + ("_final_noise" if final_noise else "")
    return _one_call_a_step(
        solver, grid, prediction, a=a, b0=b0, c=c, keeps_noise=not large,
        noise_at_end=c[-1] if final_noise and grid.timesteps[-1] > 0 else 0.0,
    )


# diffusers' threshold; the authors' own code has 10.
_FEW_STEPS = 15


def dpm_solver_pp(
    grid: Grid, prediction: str, *, order: int = 2, lower_order_final: bool = True
) -> SamplerTable:
    """DPM-Solver++, first order, or second order multistep ("2M", midpoint).

    The first step is of first order, and so is a last one that ends without noise.

    Args:
        grid: the nodes.
        prediction: what the network outputs.
        order: 1 or 2.
        lower_order_final: whether the last step is of first order too if there are fewer than 15.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2 and eq. 9.

    Raises:
        UserError: for another order.
    """
    if order not in (1, 2):
        raise UserError(f"dpm_solver_pp with order={order}: choose 1 or 2")
    alpha, sigma, alpha1, sigma1, rho = _nodes(grid)
    a = sigma1 / sigma
    # alpha' (1 - rho), and in this form the signal is kept to the last bit.
    b0 = alpha1 - alpha * a
    b1 = np.zeros_like(a)
    if order == 2:
        second = np.arange(grid.steps) > 0
        if lower_order_final and grid.steps < _FEW_STEPS:
            second[-1] = False
        second &= sigma1 > 0
        # From pure noise h_prev is infinite, and the step falls back to first order by itself.
        with np.errstate(divide="ignore", invalid="ignore"):
            h = -np.log(rho)
            inverse_r0 = np.append(0, h[1:] / h[:-1])
            extrapolation = np.where(second, b0 * inverse_r0 / 2, 0)
        b0, b1 = b0 + extrapolation, -extrapolation
    solver = f"dpmpp_{'2m' if order == 2 else '1'}"
    if order == 2 and not lower_order_final:
        solver += "_full_order"
    return _one_call_a_step(solver, grid, prediction, a=a, b0=b0, b1=b1)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver under its registered name.

    Attributes:
        build: `build(grid, prediction, **options) -> SamplerTable`; its keyword-only arguments
            are the options that a user may give.
        convention: where its authors place the nodes, see `grid`.
        final: where its last step ends unless told otherwise, see `grid`.
    """

    build: Callable[..., SamplerTable]
    convention: str
    final: str

    @property
    def options(self) -> dict[str, object]:
        """The options and their defaults; those that the name fixes are not among them."""
        fixed = self.build.keywords if isinstance(self.build, functools.partial) else {}
        parameters = inspect.signature(self.build).parameters.values()
        return {
            parameter.name: parameter.default for parameter in parameters
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in fixed
        }


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "ddim", "abar_0"),
    "ddpm": Solver(
        functools.partial(ddpm, variance="fixed_small", final_noise=False), "ddim", "zero"
    ),
    "ddpm_large": Solver(functools.partial(ddpm, variance="fixed_large"), "ddim", "zero"),
    "dpmpp_1": Solver(functools.partial(dpm_solver_pp, order=1), "dpm", "zero"),
    "dpmpp_2m": Solver(functools.partial(dpm_solver_pp, order=2), "dpm", "zero"),
}


def make(
    name: str, schedule: Schedule, steps: int, prediction: str = "epsilon",
    spacing: str = "leading", *, final: str | None = None, offset: int | None = None,
    **options: object,
) -> SamplerTable:
    """The table of a registered solver.

    Args:
        name: one of `SOLVERS`.
        schedule: the noise schedule that the model was trained with.
        steps: the number of steps.
        prediction: what the network outputs, one of `parameterization.PREDICTIONS`.
        spacing: one of `grid.SPACINGS`.
        final: "abar_0" or "zero", see `grid.from_timesteps`; the solver's own if not given.
        offset: for leading spacing, see `grid.build`.
        **options: the solver's own, such as eta for ddim.

    Raises:
        UserError: for an unknown name, spacing or option (it lists what there is), for more steps
            than the spacing can place, and for a zero-terminal-SNR schedule with epsilon
            prediction or a spacing that does not start at the last timestep.
    """
    if name not in SOLVERS:
        raise UserError(f"unknown sampler {name!r}: choose one of {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    unknown = sorted(set(options) - set(solver.options))
    if unknown:
        known = [f"{option}={value!r}" for option, value in solver.options.items()]
        raise UserError(
            f"sampler {name!r} has no option {', '.join(map(repr, unknown))}: it has "
            f"{', '.join([*known, 'final', 'offset'])}"
        )
    parameterization.check(prediction, schedule)
    grid = grids.build(
        spacing, schedule, steps, solver.convention, final or solver.final, offset
    )
    if schedule.zero_terminal_snr and grid.alpha[0] > 0:
        raise UserError(
            f"schedule {schedule.name!r} ends in pure noise at t={schedule.num_timesteps - 1}, but "
            f"{spacing} spacing with {steps} steps starts at t={grid.timesteps[0]:g}: use spacing "
            "'trailing'"
        )
    return solver.build(grid, prediction, **options)
