"""The second stage of a cascade: a text-to-image network that sees the latents of a small picture
too, as super-resolution's sees those of an enlarged one (Ho et al. 2021, arXiv 2106.15282; between
latents, as Stable Cascade, arXiv 2306.00637)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Cascade, Diffusion
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, backbone, cost
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks import held_out, text_to_image
from ldm_scaling.tasks.drawing import Frozen, denoiser
from ldm_scaling.training.task import Task

LOW = ("low_mean", "low_logvar")
"""The small picture's posterior, in a batch."""


def channels(cascade: Cascade, latent_channels: int) -> int:
    """How many the second stage's first layer takes beside its own: the small latents', and the
    level of their noise where it is told."""
    return latent_channels + (cascade.augment > 0)


def noised(low_BhwC: Any, noise_BhwC: Any, level: Any) -> Any:
    """Latents of unit variance with so much noise, of the same variance: sqrt(1 - l^2) z + l eps.

    Args:
      low_BhwC, noise_BhwC: latents, and standard normal noise.
      level: l, a number or one for each of the batch, (B,).
    """
    level = jnp.reshape(jnp.asarray(level, jnp.float32), (-1, 1, 1, 1))
    return jnp.sqrt(1 - level**2) * low_BhwC + level * noise_BhwC


def seen(low_BhwC: Any, level_B: Any, cascade: Cascade, xp: Any = np) -> Any:
    """What the second stage sees, (B, h f, w f, C'): each small latent f times either way, since
    neighbouring latents are no picture to interpolate; with it the level, where it is told.

    Args:
      low_BhwC: the small pictures' latents, with their noise.
      level_B: its level.
      cascade: the config's.
      xp: numpy or jax.numpy.
    """
    f = cascade.factor
    out_BHWC = xp.repeat(xp.repeat(low_BhwC, f, axis=1), f, axis=2)
    if not cascade.augment:
        return out_BHWC
    level_BHW1 = xp.broadcast_to(level_B[:, None, None, None], (*out_BHWC.shape[:3], 1))
    return xp.concatenate([out_BHWC, level_BHW1.astype(out_BHWC.dtype)], axis=-1)


def loss_fn(
    denoise: Denoise, spec: backbone.Spec, cascade: Cascade, diffusion: Diffusion,
    latent_scale: float, null_ctx_LD: np.ndarray,
) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, batch, key) -> (scalar, metrics)`: the diffusion loss of the large latents,
    given the caption and the small ones.

    Args:
      denoise: the network, see `drawing.denoiser`.
      spec: of it, grown.
      cascade, diffusion: the config's.
      latent_scale, null_ctx_LD: see `drawing.Frozen`.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    examples = text_to_image.examples_fn(spec, cascade.train, latent_scale, null_ctx_LD)

    def loss(params: Any, batch: Any, key: jax.Array):
        z_key, drop_key, diffusion_key, low_key, level_key, noise_key = jax.random.split(key, 6)
        z_BHWC, cond = examples(batch, z_key, drop_key)
        mean, logvar = (batch[name].astype(jnp.float32) for name in LOW)
        low_BhwC = latent_scale * autoencoder.Posterior(mean, logvar).sample(low_key)
        level_B = cascade.augment * jax.random.uniform(level_key, (len(low_BhwC),))
        if cascade.augment:
            low_BhwC = noised(low_BhwC, jax.random.normal(noise_key, low_BhwC.shape), level_B)
        cond |= {"condition": seen(low_BhwC, level_B, cascade, jnp)}
        loss_B = loss_lib.diffusion_loss(
            denoise, params, z_BHWC, cond, diffusion_key, schedule, diffusion.prediction,
            diffusion.timesteps, diffusion.weighting,
        )
        return jnp.mean(loss_B), {}

    return loss


def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a step is given of a loader's batch."""
    return text_to_image.make_batch(batch) | {name: np.asarray(batch[name]) for name in LOW}


def make(
    name: str, spec: backbone.Spec, cascade: Cascade, diffusion: Diffusion, frozen: Frozen,
    mesh: jax.sharding.Mesh, start: Callable[[], Any] | None, validation: Mapping[str, np.ndarray],
    show: Callable[[Any, int], dict[str, np.ndarray]],
) -> Task:
    """The task of one second stage.

    Args:
      name: in logs and progress bars.
      spec: its network, grown.
      cascade, diffusion: the config's parts.
      frozen: autoencoder, latent scale, empty caption.
      mesh: that it is trained on.
      start: gives the member's parameters, grown; None where it starts from nothing.
      validation: of a fixed set: `mean` (N, h, w, C) latents before scaling, `seen` (N, h, w, C'),
        `context` (N, L, D), `index` (N,).
      show: see `Task`.
    """
    run = cascade.train
    denoise = denoiser(spec, mesh, run.compute_dtype, run.remat, run.attention)
    loss = loss_fn(denoise, spec, cascade, diffusion, frozen.latent_scale, frozen.null_ctx_LD)
    validate = held_out.validate_fn(denoise, spec, diffusion, frozen, mesh, validation)

    def flops_per_example() -> float:
        # Backward takes two products for each one forward.
        return 3e9 * cost.gflops(spec, len(frozen.null_ctx_LD))

    return Task(
        name, backbone.initializer(spec), make_batch, loss, validate, show,
        flops_per_example, start, rates=backbone.rates(spec), project=backbone.project(spec),
        ranks=held_out.RANKS,
    )
