"""What solvers are written in: the steps of a grid, and the table with a row for each.

Notation of a step from node k to its neighbour: alpha, sigma here and alpha', sigma' there (in the
code alpha1, sigma1); rho = exp(-h) = (sigma'/alpha') / (sigma/alpha), with h the step in half
log-SNR. Written with rho, every row is finite at zero terminal SNR, where h is infinite.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.table import SamplerTable


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The N steps of a grid; every array is (N,) float64.

    Attributes:
        alpha, sigma: where a step begins.
        alpha1, sigma1: where it ends.
        rho: exp(-h), 0 where h is infinite.

    Raises:
        UserError: if a node before the last has no noise.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    alpha1: np.ndarray
    sigma1: np.ndarray
    rho: np.ndarray

    @classmethod
    def of(cls, grid: Grid) -> Steps:
        alpha, sigma, alpha1, sigma1 = (
            grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
        )
        if np.any(sigma == 0):
            raise UserError(
                f"grid {grid.name!r} leaves a node without noise: only its end may be so"
            )
        rho = np.minimum((sigma1 * alpha) / (alpha1 * sigma), 1)
        return cls(alpha, sigma, alpha1, sigma1, rho)

    @property
    def h(self) -> np.ndarray:
        """The steps in half log-SNR; infinite from pure noise and to none."""
        with np.errstate(divide="ignore"):
            return -np.log(self.rho)

    @property
    def clean(self) -> np.ndarray:
        """Whether the step ends without noise."""
        return self.sigma1 == 0


def one_row_a_step(
    solver: str, grid: Grid, prediction: str, *, noise_at_end: float = 0.0, **columns: object
) -> SamplerTable:
    """The table with a row per node of the grid.

    Args:
        solver: for the table's name.
        grid: the nodes.
        prediction: what the network outputs.
        noise_at_end: c of a row that ends without noise. Such a row is x' = m0 + c z whatever the
            columns say.
        **columns: fields of `SamplerTable`.

    Raises:
        UserError: as `SamplerTable`.
    """
    clean = grid.sigma[1:] == 0
    for name, end in {"a": 0.0, "b0": 1.0, "b1": 0.0, "b2": 0.0, "c": noise_at_end}.items():
        columns[name] = np.where(clean, end, columns.get(name, 0.0))
    p, q = parameterization.x0_coefficients(prediction, grid.alpha[:-1], grid.sigma[:-1])
    return SamplerTable(
        name=f"{solver}-{grid.name}-{grid.steps}", t=grid.timesteps, p=p, q=q,
        alpha=grid.alpha, sigma=grid.sigma, **columns,
    )
