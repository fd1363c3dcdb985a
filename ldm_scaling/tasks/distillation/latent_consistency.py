"""Latent consistency distillation (Luo et al. 2023, LCM): one call goes to the end of the guided
teacher's trajectory, for any guidance rate that the student is told.

As in diffusers' train_lcm_distill_sd_wds.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ldm_scaling.diffusion import consistency
from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks.distillation import common
from ldm_scaling.training.task import Beside


def loss_fn(
    student: Denoise, teacher: Denoise, schedule: Schedule, prediction: str,
    examples: common.Examples, uncond: Any, *, rates: tuple[float, float] = (6.0, 16.0),
    skip: int = 20, huber: float = 0.001,
) -> common.Loss:
    """The loss; both networks predict `prediction`.

    Args:
      student: is told its rate as cond["guidance"] (B,), see `UNetSpec.guidance_dim`.
      teacher: is guided by the empty condition.
      schedule: the noise schedule.
      prediction: one of `parameterization.PREDICTIONS`.
      examples: see `common.Examples`.
      uncond: the empty condition, leading axis 1.
      rates: lowest and highest guidance rate, 1 for none. The script's w, which starts at 0, is
        5 to 15; the paper's 2 to 14.
      skip: k, timesteps that the teacher's DDIM step goes over, and that the student's start at.
      huber: c; errors far below it count squared, those far above by their size.
    Raises:
      UserError: for other rates, a skip that does not divide the timesteps, or huber not above 0.
    """
    common.check_rates(rates)
    T = schedule.num_timesteps
    if not 1 <= skip <= T or T % skip:
        raise UserError(f"skip={skip}: give a divisor of the {T} timesteps, such as 20")
    if not huber > 0:
        raise UserError(f"huber={huber}: give a number above 0, such as 0.001")
    nodes = Nodes.of(schedule, prediction)

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        example_key, t_key, eps_key, w_key = jax.random.split(key, 4)
        x0_BHWC, cond = examples(batch, example_key)
        B = x0_BHWC.shape[0]
        # Luo et al. 2023, section 4.3 (skipping step): t_{n+k} and t_n, the last at 0.
        t_B = skip * jax.random.randint(t_key, (B,), 1, T // skip + 1) - 1
        s_B = jnp.maximum(t_B - skip, 0)
        eps_BHWC = jax.random.normal(eps_key, x0_BHWC.shape, jnp.float32)
        z_BHWC = nodes.noisy(x0_BHWC, eps_BHWC, t_B)
        w_B = common.draw_rates(w_key, rates, B)
        # Section 4.2 (one-stage guided distillation): a DDIM step of the guided teacher.
        F_BHWC = common.guided(
            teacher, beside.frozen, z_BHWC, nodes.t(t_B), cond, uncond, w_B
        )
        s_BHWC = nodes.noisy(
            nodes.x0(z_BHWC, F_BHWC, t_B), nodes.eps(z_BHWC, F_BHWC, t_B), s_B
        )
        cond = common.told(cond, w_B)
        # Section 4.1: f of the average there is what f of the student shall be here.
        target_BHWC = jax.lax.stop_gradient(
            consistency.function(student, beside.average, s_BHWC, s_B, cond, nodes)
        )
        got_BHWC = consistency.function(student, params, z_BHWC, t_B, cond, nodes)
        # Pseudo-Huber, of every number (of the whole difference in Song & Dhariwal 2023, 3.3).
        value = jnp.mean(jnp.sqrt((got_BHWC - target_BHWC) ** 2 + huber**2) - huber)
        return value, common.watched(params, beside, target_BHWC, got_BHWC)

    return loss
