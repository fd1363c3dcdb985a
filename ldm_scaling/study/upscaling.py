"""Ways to make a picture of any size four times larger: bicubic interpolation, a network of
ESRGAN's kind, and a member that was fine-tuned for super-resolution; members of other
image-conditioned tasks restore pictures in the same way."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling import __version__, files, pictures
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained, rrdbnet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.sampling import sampler, tiles
from ldm_scaling.sampling.tiles import Tiles
from ldm_scaling.study import versions
from ldm_scaling.study.finetuned import FineTuned
from ldm_scaling.study.networks import model_hash
from ldm_scaling.tasks import conditioned
from ldm_scaling.tasks.drawing import denoiser, narrowed, pad_context, sampling_key

FACTOR = rrdbnet.FACTOR
TASK = "super_resolution"
MANIFEST = "upscale.json"
# Pixels of a picture that an ESRGAN takes at a time, and those that neighbours share.
ESRGAN_TILE, ESRGAN_OVERLAP = 192, 32
# Of a member's tile; StableSR's tiles of 64 latents overlap by 32.
_OVERLAP = 0.5
# Tiles that a network is given at a time.
_BATCH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """One way.

    Attributes:
      enlarge: uint8 pictures (N, h, w, 3) and their numbers (N,) to uint8 (N, 4 h, 4 w, 3); of
        other tasks to pictures of the same size, from (N, h, w, 4) with the mask behind, if any.
      batch: N at most.
      about: all that decides a pixel, for the manifest.
      check: raises `UserError` for a picture of a (height, width) that it does not take, or None.
    """

    enlarge: Callable[[np.ndarray, np.ndarray], np.ndarray]
    batch: int
    about: dict[str, Any]
    check: Callable[[tuple[int, int]], None] = lambda size: None


# --- without a study --------------------------------------------------------------------------


def bicubic() -> Way:
    """Pillow's bicubic interpolation (a = -1/2, as MATLAB's)."""

    def enlarge(images_NhwC: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        height, width = (FACTOR * n for n in images_NhwC.shape[1:3])
        return np.stack([
            np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            for image in images_NhwC
        ])

    return Way(enlarge, 1, {"by": "bicubic"})


def esrgan(path: str | os.PathLike[str]) -> Way:
    """A published network, see `rrdbnet.load`. A larger picture goes through it in tiles.

    Raises `UserError` for weights that are none of its kind.
    """
    spec, params = rrdbnet.load(path)
    run, digest = jax.jit(rrdbnet.apply), pretrained.hash_of(params)
    params = jax.device_put(params)

    def enlarge(images_NhwC: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        canvas = images_NhwC.shape[1:3]
        tile = tuple(min(side, ESRGAN_TILE) for side in canvas)
        made = Tiles(canvas, tile, ESRGAN_OVERLAP)
        return np.stack([
            _to_uint8(
                tiles.blended(
                    lambda x: run(params, x), image.astype(np.float32) / 255, made, 1, outer=FACTOR
                )
            )
            for image in images_NhwC
        ])

    about = {"by": Path(path).name, "weights": digest, "blocks": spec.blocks,
             "tile": ESRGAN_TILE, "overlap": ESRGAN_OVERLAP}  # fmt: skip
    return Way(enlarge, 1, about)


def _to_uint8(x_HWC: np.ndarray) -> np.ndarray:
    """Of [0, 1], clipped and rounded."""
    return np.rint(255 * np.clip(x_HWC, 0, 1)).astype(np.uint8)


# --- a member of a study ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a member draws.

    Attributes:
      member: of the config.
      sampler, steps: see `request.Request`; the spacing is the config's.
      seed: of the noise.
      guidance: rate; 1 is none.
    """

    member: str
    sampler: str
    steps: int
    seed: int
    guidance: float = 1.0


