"""The validation loss of a network that denoises: of the same pictures, timesteps and noise
whenever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Diffusion
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import backbone
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks.drawing import Frozen, pad_context

FIELDS = ("mean", "context", "seen", "index")
RANKS = ("loss",)
"""Of tasks that validate so, see `Task`."""


def validate_fn(
    denoise: Denoise, spec: backbone.Spec, diffusion: Diffusion, frozen: Frozen,
    mesh: jax.sharding.Mesh, validation: Mapping[str, np.ndarray],
) -> Callable[[Any, int], dict[str, float]]:
    """A task's `validate(params, step)`.

    Args:
      denoise: the network.
      spec: its own.
      diffusion: the config's part.
      frozen: latent scale, empty caption.
      mesh: that the run is on.
      validation: of a fixed set `mean` (N, h, w, C) latents before scaling and `index` (N,), of
        the noise; timesteps go by the order of the set. `context` (N, L, D), without which all have
        the empty caption; `seen` (N, h, w, C') for a network that sees a condition. What else there
        is is left out.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    count = len(validation["index"])
    # Over any number of devices: those that fill up the last row are left out of the mean.
    rows = np.arange(mesh_lib.rounded(count, mesh)) % count
    held_out = placing.put_batch(
        mesh, {name: validation[name][rows] for name in FIELDS if name in validation}
        | {"place": rows.astype(np.int32)}
    )
    null_LD = frozen.null_ctx_LD.astype(np.float32)

    @jax.jit
    def loss(params, found, latent_scale):
        ctx_BLD = found.get("context", jnp.broadcast_to(null_LD, (len(rows), *null_LD.shape)))
        cond = {"context": pad_context(ctx_BLD.astype(jnp.float32), spec.context_dim)}
        if "seen" in found:
            cond["condition"] = found["seen"]
        return jnp.mean(
            loss_lib.validation_loss(
                denoise, params, latent_scale * found["mean"].astype(jnp.float32), cond,
                found["index"], schedule, diffusion.prediction, place_B=found["place"],
            )[:count]
        )

    scale = placing.replicate(mesh, np.float32(frozen.latent_scale))
    return lambda params, step: {"loss": float(loss(params, held_out, scale))}
