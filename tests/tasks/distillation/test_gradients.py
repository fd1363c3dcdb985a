"""Neither the teacher nor the average has a gradient in any loss."""

import jax
import jax.numpy as jnp
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.sampling import grid as grids
from ldm_scaling.tasks.distillation import (
    conditional_consistency,
    guided,
    latent_consistency,
    progressive,
)
from ldm_scaling.training.task import Beside
from tests.tasks.distillation import known

SHORT = schedule.sd(50, 0.017, 0.24)
TEACHER = known.teacher("v", SHORT)
STUDENT, PARAMS = known.linear(SHORT, "v")
GIVEN = (SHORT, "v", known.examples)
LOSSES = {
    "lcm": latent_consistency.loss_fn(STUDENT, TEACHER, *GIVEN, known.UNCOND, skip=10),
    "codi": conditional_consistency.loss_fn(STUDENT, *GIVEN),
    "codi, teacher": conditional_consistency.loss_fn(STUDENT, *GIVEN, teacher=TEACHER),
    "guided": guided.loss_fn(STUDENT, TEACHER, *GIVEN, known.UNCOND),
    "progressive": progressive.loss_fn(
        STUDENT, TEACHER, grids.build("trailing", SHORT, 8), "v", known.examples
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_students_own_parameters_have_a_gradient(name):
    average = jax.tree.map(lambda p: 0.9 * p, PARAMS)

    def value(params, beside):
        return LOSSES[name](params, jnp.zeros(64), jax.random.key(0), beside)

    run = jax.jit(jax.grad(value, (0, 1), has_aux=True))
    (own, beside), first = run(PARAMS, Beside(known.FROZEN, average))
    assert float(sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(own))) > 1e-3
    assert all(not g.any() for g in jax.tree.leaves(beside))
    # What it learns from depends on both all the same.
    others = [
        run(PARAMS, b)[1] for b in (
            Beside(jax.tree.map(lambda p: 1.5 * p, known.FROZEN), average),
            Beside(known.FROZEN, PARAMS),
        )
    ]
    uses = [float(m["target_rms"]) != float(first["target_rms"]) for m in others]
    assert uses == [name != "codi", name in ("lcm", "codi", "codi, teacher")]
    assert abs(float(first["gap"]) - 0.1 / 0.9) < 1e-5
