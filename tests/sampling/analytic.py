"""Data whose exact denoiser and exact samples are known, and tables run in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import ndtr

from ldm_scaling.diffusion import parameterization
from ldm_scaling.sampling import grid, sampler
from ldm_scaling.sampling.sampler import State
from ldm_scaling.sampling.table import COLUMNS, SamplerTable


def row_of(table: SamplerTable, r: int) -> dict[str, float]:
    return {column: getattr(table, column)[r] for column in COLUMNS}


def start(x: np.ndarray) -> State:
    return State(x, *(np.zeros_like(x) for _ in range(4)))


def run(
    table: SamplerTable, x0_of: Callable, state: State | np.ndarray, noise: Callable | None = None,
    first: int = 0,
) -> State:
    """The table through the same row update that the jitted loop runs.

    Args:
        table: made for x0 prediction.
        x0_of: `x0_of(x, alpha, sigma)`, the denoiser.
        state: the x to start from, or a state in the middle.
        noise: `noise(r)`, row r's.
        first: the row to begin with.
    """
    state = state if isinstance(state, State) else start(state)
    for r in range(first, table.calls):
        F = x0_of(state.x, table.alpha[r], table.sigma[r])
        state = sampler.update(row_of(table, r), state, F, 0.0 if noise is None else noise(r))
    return state


def line(nodes: np.ndarray) -> grid.Grid:
    """The grid of nodes in half log-SNR."""
    sigma = 1 / np.sqrt(1 + np.exp(2 * nodes))
    t = np.arange(len(nodes) - 1, 0, -1)
    return grid.Grid(t, np.exp(nodes) * sigma, sigma, "lambda")


def uneven(steps: int, low: float = -2.5, high: float = 2.5) -> grid.Grid:
    """Steps that are in turn long and half as long, in half log-SNR."""
    lengths = 1 + np.arange(steps) % 2
    share = np.append(0, np.cumsum(lengths)) / lengths.sum()
    return line(low + (high - low) * share)


class Mixture:
    """A mixture of Gaussians on the line: w_i N(mu_i, tau_i^2)."""

    def __init__(self, w, mu, tau):
        self.w, self.mu, self.tau = (np.array(a, np.float64)[:, None] for a in (w, mu, tau))

    def _parts(self, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        return alpha * self.mu, np.sqrt((alpha * self.tau) ** 2 + sigma**2)

    def x0(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """E[x0 | x]: what a perfect network predicts."""
        mean, std = self._parts(alpha, sigma)
        z = (x - mean) / std
        log_p = np.log(self.w / std) - z**2 / 2
        p = np.exp(log_p - log_p.max(0))
        each = self.mu + alpha * self.tau**2 / std * z
        return (p * each).sum(0) / p.sum(0)

    def cdf(self, x: np.ndarray, alpha: float = 1.0, sigma: float = 0.0) -> np.ndarray:
        mean, std = self._parts(alpha, sigma)
        return (self.w * ndtr((x - mean) / std)).sum(0)

    def quantile(self, u: np.ndarray, alpha: float = 1.0, sigma: float = 0.0) -> np.ndarray:
        """Where the probability flow leads the u-quantile: on the line it keeps them. Bisection."""
        low, high = np.full_like(u, -50.0), np.full_like(u, 50.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha, sigma) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def moments(self, alpha: float, sigma: float) -> tuple[float, float]:
        """Mean and variance at a node."""
        mean, std = self._parts(alpha, sigma)
        first = (self.w * mean).sum()
        return first, (self.w * (std**2 + mean**2)).sum() - first**2


MIXTURE = Mixture((0.5, 0.3, 0.2), (-1.2, 0.4, 1.5), (0.35, 0.2, 0.5))
QUANTILES = np.linspace(0.03, 0.97, 12)
# Gaussians, coordinate by coordinate.
MU, TAU = np.array([1.5, -0.7, 0.2]), np.array([0.3, 0.8, 1.3])


def exact_moments(
    table: SamplerTable, mu: np.ndarray = MU, tau: np.ndarray = TAU
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the table's samples of N(mu, tau^2), without sampling.

    The denoiser of a Gaussian is linear and so are the rows: every x is a sum of a constant, the
    first x's deviation and each row's noise, whose coefficients are carried here as a first axis.
    """
    count = table.calls + 2
    constant, *others = np.eye(count)[:, :, None] * np.ones(len(mu))

    def x0_of(x, alpha, sigma):
        gain = alpha * tau**2 / ((alpha * tau) ** 2 + sigma**2)
        return gain * x + constant * (mu - gain * alpha * mu)

    alpha, sigma = table.alpha[0], table.sigma[0]
    x = constant * alpha * mu + others[0] * np.sqrt((alpha * tau) ** 2 + sigma**2)
    x = run(table, x0_of, x, lambda r: others[1 + r]).x
    return x[0], (x[1:] ** 2).sum(0)


def prediction_of(prediction: str, x0_of: Callable) -> Callable:
    """The network that predicts this instead of x0: `(x, alpha, sigma) -> F`."""
    def network(x, alpha, sigma):
        x0 = x0_of(x, alpha, sigma)
        return parameterization.target(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return network
