"""DreamBooth (Ruiz et al. 2023, arXiv 2208.12242): a network learns a subject by a few pictures.

It is trained further on pictures of the subject under a caption with a rare word, the identifier.
Beside each of them it sees one that it drew itself of the subject's class, without the identifier,
so that it does not forget what else there is of it (eq. 2 there: prior preservation).

What is trained is a tree of networks, `unet` and, where the text encoder learns too, `text`: their
parameters, or adapters beside frozen ones (`models.lora`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Diffusion, Train
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, backbone, lora
from ldm_scaling.models.text_network import TextNetwork
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks.drawing import Frozen, pad_context
from ldm_scaling.training.task import Beside, Task

CLASS = "class_"
"""Before the names of a batch's arrays that are of the class."""


def begin(
    networks: Mapping[str, Any], rank: int, key: jax.Array, targets: Sequence[str] = ()
) -> Any:
    """What is trained, before the first step: it draws what the pretrained networks draw.

    Args:
      networks: `unet`, and `text` where it is trained, to pretrained parameters.
      rank: of adapters; 0 trains all parameters.
      key: of the adapters.
      targets: patterns of the network's layers that get adapters; none are `lora.NETWORK_TARGETS`.
    Raises:
      UserError: see `lora.init`.
    """
    if not rank:
        return dict(networks)
    patterns = {"unet": targets or lora.NETWORK_TARGETS, "text": lora.TEXT_TARGETS}
    return {
        name: lora.init(params, rank, jax.random.fold_in(key, name == "text"), patterns[name])
        for name, params in networks.items()
    }


def whole(trained: Any, base: Any = None) -> Any:
    """The networks' parameters, of what is trained and, for adapters, what it lies beside."""
    if base is None:
        return trained
    return {name: lora.merge(base[name], adapters) for name, adapters in trained.items()}


def loss_fn(
    denoise: Denoise, spec: backbone.Spec, train: Train, diffusion: Diffusion,
    latent_scale: float, null_ctx_LD: np.ndarray, prior_weight: float,
    text: TextNetwork | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(trained, batch, key, beside=None) -> (scalar, metrics)`: the mean squared error over
    the subject's pictures, and `prior_weight` times that over the class's.

    A batch holds `mean` and `logvar` of the subject's latents (B, H, W, C), and of its caption
    `context` (B, L, D) or, for a text encoder that is trained, `ids` and `mask` (B, L). With a
    weight above 0 it holds the same of the class under names that begin with `CLASS`; both go
    through the networks as one batch of 2 B.

    Args:
      denoise: the network, see `drawing.denoiser`.
      spec, train, diffusion: of the network and the run.
      latent_scale, null_ctx_LD: see `Frozen`.
      prior_weight: lambda of eq. 2.
      text: the text encoder that is trained; None where its states are kept.
    """
    schedule = schedule_lib.get(diffusion.schedule)
    null = None if text is None else text.tokenize([""])
    null_ctx_LD = null_ctx_LD.astype(np.float32)
    names = ("mean", "logvar", *(("context",) if text is None else ("ids", "mask")))

    def states(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        if text is None:
            return batch["context"].astype(jnp.float32), null_ctx_LD
        ctx_BLD = text.apply(params["text"], batch["ids"], batch["mask"])
        empty = text.apply(params["text"], *null)[0] if train.caption_dropout else null_ctx_LD
        return ctx_BLD, empty

    def loss(trained: Any, batch: Any, key: jax.Array, beside: Beside | None = None):
        params = whole(trained, beside and beside.frozen)
        both = {name: batch[name] for name in names}
        if prior_weight:
            both = {name: _beside(a, batch[CLASS + name]) for name, a in both.items()}
        z_key, drop_key, diffusion_key = jax.random.split(key, 3)
        mean, logvar = (both[name].astype(jnp.float32) for name in ("mean", "logvar"))
        z_BHWC = latent_scale * autoencoder.Posterior(mean, logvar).sample(z_key)
        ctx_BLD, null_LD = (pad_context(ctx, spec.context_dim) for ctx in states(params, both))
        dropped_B = jax.random.uniform(drop_key, z_BHWC.shape[:1]) < train.caption_dropout
        ctx_BLD = jnp.where(dropped_B[:, None, None], null_LD, ctx_BLD)
        loss_B = loss_lib.diffusion_loss(
            denoise, params["unet"], z_BHWC, {"context": ctx_BLD}, diffusion_key, schedule,
            diffusion.prediction, diffusion.timesteps, diffusion.weighting,
        )
        if not prior_weight:
            return jnp.mean(loss_B), {}
        subject, prior = jnp.mean(loss_B.reshape(-1, 2), axis=0)
        return subject + prior_weight * prior, {"subject_loss": subject, "prior_loss": prior}

    return loss


def _beside(subject: jax.Array, prior: jax.Array) -> jax.Array:
    """(2 B, ...): each picture of the subject, then one of the class; none leaves its device."""
    both = jnp.stack([subject, prior], axis=1)
    return both.reshape(-1, *both.shape[2:])


def make(
    name: str, spec: backbone.Spec, train: Train, diffusion: Diffusion, frozen: Frozen,
    denoise: Denoise, networks: Mapping[str, Any], prior_weight: float = 1.0, rank: int = 0,
    targets: Sequence[str] = (), text: TextNetwork | None = None, seed: int = 0,
    show: Callable[[Any, int], dict[str, np.ndarray]] | None = None,
) -> Task:
    """The task of one member and one subject.

    Args:
      name: in logs and progress bars.
      spec, train, diffusion: of the network and the run.
      frozen: latent scale and empty caption.
      denoise: the network, see `drawing.denoiser`.
      networks, rank, targets: see `begin`; `networks` lie on the run's mesh.
      prior_weight, text: see `loss_fn`.
      seed: of adapters.
      show: see `Task`, given whole networks.
    Raises:
      UserError: see `lora.init`.
    """
    loss = loss_fn(
        denoise, spec, train, diffusion, frozen.latent_scale, frozen.null_ctx_LD, prior_weight, text
    )
    base = dict(networks) if rank else None

    def init(key: jax.Array) -> Any:
        return begin(networks, rank, key, targets)

    def start() -> Any:
        # Copies: a step donates its state, and these networks draw and teach further.
        return jax.tree.map(jnp.copy, init(jax.random.key(seed)))

    def make_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: np.asarray(value) for key, value in batch.items()}

    def shown(trained: Any, step: int) -> dict[str, np.ndarray]:
        return show(whole(trained, base), step) if show else {}

    shapes = jax.eval_shape(init, jax.random.key(0))  # Says what is wrong with targets and rank.
    rates, project = (None, None) if rank else (backbone.rates(spec), backbone.project(spec))
    return Task(
        name, init, make_batch, loss, show=shown, start=start, frozen=base,
        rates=rates and jax.tree.map(lambda _: 1.0, shapes) | {"unet": rates},
        project=project and (lambda trained: trained | {"unet": project(trained["unet"])}),
    )
