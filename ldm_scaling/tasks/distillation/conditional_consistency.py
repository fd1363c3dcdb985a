"""Conditional consistency distillation (Mei et al. 2024, CoDi), of the whole network.

The paper's method. Public is the form that trains a ControlNet on a frozen network
(codi/training_scripts/train_codi_flax.py); here all of the network is the student, as
text-to-image needs it.
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

MATCHES = ("x0", "epsilon")


def loss_fn(
    student: Denoise, schedule: Schedule, prediction: str, examples: common.Examples, *,
    teacher: Denoise | None = None, skip: int = 20, match: str = "x0", data_weight: float = 1.0,
    one_timestep: bool = False,
) -> common.Loss:
    """The loss. No guidance: it is left to sampling, for which `examples` drops captions.

    With its own step the student's fixed point is not the teacher's consistency function but lies
    between a straight path and the data's conditional mean: few steps, less variance.

    Args:
      student: the network that is adapted.
      schedule: the noise schedule.
      prediction: of the networks, one of `parameterization.PREDICTIONS`.
      examples: see `common.Examples`.
      teacher: whose step leads from z_t to z_s, with the parameters `beside.frozen`; None is the
        student's average, the paper's (its ablation finds a teacher's step worse).
      skip: timesteps from t to s; the public code's is T / 50.
      match: what is to be the same at both ends: "x0" (the public code's default) or "epsilon" (the
        paper's d_eps).
      data_weight: of the squared distance from the data, d_x.
      one_timestep: draws one timestep for all examples, which was reported to be better.
    Raises:
      UserError: for a skip, match or weight that is none.
    """
    T = schedule.num_timesteps
    if match not in MATCHES:
        raise UserError(f"match={match!r}: choose one of {', '.join(MATCHES)}")
    if not 1 <= skip < T:
        raise UserError(f"skip={skip}: give 1 to {T - 1} timesteps, such as {T // 50}")
    if not data_weight >= 0:
        raise UserError(f"data_weight={data_weight}: give 0 or more")
    nodes = Nodes.of(schedule, prediction)

    def said(z_BHWC: jax.Array, F_BHWC: jax.Array, i_B: jax.Array) -> jax.Array:
        # The boundary is x0's: at timestep 0 f is the latent itself, which no noise is.
        if match == "epsilon":
            return nodes.eps(z_BHWC, F_BHWC, i_B)
        return consistency.bounded(nodes, z_BHWC, nodes.x0(z_BHWC, F_BHWC, i_B), i_B)

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        example_key, t_key, eps_key = jax.random.split(key, 3)
        x0_BHWC, cond = examples(batch, example_key)
        B = x0_BHWC.shape[0]
        t_B = jax.random.randint(t_key, (1 if one_timestep else B,), 0, T)
        t_B = jnp.broadcast_to(t_B, (B,))
        s_B = jnp.maximum(t_B - skip, 0)
        eps_BHWC = jax.random.normal(eps_key, x0_BHWC.shape, jnp.float32)
        z_BHWC = nodes.noisy(x0_BHWC, eps_BHWC, t_B)
        # Eq. 7: z_s of the predicted x0, and, as algorithm 1 and the code have it, predicted eps.
        if teacher is None:
            F_BHWC = student(beside.average, z_BHWC, nodes.t(t_B), cond)
        else:
            F_BHWC = teacher(beside.frozen, z_BHWC, nodes.t(t_B), cond)
        s_BHWC = nodes.noisy(
            nodes.x0(z_BHWC, F_BHWC, t_B), nodes.eps(z_BHWC, F_BHWC, t_B), s_B
        )
        F_BHWC = student(beside.average, s_BHWC, nodes.t(s_B), cond)
        target_BHWC = jax.lax.stop_gradient(
            said(s_BHWC, F_BHWC, s_B)
        )
        F_BHWC = student(params, z_BHWC, nodes.t(t_B), cond)
        got_BHWC = said(z_BHWC, F_BHWC, t_B)
        x_BHWC = consistency.bounded(nodes, z_BHWC, nodes.x0(z_BHWC, F_BHWC, t_B), t_B)
        # Eq. 8: d_eps (or its like in x0) and d_x, both squared distances in latents.
        same, near = (
            jnp.mean((a - b) ** 2) for a, b in ((got_BHWC, target_BHWC), (x_BHWC, x0_BHWC))
        )
        logged = {"consistency": same, "data": near}
        return same + data_weight * near, {
            **logged, **common.watched(params, beside, target_BHWC, got_BHWC)
        }

    return loss
