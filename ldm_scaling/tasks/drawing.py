"""Drawing pictures with a network of the family: prompts in, uint8 pictures out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling import pictures
from ldm_scaling.config import Diffusion
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import autoencoder, backbone, narrowing, tiny_decoder
from ldm_scaling.parallel import gathering, hosts, placing
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import packing, solvers
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.sampling.lanes import Finished, Lanes
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.table import SamplerTable

_TIMED_ROWS, _TIMES = 4, 3
_DECODERS = {
    autoencoder.AutoencoderSpec: autoencoder.decode,
    tiny_decoder.TinyDecoderSpec: tiny_decoder.decode,
}


def sampling_key(seed: int) -> jax.Array:
    """The key that a study's pictures are drawn with; a sample's number and row are folded in."""
    return jax.random.key(seed)


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


def check_heads(spec: backbone.Spec, tensor: int, whose: str = "this network") -> None:
    """Raises `UserError` for attention heads that do not divide over `tensor` shards."""
    if wrong := sorted(h for h in backbone.heads(spec) if h % tensor):
        raise UserError(
            f"config: mesh.tensor={tensor} does not divide the {wrong[0]} attention heads of "
            f"{whose}: give another, or mesh.fsdp instead"
        )


def denoiser(
    spec: backbone.Spec, mesh: jax.sharding.Mesh, compute_dtype: str = "auto", remat: str = "none",
    attention: str = "auto",
) -> Denoise:
    """A network as it runs on a mesh, in training and in sampling.

    Args:
      spec: the network.
      mesh: what it runs on; its platform decides what `auto` is.
      compute_dtype, remat, attention: see `config.Train`.
    Raises:
      UserError: of `check_heads`.
    """
    platform = mesh_lib.platform(mesh)
    dtype = hosts.compute_dtype(compute_dtype, platform)
    tensor = "tensor" if mesh.shape["tensor"] > 1 else ""
    check_heads(spec, mesh.shape["tensor"])
    form = attention_lib.Attention(
        attention, platform, tensor, hosts.cudnn_width(mesh.devices.flat[0])
    )

    def make(gather: Callable | None, apart: bool) -> Denoise:
        return backbone.denoise_fn(spec, dtype, remat, form if apart else form.unfused(), gather)

    shapes = backbone.param_shapes(spec)
    return gathering.spread(make, shapes, mesh, backbone.gathers(spec))


def narrowed(
    spec: backbone.Spec, mesh: jax.sharding.Mesh, compute_dtype: str = "auto"
) -> Callable[[Any], Any]:
    """What makes a network's parameters those that a loop takes which calls it in every turn, see
    `models.narrowing`. In shards, as where memory is short, they are left as they are: a second
    copy would have to be held. The arguments are `denoiser`'s."""
    if mesh_lib.fsdp(mesh) * mesh.shape["tensor"] > 1:
        return lambda params: params
    return narrowing.of(spec, hosts.compute_dtype(compute_dtype, mesh_lib.platform(mesh)))


def lanes(
    spec: backbone.Spec, latent_shape: tuple[int, int, int], size: int, mesh: jax.sharding.Mesh,
    compute_dtype: str = "auto", attention: str = "auto",
) -> Lanes:
    """The lanes that a network's pictures are drawn in, conditioned on `context` (B, L, D) and, for
    a network that sees one, on `condition` (B, H, W, C').

    Args:
      spec, mesh, compute_dtype, attention: see `denoiser`.
      latent_shape: (H, W, C).
      size: how many, over all devices.
    """

    def admit(cond: Any) -> Any:
        cond = {name: value.astype(jnp.float32) for name, value in cond.items()}
        return cond | {"context": pad_context(cond["context"], spec.context_dim)}

    denoise = denoiser(spec, mesh, compute_dtype, attention=attention)
    return Lanes(
        denoise, latent_shape, size, mesh, admit, told=spec.guidance_dim > 0,
        narrowed=narrowed(spec, mesh, compute_dtype),
    )


def decoder(
    spec: autoencoder.AutoencoderSpec | tiny_decoder.TinyDecoderSpec, scale: float
) -> Callable[[Any, Any], jax.Array]:
    """`decode(params, latents_BHWC) -> pictures`, about [-1, 1], by `decoder_program`.

    Args:
      spec: what makes pictures.
      scale: what latents were multiplied by.
    """
    run = decoder_program(spec)
    return lambda params, z_BHWC: run(params, z_BHWC, np.float32(scale))


