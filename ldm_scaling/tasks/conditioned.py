"""Image-conditioned diffusion: a trained text-to-image network that sees an image's latents too,
such as those of a small copy for super-resolution (Rombach et al. 2022, section 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import pictures
from ldm_scaling.config import Diffusion, FineTune
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import backbone, cost
from ldm_scaling.models.autoencoder import Posterior
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.tasks import held_out
from ldm_scaling.tasks.drawing import Drawer, denoiser, pad_context
from ldm_scaling.training.task import Beside, Task

Encode = Callable[[Any, jax.Array], Posterior]
"""`encode(params, x_BHWC) -> posterior` of pictures in [-1, 1]."""

FIELDS = ("condition", "condition_mask")


def enlarged(x_BhwC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Pictures in [-1, 1] at (height, width), by bicubic interpolation (a = -1/2, as Pillow's),
    clipped; those that have it are left as they are."""
    if x_BhwC.shape[1:3] == size:
        return x_BhwC
    shape = (len(x_BhwC), *size, x_BhwC.shape[3])
    return jnp.clip(jax.image.resize(x_BhwC, shape, "cubic", antialias=False), -1.0, 1.0)


def latents_of(
    encode: Encode, params: Any, scale: float, given: Mapping[str, jax.Array],
    size: tuple[int, int],
) -> jax.Array:
    """What the network sees of a condition: [mask, latents] on its channels, (B, h, w, C').

    Args:
      encode, params: the frozen autoencoder.
      scale: what latents are multiplied by.
      given: `condition` uint8 (B, H / k, W / k, 3) and, where there is a mask, `condition_mask`
        uint8 (B, H, W, 1), see `data.conditions`.
      size: (H, W) of the pictures.
    """
    x_BHWC = enlarged(given["condition"].astype(jnp.float32) / 127.5 - 1.0, size)
    z_BHWC = scale * encode(params, x_BHWC).mean
    if "condition_mask" not in given:
        return z_BHWC
    # As Stable Diffusion's inpainting: the nearest pixel's, before the latents.
    step = size[0] // z_BHWC.shape[1]
    mask_BHW1 = given["condition_mask"][:, ::step, ::step].astype(z_BHWC.dtype)
    return jnp.concatenate([mask_BHW1, z_BHWC], axis=-1)


def loss_fn(
    denoise: Denoise, spec: backbone.Spec, finetune: FineTune, diffusion: Diffusion,
    encode: Encode, latent_scale: float, null_ctx_LD: np.ndarray,
) -> Callable[[Any, Any, jax.Array, Beside], tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, batch, key, beside) -> (scalar, metrics)`: the diffusion loss of the pictures'
    latents under the empty caption. `beside.frozen` are the autoencoder's parameters.

    Args:
      denoise: the network, see `drawing.denoiser`.
      spec: of it, grown by the condition.
      finetune, diffusion: the config's.
      encode: the frozen autoencoder.
      latent_scale, null_ctx_LD: see `drawing.Frozen`.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    null_LD = pad_context(null_ctx_LD.astype(np.float32), spec.context_dim)

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        z_key, drop_key, diffusion_key = jax.random.split(key, 3)
        x_BHWC = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        z_BHWC = latent_scale * encode(beside.frozen, x_BHWC).sample(z_key)
        given = {name: batch[name] for name in FIELDS if name in batch}
        seen_BHWC = latents_of(encode, beside.frozen, latent_scale, given, x_BHWC.shape[1:3])
        if finetune.condition_dropout:
            left_out_B = jax.random.uniform(drop_key, (len(x_BHWC),)) < finetune.condition_dropout
            seen_BHWC = jnp.where(left_out_B[:, None, None, None], 0.0, seen_BHWC)
        ctx_BLD = jnp.broadcast_to(null_LD, (len(x_BHWC), *null_LD.shape))
        loss_B = loss_lib.diffusion_loss(
            denoise, params, z_BHWC, {"context": ctx_BLD, "condition": seen_BHWC}, diffusion_key,
            schedule, diffusion.prediction, diffusion.timesteps, diffusion.weighting,
        )
        return jnp.mean(loss_B), {}

    return loss


def make(
    name: str, spec: backbone.Spec, finetune: FineTune, diffusion: Diffusion, encode: Encode,
    encoder_params: Any, drawer: Drawer, start: Callable[[], Any],
    validation: Mapping[str, np.ndarray],
) -> Task:
    """The task of one member.

    Args:
      name: in logs and progress bars.
      spec: its network, grown by the condition.
      finetune, diffusion: the config's parts.
      encode, encoder_params: the frozen autoencoder; parameters on the run's mesh.
      drawer: draws the pictures shown along the way.
      start: gives the pretrained parameters, grown.
      validation: of a fixed set: `mean` (N, h, w, C) latents before scaling, `seen` (N, h, w, C')
        of `latents_of`, `index` (N,); and of its first ones `shown` (n, H, 2 W, 3), uint8: what is
        given, and the picture.
    """
    run, frozen = finetune.train, drawer.frozen
    denoise = denoiser(spec, drawer.mesh, run.compute_dtype, run.remat, run.attention)
    loss = loss_fn(
        denoise, spec, finetune, diffusion, encode, frozen.latent_scale, frozen.null_ctx_LD
    )
    sample = finetune.sample
    table = drawer.table(sample.sampler, sample.steps, sample.spacing)
    validate = held_out.validate_fn(denoise, spec, diffusion, frozen, drawer.mesh, validation)

    def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: np.asarray(batch[n]) for n in ("image", *FIELDS) if n in batch}

    def show(params: Any, step: int) -> dict[str, np.ndarray]:
        n = min(sample.num_images, len(validation["shown"]))
        shown = Configuration(table, sample.guidance, validation["index"][:n], np.arange(n))
        ctx_NLD = np.broadcast_to(frozen.null_ctx_LD, (n, *frozen.null_ctx_LD.shape))
        (drawn,) = drawer.pictures(
            params, [shown], ctx_NLD, jax.random.key(0), condition_PHWC=validation["seen"][:n]
        )
        given, real = np.split(validation["shown"][:n], 2, axis=2)
        return {"samples": pictures.tile(np.concatenate([given, drawn, real], axis=2))}

    def flops_per_example() -> float:
        # Backward takes two products for each one forward; the frozen encoder is left out.
        return 3e9 * cost.gflops(spec, len(frozen.null_ctx_LD))

    return Task(
        name, backbone.initializer(spec), make_batch, loss, validate, show,
        flops_per_example, start, encoder_params, rates=backbone.rates(spec),
        project=backbone.project(spec), ranks=held_out.RANKS,
    )
