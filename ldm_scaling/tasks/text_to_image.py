"""Text-to-image diffusion in the autoencoder's latents, from cached latents and text states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import pictures
from ldm_scaling.config import Diffusion, Sample, Train
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, backbone, cost, width, zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.tasks import held_out
from ldm_scaling.tasks.drawing import Drawer, Frozen, denoiser, pad_context
from ldm_scaling.training.task import Beside, Task


def examples_fn(
    spec: backbone.Spec, train: Train, latent_scale: float | jax.Array, null_ctx_LD: np.ndarray
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """`examples(batch, z_key, drop_key) -> (z_BHWC, cond)`: clean latents, drawn from the
    autoencoder's posterior, and what a network is told of them, some captions dropped.

    Args:
      spec, train: of the network and its run.
      latent_scale, null_ctx_LD: see `Frozen`.
    """
    null_LD = pad_context(null_ctx_LD.astype(np.float32), spec.context_dim)

    def examples(batch: Any, z_key: jax.Array, drop_key: jax.Array):
        mean, logvar = (batch[k].astype(jnp.float32) for k in ("mean", "logvar"))
        z_BHWC = latent_scale * autoencoder.Posterior(mean, logvar).sample(z_key)
        ctx_BLD = pad_context(batch["context"].astype(jnp.float32), spec.context_dim)
        dropped_B = jax.random.uniform(drop_key, z_BHWC.shape[:1]) < train.caption_dropout
        return z_BHWC, {"context": jnp.where(dropped_B[:, None, None], null_LD, ctx_BLD)}

    return examples


def loss_fn(
    denoise: Denoise, spec: backbone.Spec, train: Train, diffusion: Diffusion,
    latent_scale: float | jax.Array, null_ctx_LD: np.ndarray,
) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, batch, key) -> (scalar, metrics)`, see `batch_shapes` for the batch.

    Args:
      denoise: the network, see `drawing.denoiser`.
      spec, train, diffusion: of the network and the config.
      latent_scale, null_ctx_LD: see `Frozen`.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    examples = examples_fn(spec, train, latent_scale, null_ctx_LD)

    def loss(params: Any, batch: Any, key: jax.Array):
        z_key, drop_key, diffusion_key = jax.random.split(key, 3)
        z_BHWC, cond = examples(batch, z_key, drop_key)
        loss_B = loss_lib.diffusion_loss(
            denoise, params, z_BHWC, cond, diffusion_key, schedule, diffusion.prediction,
            diffusion.timesteps, diffusion.weighting,
        )
        return jnp.mean(loss_B), {}

    return loss


def batch_shapes(
    batch_size: int, latent_shape: tuple[int, int, int], context_shape: tuple[int, int],
    latent_dtype: str, mesh: jax.sharding.Mesh, text_dtype: str = "float16",
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step is given: shapes and types as caches keep them, split over the mesh.

    Args:
      batch_size: examples, over all devices.
      latent_shape: (H, W, C).
      context_shape: (L, D) of the text states.
      latent_dtype: that latents are kept in.
      mesh: the devices.
      text_dtype: that text states are kept in.
    """
    def shape(*dims: int, dtype: str) -> jax.ShapeDtypeStruct:
        sharding = mesh_lib.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((batch_size, *dims), jnp.dtype(dtype), sharding=sharding)

    latent = shape(*latent_shape, dtype=latent_dtype)
    context = shape(*context_shape, dtype=text_dtype)
    return {"mean": latent, "logvar": latent, "context": context}


def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a step is given of a loader's batch."""
    return {name: np.asarray(batch[name]) for name in ("mean", "logvar", "context")}


def show_fn(
    drawer: Drawer, sample: Sample, validation: dict[str, np.ndarray]
) -> Callable[[Any, int], dict[str, np.ndarray]]:
    """`show(params, step) -> {"samples": grid}`: what a network draws for the first captions.

    Args:
      drawer: of the network.
      sample: how.
      validation: see `make`.
    """
    table = drawer.table(sample.sampler, sample.steps, sample.spacing)

    def show(params: Any, step: int) -> dict[str, np.ndarray]:
        n = min(sample.num_images, len(validation["index"]))
        shown = Configuration(table, sample.guidance, validation["index"][:n], np.arange(n))
        (images,) = drawer.pictures(params, [shown], validation["context"], jax.random.key(0))
        return {"samples": pictures.tile(images)}

    return show


def transfer(spec: backbone.Spec, train: Train) -> width.Transfer | None:
    """What width transfer changes in a network's run, if it is asked for.

    Raises:
      UserError: where there is none for this network and the run's base.
    """
    if train.width_transfer == "none":
        return None
    return width.mup(spec, zoo.get(train.base_member).spec)


def make(
    name: str, spec: backbone.Spec, train: Train, diffusion: Diffusion, sample: Sample,
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
    denoise = denoiser(
        spec, drawer.mesh, train.compute_dtype, train.remat, train.attention
    )

    def loss(params: Any, batch: Any, key: jax.Array, beside: Beside):
        # An argument of the step: it can be compiled before an autoencoder has been trained.
        scale = beside.frozen["latent_scale"]
        found = loss_fn(denoise, spec, train, diffusion, scale, frozen.null_ctx_LD)
        return found(params, batch, key)

    validate = held_out.validate_fn(denoise, spec, diffusion, frozen, drawer.mesh, validation)
    transferred = transfer(spec, train)

    init = backbone.initializer(spec)

    def drawn(key: jax.Array) -> Any:
        return transferred.drawn(init(key))

    def flops_per_example() -> float:
        # Backward takes two products for each one forward.
        return 3e9 * cost.gflops(spec, len(frozen.null_ctx_LD))

    return Task(
        name, drawn if transferred else init, make_batch, loss, validate,
        show_fn(drawer, sample, validation), flops_per_example,
        rates=transferred.rates if transferred else backbone.rates(spec),
        project=backbone.project(spec), ranks=held_out.RANKS,
        frozen=placing.replicate(
            drawer.mesh, {"latent_scale": np.float32(frozen.latent_scale)}
        ),
    )
