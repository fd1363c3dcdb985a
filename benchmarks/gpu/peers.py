"""The PyTorch peers: diffusers' U-Net, autoencoder and DDIM as one would run them on one GPU.

`torch.compile`, channels last, scaled dot product attention (diffusers' default), and in training
bfloat16 autocast, fused AdamW, gradients clipped and an average kept, as ours do. On a CPU, for the
toys, the same in float32 without the compiler. torch and diffusers are imported when first used.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from typing import Any

import numpy as np

from ldm_scaling.config import Train
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, convert, unet


@functools.cache
def torch() -> Any:
    """The module, its products in TF32 where they are float32, as JAX's are, unless who asks first
    changes that."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return torch


def where() -> str:
    """cuda, or cpu for a toy."""
    return "cuda" if torch().cuda.is_available() else "cpu"


def network(spec: unet.UNetSpec) -> Any:
    """diffusers' U-Net of the same sizes, its weights random."""
    from diffusers import UNet2DConditionModel

    torch().manual_seed(0)
    # diffusers names the heads so.
    return UNet2DConditionModel(
        sample_size=spec.sample_size, attention_head_dim=spec.heads,
        block_out_channels=tuple(spec.base_channels * m for m in spec.channel_mults),
        layers_per_block=spec.blocks_per_level, cross_attention_dim=spec.context_dim,
        norm_num_groups=spec.groups,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in spec.attention_levels
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(spec.attention_levels)
        ),
    )


def picture_maker(spec: autoencoder.AutoencoderSpec) -> Any:
    """diffusers' autoencoder of the same sizes, its weights random."""
    from diffusers import AutoencoderKL

    torch().manual_seed(0)
    levels = len(spec.channel_mults)
    return AutoencoderKL(
        block_out_channels=tuple(spec.base_channels * m for m in spec.channel_mults),
        layers_per_block=spec.blocks_per_level, latent_channels=spec.latent_channels,
        norm_num_groups=spec.groups, mid_block_add_attention=spec.mid_attention,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def weights(model: Any) -> Any:
    """Our parameters of a peer's network."""
    load = convert.load_autoencoder if hasattr(model, "decoder") else convert.load_unet
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder)[1]


def ready(model: Any, half: bool, compiled: str | None = "") -> Any:
    """A network where it runs: channels last, compiled; with `half` its weights in bfloat16.

    Args:
      model: diffusers'.
      half: whether on a GPU.
      compiled: the part of it that is called, if it is not the whole; None compiles nothing.
    """
    t = torch()
    model = model.to(where(), memory_format=t.channels_last)
    if where() == "cuda":
        model = model.to(t.bfloat16) if half else model
        if compiled is not None:
            model.get_submodule(compiled).compile()
    return model


def tensor(x_BHWC: np.ndarray) -> Any:
    """Pictures or latents where they are computed with, channels last."""
    t = torch()
    x = t.from_numpy(np.array(x_BHWC)).permute(0, 3, 1, 2).to(where())
    return x.contiguous(memory_format=t.channels_last)