def member(tuned: FineTuned, settings: Settings, enlarges: bool = True) -> Way:
    """A fine-tuned member, after its last step. What is larger than what it was trained on it
    draws on one canvas, by overlapping tiles at each step.

    Args:
      tuned: the members.
      settings: how it draws.
      enlarges: whether it is to be one for super-resolution, or one for another task.
    Raises:
      UserError: for a study without such members, a member that is none or not trained, a sampler
        that does not take the steps, and guidance where there is nothing to guide away from.
    """
    m, config = tuned.materials, tuned.config
    if not config.task or (config.task == TASK) != enlarges:
        wanted = f"finetune.task={TASK!r}" if enlarges else "another finetune.task"
        remedy = f"or use  ldm-scaling {'restore' if enlarges else 'upscale'}"
        raise UserError(
            f"{m.workdir.path} holds members that were fine-tuned for "
            f"{config.task or 'nothing'}: give the workdir of a study whose config has {wanted}"
            f"{f', {remedy}' if config.task else ''}"
        )
    if settings.member not in m.study.members:
        raise UserError(
            f"member {settings.member!r} is none of the config's: choose from "
            f"{', '.join(m.study.members)}"
        )
    if settings.guidance != 1 and not config.condition_dropout:
        raise UserError(
            f"guidance {settings.guidance:g}: these members never drew without a condition, there "
            "is nothing to guide away from: 1, or fine-tune with finetune.condition_dropout"
        )
    steps, drawer = config.steps[-1], tuned.drawer(settings.member)
    spacing = config.sample.spacing or None
    table = drawer.table(settings.sampler, settings.steps, spacing)
    params = tuned.params(settings.member, steps)
    upscaler = _Upscaler(tuned, settings, table.padded(), params)
    about = {
        "by": settings.member, "task": config.task, "trained": model_hash(m.study, settings.member),
        "tuned": config.hash, "train_step": steps, "sampler": table.name, "steps": settings.steps,
        "spacing": spacing or "", "seed": settings.seed,
    }
    about |= {"guidance": settings.guidance} if settings.guidance != 1 else {}
    rows = versions.own_rows(
        m.study.diffusion, (settings.sampler, settings.steps, config.sample.spacing))
    about |= {"rows": rows} if rows else {}
    return Way(upscaler, upscaler.batch, about, upscaler.check)


