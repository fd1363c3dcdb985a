"""Guided distillation, stage 1 (Meng et al. 2023): one call imitates the teacher's two.

Without rates it imitates the teacher alone: a student that predicts something else learns that so.
Stage 2 is `progressive`, with the student of this stage as the teacher.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ldm_scaling.diffusion.nodes import Nodes
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks.distillation import common, progressive
from ldm_scaling.training.task import Beside


def loss_fn(
    student: Denoise, teacher: Denoise, schedule: Schedule, prediction: str,
    examples: common.Examples, uncond: Any, *,
    rates: tuple[float, float] | None = (2.0, 14.0),
) -> common.Loss:
    """The loss; both networks predict `prediction`.

    Args:
      student: is told its rate as cond["guidance"] (B,), see `UNetSpec.guidance_dim`; without rates
        it is told none.
      teacher: is guided by the empty condition.
      schedule: the noise schedule.
      prediction: one of `parameterization.PREDICTIONS`.
      examples: see `common.Examples`.
      uncond: the empty condition, leading axis 1.
      rates: lowest and highest guidance rate, 1 for none; None imitates the unguided teacher.
    Raises:
      UserError: for other rates, or as `progressive.check`.
    """
    progressive.check(prediction, schedule)
    if rates is not None:
        common.check_rates(rates)
    nodes = Nodes.of(schedule, prediction)
    weight_T = progressive.weights(schedule.alpha, schedule.sigma)

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        example_key, t_key, eps_key, w_key = jax.random.split(key, 4)
        x0_BHWC, cond = examples(batch, example_key)
        B = x0_BHWC.shape[0]
        t_B = jax.random.randint(t_key, (B,), 0, schedule.num_timesteps)
        eps_BHWC = jax.random.normal(eps_key, x0_BHWC.shape, jnp.float32)
        z_BHWC = nodes.noisy(x0_BHWC, eps_BHWC, t_B)
        if rates is None:
            F_BHWC = teacher(beside.frozen, z_BHWC, nodes.t(t_B), cond)
        else:
            # Meng et al. 2023, section 3: x of the student told w against the guided teacher's x.
            w_B = common.draw_rates(w_key, rates, B)
            F_BHWC = common.guided(
                teacher, beside.frozen, z_BHWC, nodes.t(t_B), cond, uncond, w_B
            )
            cond = common.told(cond, w_B)
        target_BHWC = jax.lax.stop_gradient(nodes.x0(z_BHWC, F_BHWC, t_B))
        F_BHWC = student(params, z_BHWC, nodes.t(t_B), cond)
        got_BHWC = nodes.x0(z_BHWC, F_BHWC, t_B)
        value = progressive.weighted(weight_T, target_BHWC, got_BHWC, t_B)
        return value, common.watched(params, beside, target_BHWC, got_BHWC)

    return loss