class TrainStep:
    """The peer's train step, on batches as ours.

    Args:
      spec: the network.
      train: the run.
      scale: of latents.
      batches: as `text_to_image.batch_shapes` has them, numpy.
      eager: without torch.compile.
    """

    def __init__(
        self, spec: unet.UNetSpec, train: Train, scale: float, batches: list[dict],
        eager: bool = False,
    ):
        t = self.t = torch()
        self.model = ready(network(spec), half=False, compiled=None if eager else "")
        self.train, self.scale = train, scale
        self.parameters = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = t.optim.AdamW(
            self.parameters, lr=train.learning_rate, betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay, fused=where() == "cuda",
        )
        schedule = schedule_lib.get("sd")
        self.alpha, self.sigma = (
            t.tensor(a, dtype=t.float32, device=where()) for a in (schedule.alpha, schedule.sigma)
        )
        self.batches = [
            {"mean": tensor(b["mean"]), "logvar": tensor(b["logvar"]),
             "context": t.from_numpy(np.array(b["context"])).to(where())}
            for b in batches
        ]
        self.step = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 on a GPU."""
        if where() == "cpu":
            return contextlib.nullcontext()
        return self.t.autocast("cuda", dtype=self.t.bfloat16)

    def loss(self, z: Any, ctx: Any, steps: Any, noise: Any) -> Any:
        """Of given timesteps and noise."""
        alpha, sigma = (a[steps][:, None, None, None] for a in (self.alpha, self.sigma))
        with self.autocast():
            out = self.model(alpha * z + sigma * noise, steps, ctx).sample
        return self.t.nn.functional.mse_loss(out.float(), noise)

    def __call__(self, calls: int) -> float:
        """So many steps; the last loss."""
        t = self.t
        for _ in range(calls):
            batch = self.batches[self.step % len(self.batches)]
            self.step += 1
            mean, logvar, ctx = (batch[k].float() for k in ("mean", "logvar", "context"))
            z = self.scale * (mean + (0.5 * logvar).exp() * t.randn_like(mean))
            kept = t.rand(len(z), 1, 1, device=z.device) >= self.train.caption_dropout
            steps = t.randint(0, len(self.alpha), (len(z),), device=z.device)
            loss = self.loss(z, ctx * kept, steps, t.randn_like(z))
            loss.backward()
            t.nn.utils.clip_grad_norm_(self.parameters, self.train.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with t.no_grad():
                t._foreach_lerp_(self.average, self.parameters, 1 - self.train.ema_decay)
        return float(loss)

    def memory(self) -> float:
        """Bytes that PyTorch held at most; 0 on a CPU."""
        return float(self.t.cuda.max_memory_allocated()) if where() == "cuda" else 0.0


class Sampler:
    """Guided DDIM and pictures, as diffusers' pipeline does it.

    Args:
      model: of `network`; None where nothing is drawn.
      decoder: of `picture_maker`; None where nothing is decoded.
      scale: of latents.
      half: whether weights and activations are bfloat16, on a GPU.
      eager: without torch.compile.
    """

    def __init__(
        self, model: Any, decoder: Any, scale: float, half: bool, eager: bool = False
    ):
        self.t, self.scale = torch(), scale
        self.dtype = self.t.bfloat16 if half and where() == "cuda" else self.t.float32
        whole, part = (None, None) if eager else ("", "decoder")
        self.model = None if model is None else ready(model, half, whole)
        self.decoder = None if decoder is None else ready(decoder, half, part)

    def given(self, noise_BHWC: np.ndarray, ctx_BLD: np.ndarray, null_1LD: np.ndarray) -> tuple:
        """What `latents` takes, on the device: noise, and both prompts' states."""
        ctx = self.t.from_numpy(np.array(ctx_BLD)).to(where())
        null = self.t.from_numpy(np.array(null_1LD)).to(where()).expand_as(ctx)
        return tensor(noise_BHWC).to(self.dtype), self.t.cat([null, ctx]).to(self.dtype)

    def latents(self, x: Any, both: Any, steps: int, guidance: float) -> Any:
        """After all steps, a tensor."""
        from diffusers.schedulers import DDIMScheduler

        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False,
        )
        scheduler.set_timesteps(steps, device=where())
        with self.t.inference_mode():
            for step in scheduler.timesteps:
                empty, full = self.model(self.t.cat([x, x]), step, both).sample.chunk(2)
                x = scheduler.step(empty + guidance * (full - empty), step, x).prev_sample
        return x

    def decode(self, z: Any) -> Any:
        """Pictures of a tensor of latents, a tensor."""
        with self.t.inference_mode():
            return self.decoder.decode(z.to(self.dtype) / self.scale).sample

    def wait(self) -> None:
        """Until the device has done all."""
        if where() == "cuda":
            self.t.cuda.synchronize()