class _Upscaler:
    """`Way.enlarge` of a member: encode, sample and decode, each in tiles of its own side."""

    def __init__(self, tuned: FineTuned, settings: Settings, table: Any, params: Any):
        m, self._guidance = tuned.materials, settings.guidance
        self._frozen, self._mesh, self._table, self._params = m.frozen, m.mesh, table, params
        run = tuned.config.train
        spec = tuned.spec(settings.member)
        self._denoise = denoiser(spec, m.mesh, run.compute_dtype, attention=run.attention)
        self._narrowed = narrowed(spec, m.mesh, run.compute_dtype)
        self._decode, self._key = m.decode, sampling_key(settings.seed)
        self._step = m.study.data.side // m.frozen.latent_shape[0]
        self._tile = m.frozen.latent_shape[:2]
        self._factor, self._masked = tuned.condition.scale, tuned.condition.masked
        self.batch = mesh_lib.rounded(_BATCH, m.mesh)
        null_LD = pad_context(m.frozen.null_ctx_LD.astype(np.float32), spec.context_dim)
        self._null_LD = null_LD
        network = m.networks.autoencoder()
        encode = network.encode
        self._encoder = network.half(m.mesh)

        @jax.jit
        def latents(params, x_BHWC):
            return m.frozen.latent_scale * encode(params, x_BHWC).mean

        self._latents = latents

    def check(self, size: tuple[int, int]) -> None:
        """Raises `UserError` for a picture that is smaller than a tile."""
        least = math.ceil(self._tile[0] * self._step / self._factor)
        if min(size) < least:
            raise UserError(
                f"a picture of {size[0]}x{size[1]} pixels is smaller than the network's tile of "
                f"{least}: give a larger one"
            )

    def __call__(self, images_NhwC: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        count, height, width = images_NhwC.shape[:3]
        factor = self._factor
        # Latents are of whole blocks of pixels: what is short of one is filled up, and cut again.
        unit = self._step // math.gcd(self._step, factor)
        fill = [(0, -height % unit), (0, -width % unit)]
        alone = (factor * height, factor * width) == tuple(self._step * n for n in self._tile)
        # A large picture has tiles enough of its own.
        rows = self.batch if alone else mesh_lib.rounded(1, self._mesh)
        if count > rows:
            several = range(0, count, rows)
            return np.concatenate([
                self(images_NhwC[i : i + rows], index_N[i : i + rows]) for i in several
            ])
        images = np.pad(images_NhwC, [(0, rows - count), *fill, (0, 0)], mode="edge")
        given = np.asarray(
            conditioned.enlarged(
                images[..., :3].astype(np.float32) / 127.5 - 1,
                tuple(factor * n for n in images.shape[1:3]),
            )
        )
        canvas = tuple(n // self._step for n in given.shape[1:3])
        made = Tiles(canvas, self._tile, int(_OVERLAP * self._tile[0]))
        seen = self._over(self._seen, given, made, inner=self._step)
        if self._masked:
            mask = images[:, :: self._step, :: self._step, 3:].astype(np.float32)
            seen = np.concatenate([mask, seen], axis=-1)
        index = np.pad(np.asarray(index_N, np.int32), (0, rows - count), mode="edge")
        null_BLD = np.broadcast_to(self._null_LD, (rows, *self._null_LD.shape))
        put = functools.partial(placing.put_batch, self._mesh)
        rate_B, uncond = None, None
        if self._guidance != 1:  # As in training, what is left out is zeros.
            rate_B = put(np.full(rows, self._guidance, np.float32))
            uncond = {"condition": np.zeros_like(seen[:1])}
        drawn = placing.fetch(
            self._sampler(made)(
                self._params, self._table, rate_B,
                put({"context": null_BLD, "condition": seen}), uncond, self._key, put(index),
            )
        )
        out = self._over(self._shown, drawn[:count], made, outer=self._step)
        if not np.isfinite(out).all():
            raise UserError(
                "the network draws pictures that are not finite: use train.compute_dtype=float32, "
                "or train anew"
            )
        out = pictures.to_uint8(out)[:, : factor * height, : factor * width]
        if not self._masked:
            return out
        # What was seen stays as it is, pixel for pixel.
        return np.where(images_NhwC[..., 3:] == 1, out, images_NhwC[..., :3])

    def _seen(self, x_BHWC: np.ndarray) -> np.ndarray:
        return placing.fetch(self._latents(self._encoder, placing.put_batch(self._mesh, x_BHWC)))

    def _shown(self, z_BHWC: np.ndarray) -> np.ndarray:
        put = placing.put_batch(self._mesh, z_BHWC)
        return placing.fetch(self._decode(self._frozen.decoder_params, put))

    def _over(self, function: Callable, x_NHWC: np.ndarray, made: Tiles, **kw) -> np.ndarray:
        """A function of `self.batch` tiles over all pictures; where a tile is a picture, over as
        many of these at a time."""
        if len(made) > 1:
            return np.stack([
                tiles.blended(function, x_HWC, made, self.batch, **kw) for x_HWC in x_NHWC
            ])
        fill = [(0, self.batch - len(x_NHWC))] + [(0, 0)] * 3
        return function(np.pad(x_NHWC, fill, mode="edge"))[: len(x_NHWC)]

    @functools.cache  # noqa: B019  One object a run.
    def _sampler(self, made: Tiles) -> Callable[..., jax.Array]:
        shape = (*made.canvas, self._frozen.latent_shape[2])
        denoise = tiles.tiled(self._denoise, made, self.batch)
        return sampler.make_sampler(denoise, shape, narrowed=self._narrowed)


# --- files ------------------------------------------------------------------------------------


def stems(names: Sequence[str]) -> list[str]:
    """Of the enlarged pictures, by those of what is given. Raises `UserError` for two alike."""
    out = [Path(name).with_suffix("").as_posix() for name in names]
    twice = [stem for stem in out if out.count(stem) > 1]
    if twice:
        raise UserError(f"two pictures are called {twice[0]!r}: keep one of them")
    return out


def _kept(manifest: epath.Path) -> dict[str, tuple[str, str]]:
    """Hashes of each picture that a folder was made of, and of what lay beside it; in the order of
    their numbers. Nothing of a file that is not there or not whole, of which `files.bind` tells."""
    try:
        have = json.loads(manifest.read_text())
        images = have["images"]
        pairs = zip(images.values(), have.get("beside") or [""] * len(images), strict=True)
        return dict(zip(images, pairs, strict=True))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _numbered(
    way: Way, given: ImageFolder, to: epath.Path, beside: Sequence[str]
) -> np.ndarray:
    """Ties a folder to a way and to pictures, see `write`; the numbers of those given."""
    kept = _kept(to / MANIFEST)
    pairs = zip(given.hashes, beside or [""] * len(given), strict=True)
    own = dict(zip(given.names, pairs, strict=True))
    every = kept | own

    def about(some: dict[str, tuple[str, str]]) -> dict[str, Any]:
        out = {"version": __version__, **way.about, "images": {n: h for n, (h, _) in some.items()}}
        return out | ({"beside": [b for _, b in some.values()]} if beside else {})

    files.bind(to, MANIFEST, about(kept or own),
               "pictures that were made in another way, {key} differs")
    for name, pair in own.items():
        if kept.get(name, pair) != pair:
            raise UserError(
                f"{to} holds {name} made of another picture{' or mask' if beside else ''} than "
                f"{given.root / name} is now: name a new folder"
            )
    stems([*every])
    if kept and len(every) > len(kept):
        files.write_json(to / MANIFEST, about(every))
    places = {name: number for number, name in enumerate(every)}
    return np.array([places[name] for name in given.names])


def write(
    way: Way, given: ImageFolder, to: epath.PathLike,
    read: Callable[[int], np.ndarray] | None = None, beside: Sequence[str] = (),
) -> epath.Path:
    """Makes what is missing of a folder of enlarged pictures, as PNG; returns it.

    Picture i has the noise of sample number i. Those that are given later have the numbers after
    theirs that the folder was made of; those keep what they are, given again or not.

    Args:
      way: how.
      given: the pictures.
      to: the folder.
      read: number -> what the way is given of a picture; the picture itself if None.
      beside: hashes of what `read` adds to them.

    Raises:
      UserError: for a folder that was made in another way, with what differs, or of other pictures
        of these names, for pictures that cannot be read, and as the way's `check`.
    """
    to = epath.Path(to)
    for i, (width, height) in enumerate(given.sizes):  # Before one is drawn.
        try:
            way.check((height, width))
        except UserError as e:
            raise UserError(f"{given.path(i)}: {e}") from e
    numbers = _numbered(way, given, to, beside)
    read = read or given.read
    targets = [to / f"{stem}.png" for stem in stems(given.names)]
    missing = [i for i, path in enumerate(targets) if not path.exists()]
    # Those of one size together: as many as the way takes.
    groups: dict[tuple[int, int], list[int]] = {}
    for i in missing:
        groups.setdefault(given.sizes[i], []).append(i)
    with files.progress(
        len(targets), f"drawing, {way.about['by']}", "picture", initial=len(targets) - len(missing)
    ) as bar:
        for places in groups.values():
            for start in range(0, len(places), way.batch):
                some = places[start : start + way.batch]
                images = {i: read(i) for i in some}
                # EXIF may have turned some of them.
                for shape in sorted({image.shape for image in images.values()}):
                    alike = np.array([i for i in some if images[i].shape == shape])
                    enlarged = way.enlarge(
                        np.stack([images[i] for i in alike]), numbers[alike])
                    for i, image in zip(alike, enlarged):
                        targets[i].parent.mkdir(parents=True, exist_ok=True)
                        pictures.save_png(targets[i], image)
                bar.update(len(some))
    return to