def decoder_program(
    spec: autoencoder.AutoencoderSpec | tiny_decoder.TinyDecoderSpec
) -> Callable[[Any, Any, Any], jax.Array]:
    """Jitted `decode(params, latents_BHWC, scale) -> pictures`, about [-1, 1]: what latents were
    multiplied by is known when a program that was compiled before is used."""
    network = _DECODERS[type(spec)]

    @jax.jit
    def decode(params, z_BHWC, scale):
        return network(spec, params, z_BHWC / scale)

    return decode


@jax.jit
def _bytes(x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 pictures, grey where one is not finite, and which are. A quarter of what floats would
    take to the host."""
    finite_B = jnp.isfinite(x_BHWC).all((1, 2, 3))
    x_BHWC = jnp.where(finite_B[:, None, None, None], x_BHWC, 0.0)
    return pictures.to_uint8(x_BHWC, jnp), finite_B


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What stays fixed under every member of the family.

    Attributes:
      decoder_spec, decoder_params: what makes pictures of latents.
      latent_scale: latents are multiplied by it (1 / their standard deviation).
      latent_shape: (H, W, C) of the latents.
      null_ctx_LD: text states of the empty caption.
    """

    decoder_spec: autoencoder.AutoencoderSpec | tiny_decoder.TinyDecoderSpec
    decoder_params: Any
    latent_scale: float
    latent_shape: tuple[int, int, int]
    null_ctx_LD: np.ndarray

    def decoder(self) -> Callable[[Any, Any], jax.Array]:
        """`decode(params, latents_BHWC) -> pictures`, about [-1, 1], compiled when first used."""
        return decoder(self.decoder_spec, self.latent_scale)


class Drawer:
    """Draws pictures with one network: every table and guidance rate through one program, or two
    where some configurations are guided and others not.

    Args:
      spec: the network.
      frozen: autoencoder and empty caption.
      diffusion: schedule and prediction.
      batch_size: lanes, and pictures decoded at a time.
      decode: `frozen.decoder()`, shared between members.
      mesh: lanes and batches are split over its devices.
      compute_dtype, attention: see `config.Train`; kept as `program`.
    """

    def __init__(
        self, spec: backbone.Spec, frozen: Frozen, diffusion: Diffusion, batch_size: int,
        decode: Callable, mesh: jax.sharding.Mesh, compute_dtype: str = "auto",
        attention: str = "auto",
    ):
        self.frozen, self.diffusion, self.batch_size = frozen, diffusion, batch_size
        self._decode, self.mesh = decode, mesh
        self.program = {"compute_dtype": compute_dtype, "attention": attention}
        self.schedule = schedule_lib.get(diffusion.schedule)
        self.lanes = lanes(spec, frozen.latent_shape, batch_size, mesh, compute_dtype, attention)
        self._uncond = {"context": frozen.null_ctx_LD[None]}
        if channels := spec.in_channels - spec.out_channels:
            shape = (1, *frozen.latent_shape[:2], channels)
            self._uncond["condition"] = np.zeros(shape, np.float32)

    def without(self, null_ctx_LD: np.ndarray) -> Drawer:
        """The same program guided away from another empty caption, such as that of a text encoder
        that was trained further."""
        other = copy.copy(self)
        other.frozen = dataclasses.replace(self.frozen, null_ctx_LD=null_ctx_LD)
        other._uncond = self._uncond | {"context": null_ctx_LD[None]}
        return other

    def table(self, name: str, steps: int, spacing: str | None = None) -> SamplerTable:
        """The sampler's table on this schedule, see `solvers.make`."""
        return solvers.make(name, self.schedule, steps, self.diffusion.prediction, spacing)

    def plans(self, configurations: Sequence[Configuration]) -> list[packing.Plan]:
        """Where each sample runs, see `Lanes.plans`."""
        return self.lanes.plans(configurations)

    def split(self, configurations: Sequence[Configuration]) -> list[tuple[bool, list[int]]]:
        """What one program runs together, see `packing.split`."""
        return packing.split(configurations, self.lanes.told)

    def draw(
        self, params: Any, configurations: Sequence[Configuration], ctx_PLD: np.ndarray,
        key: jax.Array, condition_PHWC: np.ndarray | None = None,
    ) -> Iterator[Finished]:
        """Sampled latents as they end, see `Lanes.run`.

        Args:
          params: of the network.
          configurations: what to draw.
          ctx_PLD: text states of all prompts, which `Configuration.prompt_N` counts.
          key: see `sampling_key`.
          condition_PHWC: what the network sees beside the text, of all prompts; None for one that
            sees nothing.
        """
        given = {"context": ctx_PLD}
        if condition_PHWC is not None:
            given["condition"] = condition_PHWC
        if given.keys() != self._uncond.keys():
            takes = sorted(self._uncond)
            raise ValueError(f"the network is given {sorted(given)}, it takes {takes}")
        yield from self.lanes.run(
            params, configurations,
            lambda prompt_M: {name: values[prompt_M] for name, values in given.items()},
            self._uncond, key,
        )

    def decode(
        self, z_JHWC: np.ndarray, name: Callable[[int], str],
        on_broken: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """uint8 pictures of J latents, in batches, the last one filled up and cut.

        Args:
          z_JHWC: latents.
          name: says what latent j was drawn with, for the message.
          on_broken: told j where a pixel is not finite; such a picture is grey.
        Raises:
          UserError: when a pixel is not finite and there is no `on_broken`.
        """
        out = []
        for start in range(0, len(z_JHWC), self.batch_size):
            z_BHWC = z_JHWC[start : start + self.batch_size]
            fill = [(0, self.batch_size - len(z_BHWC))] + [(0, 0)] * 3
            put = placing.put_batch(self.mesh, np.pad(z_BHWC, fill, mode="edge"))
            found = placing.fetch(_bytes(self._decode(self.frozen.decoder_params, put)))
            x, finite = (leaf[: len(z_BHWC)] for leaf in found)
            wrong = np.flatnonzero(~finite)
            if wrong.size and on_broken is None:
                raise UserError(
                    f"{name(start + int(wrong[0]))} draws pictures that are not finite: lower "
                    "the guidance, use train.compute_dtype=float32, or train anew"
                )
            for j in wrong:
                on_broken(start + int(j))
            out.append(x)
        return np.concatenate(out)

    def pictures(
        self, params: Any, configurations: Sequence[Configuration], ctx_PLD: np.ndarray,
        key: jax.Array, on_rows: Callable[[int], Any] = lambda rows: None,
        condition_PHWC: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """All pictures of few configurations, (N, H, W, 3) uint8 each; `draw` has the arguments.

        Args:
          params, configurations, ctx_PLD, key, condition_PHWC: see `draw`.
          on_rows: told how many rows are done, for a progress bar; a cascade's of the second stage.
        Raises:
          UserError: as `decode`.
        """
        shape = self.frozen.latent_shape
        latents = [np.zeros((len(c.index_N), *shape), np.float32) for c in configurations]
        for finished in self.draw(params, configurations, ctx_PLD, key, condition_PHWC):
            places = zip(finished.configuration, finished.position, finished.latents_JHWC)
            for i, j, z_HWC in places:
                latents[i][j] = z_HWC
            on_rows(0 if finished.first else finished.rows)
        return [
            self.decode(z, lambda j, c=c: f"{c.table.name} at guidance {c.guidance:g}")
            for z, c in zip(latents, configurations)
        ]

    def seconds(
        self, params: Any, configuration: Configuration, ctx_PLD: np.ndarray, key: jax.Array,
        condition_PHWC: np.ndarray | None = None,
    ) -> tuple[float, float]:
        """Measured seconds of one row of one sample, with all lanes full, and of decoding one.

        The median of three, after a run that compiles.

        Args:
          params, ctx_PLD, key, condition_PHWC: see `draw`.
          configuration: one that runs in the program to be timed (guided or not, correction).
        """
        calls = configuration.table.calls
        samples = self.batch_size * max(1, -(-_TIMED_ROWS // calls))
        full = dataclasses.replace(
            configuration, index_N=np.resize(configuration.index_N, samples),
            prompt_N=np.resize(configuration.prompt_N, samples),
        )
        z_BHWC = np.zeros((self.batch_size, *self.frozen.latent_shape), np.float32)

        def rows() -> None:
            for _ in self.draw(params, [full], ctx_PLD, key, condition_PHWC):
                pass

        runs = (rows, functools.partial(self.decode, z_BHWC, lambda j: "a trial"))
        times = []
        for run in runs:
            run()
            seconds = []
            for _ in range(_TIMES):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            times.append(statistics.median(seconds))
        return times[0] / (calls * samples), times[1] / self.batch_size
