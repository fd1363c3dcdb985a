"""Text-to-image diffusion in the autoencoder's latents, from cached latents and text states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import pictures
from ldm_scaling.config import Diffusion, Sample, Train
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, unet
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.training.task import Task


def pad_context(ctx: Any, width: int) -> Any:
    """Token states (..., L, D) with zeros appended up to `width`, so that any frozen text encoder
    no wider than the network's cross-attention feeds it.

    Raises:
      UserError: when the states are wider than the network takes.
    """
    have = ctx.shape[-1]
    if have > width:
        raise UserError(
            f"text states of width {have} do not fit a network with context_dim={width}: choose "
            "a member with a wider context"
        )
    xp = jnp if isinstance(ctx, jax.Array) else np
    return xp.pad(ctx, [(0, 0)] * (ctx.ndim - 1) + [(0, width - have)])


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What stays fixed under every member of the family.

    Attributes:
      autoencoder_spec, autoencoder_params: the first stage.
      latent_scale: latents are multiplied by it (1 / their standard deviation).
      latent_shape: (H, W, C) of the latents.
      null_ctx_LD: text states of the empty caption.
    """

    autoencoder_spec: autoencoder.AutoencoderSpec
    autoencoder_params: Any
    latent_scale: float
    latent_shape: tuple[int, int, int]
    null_ctx_LD: np.ndarray

    def decoder(self) -> Callable[[Any, Any], jax.Array]:
        """Jitted `decode(params, latents_BHWC) -> pictures`, about [-1, 1]."""
        spec, scale = self.autoencoder_spec, self.latent_scale

        @jax.jit
        def decode(params, z_BHWC):
            return autoencoder.decode(spec, params, z_BHWC / scale)

        return decode


class Drawer:
    """Draws pictures with one network: every table and guidance rate through one compilation.

    Args:
      spec: the network.
      frozen: autoencoder and empty caption.
      diffusion: schedule and prediction.
      batch_size: pictures at a time.
      decode: `frozen.decoder()`, shared between members.
      mesh: a batch is split over its devices.
      compute_dtype: see `config.Train`.
    """

    def __init__(
        self, spec: unet.UNetSpec, frozen: Frozen, diffusion: Diffusion, batch_size: int,
        decode: Callable, mesh: jax.sharding.Mesh, compute_dtype: str = "auto",
    ):
        self.frozen, self.diffusion, self.batch_size = frozen, diffusion, batch_size
        self.width, self._decode, self.mesh = spec.context_dim, decode, mesh
        self.schedule = schedule_lib.get(diffusion.schedule)
        denoise = unet.denoise_fn(spec, hosts.compute_dtype(compute_dtype))
        self._sample = sampler.make_sampler(denoise, frozen.latent_shape)
        null_1LD = frozen.null_ctx_LD[None].astype(np.float32)
        self.uncond = {"context": pad_context(null_1LD, self.width)}

    def table(self, name: str, steps: int, spacing: str) -> Any:
        """The sampler's table on this schedule."""
        return solvers.make(name, self.schedule, steps, self.diffusion.prediction, spacing)

    def latents(self, params, table, ctx_BLD, guidance, key, index_B) -> jax.Array:
        """Sampled latents of `batch_size` captions; noise depends on (key, index) alone."""
        cond, guidance_B, index_B = mesh_lib.put_batch(
            self.mesh,
            (
                {"context": pad_context(np.asarray(ctx_BLD, np.float32), self.width)},
                np.full(len(index_B), guidance, np.float32),
                index_B,
            ),
        )
        return self._sample(params, table.padded(), guidance_B, cond, self.uncond, key, index_B)

    def pictures(self, params, table, ctx_NLD, guidance, key, index_N) -> np.ndarray:
        """uint8 pictures of N captions, in batches, the last one filled up and cut.

        Raises:
          UserError: when a pixel is not finite; nothing is made of such pictures.
        """
        out = []
        for start in range(0, len(index_N), self.batch_size):
            ctx = ctx_NLD[start : start + self.batch_size]
            index = np.asarray(index_N[start : start + self.batch_size], np.int32)
            fill = self.batch_size - len(index)
            z = self.latents(
                params, table, np.concatenate([ctx, ctx[:1].repeat(fill, 0)]), guidance, key,
                np.concatenate([index, index[:1].repeat(fill)]),
            )
            x = np.asarray(self._decode(self.frozen.autoencoder_params, z))
            if not np.isfinite(x).all():
                raise UserError(
                    f"{table.name} at guidance {guidance:g} draws pictures that are not finite: "
                    "lower the guidance, use train.compute_dtype=float32, or train anew"
                )
            out.append(pictures.to_uint8(x)[: len(index)])
        return np.concatenate(out)


def make(
    name: str, spec: unet.UNetSpec, train: Train, diffusion: Diffusion, sample: Sample,
    frozen: Frozen, drawer: Drawer, validation: dict[str, np.ndarray],
) -> Task:
    """The task of one member.

    Args:
      name: the member's.
      spec: its network.
      train, diffusion, sample: the config's parts.
      frozen: autoencoder, latent scale, empty caption.
      drawer: draws the pictures shown along the way.
      validation: `mean` (N, H, W, C), `context` (N, L, D), `index` (N,) of a fixed set.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    denoise = unet.denoise_fn(spec, hosts.compute_dtype(train.compute_dtype), train.remat)
    null_LD = pad_context(frozen.null_ctx_LD.astype(np.float32), spec.context_dim)
    table = drawer.table(sample.sampler, sample.steps, sample.spacing)
    sample_key = jax.random.key(0)
    held_out = mesh_lib.put_batch(drawer.mesh, validation)

    def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(batch[name]) for name in ("mean", "logvar", "context")}

    def loss(params: Any, batch: Any, key: jax.Array):
        z_key, drop_key, diffusion_key = jax.random.split(key, 3)
        mean, logvar = (batch[k].astype(jnp.float32) for k in ("mean", "logvar"))
        z_BHWC = frozen.latent_scale * autoencoder.Posterior(mean, logvar).sample(z_key)
        ctx_BLD = pad_context(batch["context"].astype(jnp.float32), spec.context_dim)
        dropped_B = jax.random.uniform(drop_key, z_BHWC.shape[:1]) < train.caption_dropout
        ctx_BLD = jnp.where(dropped_B[:, None, None], null_LD, ctx_BLD)
        loss_B = loss_lib.diffusion_loss(
            denoise, params, z_BHWC, {"context": ctx_BLD}, diffusion_key, schedule,
            diffusion.prediction,
        )
        return jnp.mean(loss_B), {}

    @jax.jit
    def validation_loss(params, mean, ctx_BLD, index_B):
        ctx_BLD = pad_context(ctx_BLD.astype(jnp.float32), spec.context_dim)
        return jnp.mean(
            loss_lib.validation_loss(
                denoise, params, frozen.latent_scale * mean.astype(jnp.float32),
                {"context": ctx_BLD}, index_B, schedule, diffusion.prediction,
            )
        )

    def validate(params: Any, step: int) -> dict[str, float]:
        value = validation_loss(params, held_out["mean"], held_out["context"], held_out["index"])
        return {"loss": float(value)}

    def show(params: Any, step: int) -> dict[str, np.ndarray]:
        n = min(sample.num_images, len(validation["index"]))
        images = drawer.pictures(
            params, table, validation["context"][:n], sample.guidance, sample_key,
            validation["index"][:n],
        )
        return {"samples": pictures.tile(images)}

    def init(key: jax.Array) -> Any:
        return unet.init(spec, key)

    return Task(name, init, make_batch, loss, validate, show)
