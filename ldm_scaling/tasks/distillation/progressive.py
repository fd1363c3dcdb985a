"""Progressive distillation (Salimans & Ho 2022): one step of the student does two of the teacher.

Stage 2 of guided distillation too (Meng et al. 2023, section 3), where both are told their rate.
As in the authors' diffusion_distillation/dpm.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.nodes import Nodes, at
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks.distillation import common
from ldm_scaling.training.task import Beside

# Of the error of what a network says, at any timestep: of x0 on Stable Diffusion's schedule 1174.
_MOST_WEIGHT = 1e4


def weights(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """max(SNR, 1), of the squared error in x0: as much as the larger of those in x0 and in eps.

    Source: Salimans & Ho 2022, section 4 (truncated SNR).
    """
    return np.maximum((alpha / sigma) ** 2, 1.0)


def check(prediction: str, schedule: Schedule) -> None:
    """Raises `UserError` where the weight makes one timestep the whole loss, as of x0 where a
    schedule begins with next to no noise: errors of v and flow weigh below 2 on any schedule."""
    parameterization.check(prediction, schedule)
    weight_T = weights(schedule.alpha, schedule.sigma)
    _, q_T = parameterization.x0_coefficients(prediction, schedule.alpha, schedule.sigma)
    most = float(np.max(weight_T * q_T**2))
    if most > _MOST_WEIGHT:
        raise UserError(
            f"halving in {prediction!r} on schedule {schedule.name!r} would weigh an error of its "
            f"output up to {most:.0f} times: give v or flow for the students' prediction"
        )


def weighted(
    weight_N: np.ndarray, target_BHWC: jax.Array, got_BHWC: jax.Array, i_B: jax.Array
) -> jax.Array:
    """The mean squared error, each example's by its node's weight."""
    return jnp.mean(at(weight_N, i_B, got_BHWC.ndim) * (got_BHWC - target_BHWC) ** 2)


def target(
    teacher: Denoise, params: Any, z_BHWC: jax.Array, j_B: jax.Array, cond: Any, grid: Grid,
    nodes: Nodes,
) -> jax.Array:
    """The x0 with which one DDIM step of double length ends where two of the teacher's end.

    Args:
      teacher, params, cond: the teacher and what it is told.
      z_BHWC: noisy latents at nodes 2 j.
      j_B: steps of the student.
      grid: the teacher's 2 N steps.
      nodes: `nodes_of(grid, prediction)`.
    """
    z_end_BHWC = z_BHWC
    for i_B in (2 * j_B, 2 * j_B + 1):
        # Salimans & Ho 2022, algorithm 2: alpha' x + sigma'/sigma (z - alpha x), twice.
        F_BHWC = teacher(params, z_end_BHWC, nodes.t(i_B), cond)
        z_end_BHWC = nodes.noisy(
            nodes.x0(z_end_BHWC, F_BHWC, i_B), nodes.eps(z_end_BHWC, F_BHWC, i_B), i_B + 1
        )
    # Algorithm 2: x = (z'' - sigma''/sigma z) / (alpha'' - sigma''/sigma alpha). At an end without
    # noise that is z'' itself, the teacher's second x.
    here, there = slice(0, grid.steps, 2), slice(2, None, 2)
    ratio_N = grid.sigma[there] / grid.sigma[here]
    scale_N = 1 / (grid.alpha[there] - ratio_N * grid.alpha[here])
    ndim = z_BHWC.ndim
    return at(scale_N, j_B, ndim) * z_end_BHWC - at(scale_N * ratio_N, j_B, ndim) * z_BHWC


def nodes_of(grid: Grid, prediction: str) -> Nodes:
    """A grid's nodes, the last without a network."""
    return Nodes(grid.timesteps, grid.alpha, grid.sigma, prediction)


def loss_fn(
    student: Denoise, teacher: Denoise, grid: Grid, prediction: str, examples: common.Examples, *,
    rates: tuple[float, float] | None = None,
) -> common.Loss:
    """The loss; both networks predict `prediction`.

    Args:
      student: takes N steps, at every second node of the grid.
      teacher: takes the grid's 2 N.
      grid: of a spacing whose every second node is its own of N steps, such as `trailing`, which
        starts at the noise that samples start from.
      prediction: one of `parameterization.PREDICTIONS`; v or x0 for few steps.
      examples: see `common.Examples`.
      rates: lowest and highest guidance rate that both are told, as cond["guidance"] (B,); None for
        networks that are told none.
    Raises:
      UserError: for other rates or an odd number of steps.
    """
    if rates is not None:
        common.check_rates(rates)
    if grid.steps % 2:
        raise UserError(f"grid {grid.name!r} has {grid.steps} steps: halving needs an even number")
    nodes = nodes_of(grid, prediction)
    weight_N = weights(grid.alpha[:-1], grid.sigma[:-1])

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        example_key, j_key, eps_key, w_key = jax.random.split(key, 4)
        x0_BHWC, cond = examples(batch, example_key)
        B = x0_BHWC.shape[0]
        j_B = jax.random.randint(j_key, (B,), 0, grid.steps // 2)
        eps_BHWC = jax.random.normal(eps_key, x0_BHWC.shape, jnp.float32)
        z_BHWC = nodes.noisy(x0_BHWC, eps_BHWC, 2 * j_B)
        if rates is not None:
            cond = common.told(cond, common.draw_rates(w_key, rates, B))
        target_BHWC = jax.lax.stop_gradient(
            target(teacher, beside.frozen, z_BHWC, j_B, cond, grid, nodes)
        )
        F_BHWC = student(params, z_BHWC, nodes.t(2 * j_B), cond)
        got_BHWC = nodes.x0(z_BHWC, F_BHWC, 2 * j_B)
        value = weighted(weight_N, target_BHWC, got_BHWC, 2 * j_B)
        return value, common.watched(params, beside, target_BHWC, got_BHWC)

    return loss
