"""The validation loss: of all timesteps alike, whichever pictures it is of."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Diffusion
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.tasks import held_out


@pytest.mark.parametrize("pictures", [512, 6703, 40_504, 505_344])
def test_every_part_of_a_data_set_is_validated_at_all_timesteps(pictures):
    """Of unit normal latents the ideal noise is sigma x, and its loss alpha^2 at each timestep."""
    schedule = schedule_lib.get("sd")
    sigma_T = jnp.asarray(schedule.sigma, jnp.float32)
    rng = np.random.default_rng(0)
    validate = held_out.validate_fn(
        lambda params, x, t_B, cond: sigma_T[t_B.astype(int)][:, None, None, None] * x,
        types.SimpleNamespace(context_dim=2), Diffusion(schedule="sd", prediction="epsilon"),
        types.SimpleNamespace(latent_scale=1.0, null_ctx_LD=np.zeros((1, 2), np.float32)),
        mesh_lib.make(),
        {"mean": rng.normal(size=(512, 8, 8, 4)).astype(np.float32),
         "index": (np.arange(512) * pictures // 512).astype(np.int32)},
    )
    want = np.mean(np.asarray(schedule.alpha) ** 2)
    assert validate((), 0)["loss"] == pytest.approx(want, abs=0.01)
