"""The first stage: a KL autoencoder (Rombach et al. 2022, section 3.1, without the adversary)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import pictures
from ldm_scaling.config import Autoencoder
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import autoencoder
from ldm_scaling.parallel import hosts, placing
from ldm_scaling.training.task import Task

RANKS = ("l1",)
"""See `Task`; of `psnr` the higher is the better."""


def spec_of(config: Autoencoder) -> autoencoder.AutoencoderSpec:
    """The network that a config describes."""
    return autoencoder.AutoencoderSpec(
        base_channels=config.base_channels,
        channel_mults=config.channel_mults,
        blocks_per_level=config.blocks_per_level,
        latent_channels=config.latent_channels,
        groups=config.groups,
        mid_attention=config.mid_attention,
    )


def _halve(x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    return x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def laplacian_pyramid_l1(x_BHWC: jax.Array, y_BHWC: jax.Array, levels: int = 3) -> jax.Array:
    """L1 between Laplacian pyramids, scalar: structure at every scale, nothing to download.

    Lap1 of Bojanowski et al. 2018 (arXiv 1707.05776, section 3), with 2x2 means as the low-pass
    and each level's mean absolute difference counted once.

    Args:
      x_BHWC, y_BHWC: pictures; H and W halve `levels` - 1 times.
    """
    d, total = x_BHWC - y_BHWC, 0.0
    for _ in range(levels - 1):
        low = _halve(d)
        up = jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2)
        total = total + jnp.mean(jnp.abs(d - up))
        d = low
    return total + jnp.mean(jnp.abs(d))


def make(config: Autoencoder, validation_images: np.ndarray) -> Task:
    """The task.

    Args:
      config: network and loss.
      validation_images: uint8 (N, H, W, 3), a fixed set.
    """
    spec = spec_of(config)
    dtype = hosts.compute_dtype(config.train.compute_dtype)
    chunked = config.train.attention == "chunked"
    attention = attention_lib.chunked if chunked else attention_lib.plain
    x_val_BHWC = pictures.from_uint8(validation_images)

    def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": np.asarray(batch["image"])}

    def loss(params: Any, batch: Any, key: jax.Array):
        x_BHWC = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        posterior = autoencoder.encode(spec, params, x_BHWC, dtype, attention)
        y_BHWC = autoencoder.decode(spec, params, posterior.sample(key), dtype, attention)
        l1 = jnp.mean(jnp.abs(x_BHWC - y_BHWC))
        structure = laplacian_pyramid_l1(x_BHWC, y_BHWC)
        kl = jnp.mean(posterior.kl())
        total = l1 + config.structure_weight * structure + config.kl_weight * kl
        return total, {"l1": l1, "structure": structure, "kl": kl}

    @jax.jit
    def through(params, x_BHWC):
        mean = autoencoder.encode(spec, params, x_BHWC, dtype, attention).mean
        return autoencoder.decode(spec, params, mean, dtype, attention)

    def reconstruct(params, x_NHWC):
        # In parts of one shape, so that large pictures fit.
        part = min(8, len(x_NHWC))
        fill = -len(x_NHWC) % part
        padded = np.concatenate([x_NHWC, x_NHWC[:1].repeat(fill, axis=0)])
        parts = [through(params, padded[i : i + part]) for i in range(0, len(padded), part)]
        return np.concatenate(placing.fetch(parts))[: len(x_NHWC)]

    def validate(params: Any, step: int) -> dict[str, float]:
        y_BHWC = np.clip(reconstruct(params, x_val_BHWC), -1.0, 1.0)
        mse = float(np.mean((y_BHWC - x_val_BHWC) ** 2))
        return {
            "l1": float(np.mean(np.abs(y_BHWC - x_val_BHWC))),
            "psnr": 10.0 * float(np.log10(4.0 / max(mse, 1e-12))),
        }

    def show(params: Any, step: int) -> dict[str, np.ndarray]:
        n = min(16, len(validation_images))
        out = pictures.to_uint8(reconstruct(params, x_val_BHWC[:n]))
        pairs = np.concatenate([validation_images[:n], out], axis=1)
        return {"reconstruction": pictures.tile(pairs, columns=8)}

    return Task(
        "autoencoder", autoencoder.initializer(spec), make_batch, loss, validate, show, ranks=RANKS
    )
