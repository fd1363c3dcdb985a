"""Running the frozen encoders once over a data set: caches of latents and of text states."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_scaling.data import cache, cache_shards
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models.text_encoder import TextEncoder
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.study.encoders import LatentEncoder, TextStates

log = logging.getLogger(__name__)

DTYPES = ("float16", "float32")
_SHARD_BYTES = 2**30  # at most, and
_SHARDS = 32  # at least, while a shard has a few batches: a killed run loses no more than one
_FEW = 512
_FEW_CUT = 0.02  # of all captions, of which it is only noted; of the demo's 0.2% are cut
_AHEAD = 2  # batches read while one is encoded
_PIECE = 8  # pictures that a thread reads at a time


def shard_size(count: int, record_bytes: int) -> int:
    """Records of a shard: 32 shards of a small data set, shards of 1 GiB of a large one."""
    return max(1, min(_SHARD_BYTES // record_bytes, max(_FEW, -(-count // _SHARDS))))


# --- latents ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Of all latents of a cache, their posterior's variance included.

    Attributes:
      count: images.
      mean, std: of all values together.
      least, largest: of the posterior's means.
    """

    count: int
    mean: float
    std: float
    least: float
    largest: float

    @property
    def scale(self) -> float:
        """What latents are multiplied by to have deviation 1 (Rombach et al. 2022, section G)."""
        return 1.0 / self.std


def latent_statistics(*sources: cache.CacheSource) -> LatentStatistics:
    """The statistics that caches of latents keep, of several (buckets of shapes) together.

    Raises:
      UserError: for a cache that keeps none, or latents that do not vary.
    """
    for source in sources:
        if "sum_C" not in source.statistics:
            raise UserError(f"{source.path} keeps no statistics of latents: remove it, and it is "
                            "made anew")
    found = functools.reduce(cache_shards.merge, (source.statistics for source in sources), {})
    n, sum_C, square_C = found["values"], np.array(found["sum_C"]), np.array(found["square_C"])
    mean = float((sum_C / n).mean())
    std = float(np.sqrt(max(square_C.mean() / n - mean**2, 0.0)))
    if std == 0:
        raise UserError(f"{sources[0].path}: all latents are the same: check the images")
    return LatentStatistics(found["count"], mean, std, found["min"], found["max"])


def _measured(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mergeable statistics of a batch, in float64. `values` are those of one channel."""
    mean, logvar = (batch[name].astype(np.float64) for name in ("mean", "logvar"))
    return {
        "count": len(mean),
        "values": mean[..., 0].size,
        "sum_C": mean.sum((0, 1, 2)).tolist(),
        "square_C": (mean**2 + np.exp(logvar)).sum((0, 1, 2)).tolist(),
        "min": float(mean.min()),
        "max": float(mean.max()),
    }


def cache_latents(
    folder: epath.PathLike,
    images: Any,
    encoder: LatentEncoder,
    mesh: jax.sharding.Mesh,
    data_hash: str,
    *,
    indices: Sequence[int] | None = None,
    mirrored: bool = False,
    dtype: str = "float32",
    batch_size: int = 64,
    what: str = "latents",
    process_index: int = 0,
    process_count: int = 1,
) -> cache.CacheSource:
    """Latents of images of one shape: `mean` and `logvar` (h, w, C) of the posterior, sharded.

    Sampled from when training, as `tasks.text_to_image` does. Interrupted, it goes on; finished, it
    is only opened.

    Args:
      folder: to make, see `cache_shards.write_shards`.
      images: a `source.Source` whose batches hold "image", uint8 (B, H, W, 3); threads share it.
      encoder: what encodes.
      mesh: of this process's devices; batches are split over it.
      data_hash: of the images: of all that decides what `images` gives.
      indices: of the images, all if None; record i is image indices[i].
      mirrored: encodes the images mirrored left to right.
      dtype: that latents are kept in. float16 halves the files; it moves a mean by at most 2**-11
        of itself (noise 73 dB below the latents; the least noise of Stable Diffusion's schedule is
        31 dB below) and the posterior's deviation by at most 0.4%. What they are computed in is the
        encoder's, see `encoders.latent_dtype`.
      batch_size: rounded up to a multiple of the devices.
      what: of the progress bar.
      process_index, process_count: of the hosts that make the cache together, each with images and
        a mesh of its own.

    Raises:
      UserError: for images that do not halve as often as the encoder halves them, that are damaged
        or of several shapes; for latents that are not finite in `dtype`; for a folder with
        something else in it.
    """
    if dtype not in DTYPES:
        raise UserError(f"latents are kept in {' or '.join(DTYPES)}, not in {dtype!r}")
    if outside := [d for d in mesh.devices.flat if d.process_index != jax.process_index()]:
        raise UserError(f"{outside[0]} is of another process: encode on a mesh of local devices")
    chosen = "all" if indices is None else sha256_of(np.asarray(indices, np.int64).tobytes())
    indices = range(len(images)) if indices is None else indices
    count = len(indices)
    if not count:
        raise UserError(f"there are no images to encode into {os.fspath(folder)}")
    height, width = _read(images, indices[:1]).shape[1:3]
    shape = encoder.latent_shape(height, width)
    hash = sha256_of([encoder.hash, data_hash, list(shape), mirrored, dtype, chosen, count])
    size = -(-batch_size // mesh_lib.shards(mesh)) * mesh_lib.shards(mesh)
    encode, params = jitted(encoder), functools.cache(lambda: encoder.half(mesh))

    def read(places: range) -> np.ndarray:
        x_BHWC = _read(images, [indices[i] for i in places])
        if x_BHWC.shape[1:] != (height, width, 3):
            raise UserError(
                f"image {indices[places[0]]} and those after it are {x_BHWC.shape[1:]}, the first "
                f"was {(height, width, 3)}: encode the images of each shape by themselves"
            )
        return x_BHWC[:, :, ::-1] if mirrored else x_BHWC

    def make(start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        def run(x_BHWC):
            fill = [(0, size - len(x_BHWC))] + [(0, 0)] * 3
            padded = placing.put_batch(mesh, np.pad(x_BHWC, fill, mode="edge"))
            return encode(params(), padded), len(x_BHWC)

        at = start
        for found, n in _one_behind(map(run, _read_ahead(read, start, stop, size))):
            out = {name: np.asarray(x)[:n] for name, x in found.items()}
            with np.errstate(over="ignore"):
                out = {name: x.astype(dtype) for name, x in out.items()}
            for x in out.values():
                wrong = np.flatnonzero(~np.isfinite(x).all((1, 2, 3)))
                if wrong.size:
                    raise UserError(
                        f"image {indices[at + int(wrong[0])]} has latents that are not finite in "
                        f"{dtype}: compute and keep them in float32 (data.latent_dtype)"
                    )
            at += n
            yield out

    per = shard_size(count, 2 * int(np.prod(shape)) * np.dtype(dtype).itemsize)
    meta = {
        "encoder": encoder.hash, "data": data_hash, "image": [height, width],
        "mirrored": mirrored, "published_scale": encoder.scale,
    }
    return cache_shards.write_shards(
        folder, count, per, make, meta, hash, statistics=_measured, what=what, unit="picture",
        process_index=process_index, process_count=process_count,
    )


def cache_latent_buckets(
    folder: epath.PathLike,
    images: Any,
    encoder: LatentEncoder,
    mesh: jax.sharding.Mesh,
    data_hash: str,
    buckets: Sequence[tuple[Sequence[int], tuple[int, int]]],
    **options: Any,
) -> dict[tuple[int, int], cache.CacheSource]:
    """Latents of images of several shapes: one cache a shape, in folders named HxW.

    `latent_statistics` of all of them together gives the scale.

    Args:
      folder: of the caches.
      images, encoder, mesh, data_hash: see `cache_latents`.
      buckets: indices of the images of a shape, and the shape (H, W). A shape without any is left
        out.
      **options: others of `cache_latents`.

    Raises:
      UserError: as `cache_latents`; where the images of a bucket are not of its shape.
    """
    made = {}
    for indices, (height, width) in buckets:
        if not len(indices):
            continue
        found = _read(images, indices[:1]).shape[1:3]
        if found != (height, width):
            raise UserError(
                f"image {indices[0]} is {found[0]}x{found[1]}, not {height}x{width} as its bucket"
            )
        what = options.get("what", "latents")
        what = f"{what}, {height}x{width}" if what else ""
        made[height, width] = cache_latents(
            epath.Path(folder) / f"{height}x{width}", images, encoder, mesh, data_hash,
            indices=indices, **{**options, "what": what},
        )
    return made


@functools.lru_cache(maxsize=1)  # A split's caches follow each other, and compile once.
def jitted(encoder: LatentEncoder) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """`encode(params, images) -> {"mean", "logvar"}` of uint8 pictures (B, H, W, 3)."""

    @jax.jit
    def encode(params, x_BHWC):
        posterior = encoder.encode(params, x_BHWC.astype(jnp.float32) / 127.5 - 1)
        return {"mean": posterior.mean, "logvar": posterior.logvar}

    return encode


def _read(images: Any, indices: Sequence[int]) -> np.ndarray:
    try:
        return np.asarray(images.batch(indices)["image"])
    except CorruptRecords as e:
        raise UserError(
            f"an image to be encoded is damaged: {e}; remove the data set's folder and prepare it "
            "anew, or copy it again"
        ) from e


# --- text states ------------------------------------------------------------------------------


def cache_text(
    folder: epath.PathLike,
    captions: Sequence[str],
    encoder: TextStates,
    mesh: jax.sharding.Mesh | None = None,
    *,
    embedder: TextEncoder | None = None,
    dtype: str = "float16",
    batch_size: int = 256,
    what: str = "text states",
    process_index: int = 0,
    process_count: int = 1,
) -> cache.CacheSource:
    """Text states of captions: `context` (L, D), sharded; with an embedder `embedding` (E,) too.

    It is logged how many of the captions are longer than L tokens, and cut; more than 2% are a
    warning.

    Args:
      folder: to make, see `cache_shards.write_shards`.
      captions: record i is captions[i].
      encoder: what makes states.
      mesh: of this process's devices, over which passes are split; None leaves them where the
        encoder runs.
      embedder: what makes float32 sentence embeddings. One that is the encoder costs nothing.
      dtype: that states are kept in, float16 or float32.
      batch_size: captions a pass.
      what: of the progress bar.
      process_index, process_count: of the hosts that make the cache together.

    Raises:
      UserError: for captions that are no texts, states that are not finite in `dtype`, or a folder
        with something else in it.
    """
    if dtype not in DTYPES:
        raise UserError(f"text states are kept in {' or '.join(DTYPES)}, not in {dtype!r}")
    if not len(captions):
        raise UserError(f"there are no captions to encode into {os.fspath(folder)}")
    same = embedder is not None and embedder.hash == encoder.hash
    texts = getattr(captions, "hash", None) or sha256_of(list(captions))
    hash = sha256_of([encoder.hash, texts, embedder and embedder.hash, dtype])
    runner = functools.cache(lambda: encoder if mesh is None else encoder.on(mesh, batch_size))

    seen: collections.Counter[str] = collections.Counter()

    def make(start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        for low in range(start, stop, batch_size):
            texts = list(captions[low : min(low + batch_size, stop)])
            if same:
                ctx_BLD, e_BE = runner().states_and_embeddings(texts)
            else:
                ctx_BLD = runner().states(texts)
                e_BE = None if embedder is None else embedder.sentence(texts)
            with np.errstate(over="ignore"):
                out = {"context": ctx_BLD.astype(dtype)}
            wrong = np.flatnonzero(~np.isfinite(out["context"]).all((1, 2)))
            if wrong.size:
                raise UserError(
                    f"caption {low + int(wrong[0])} has states that are not finite in {dtype}: "
                    "keep them in float32 (data.text_dtype)"
                )
            cut = sum(n > encoder.length for n in encoder.lengths(texts))
            seen.update(cut=cut, all=len(texts))
            yield out if e_BE is None else {**out, "embedding": e_BE}

    per = shard_size(len(captions), encoder.length * encoder.width * np.dtype(dtype).itemsize)
    made = cache_shards.write_shards(
        folder, len(captions), per, make, {"encoder": encoder.hash}, hash,
        compress=encoder.zero_padding, what=what, unit="caption",
        process_index=process_index, process_count=process_count,
    )
    if seen["cut"]:
        more = "set --config.data.text_length to more, in a new workdir"
        log.log(
            logging.WARNING if seen["cut"] > _FEW_CUT * seen["all"] else logging.INFO,
            "%s: %d of %d captions are longer than data.text_length=%d tokens, and their ends are "
            "not seen: %s",
            os.fspath(folder), seen["cut"], seen["all"], encoder.length,
            "the text encoder takes no more" if encoder.length == encoder.longest else more,
        )
    return made


# --- reading ahead ----------------------------------------------------------------------------


def _one_behind(results: Iterator[Any]) -> Iterator[Any]:
    """Each result when the next one has been asked for: a device computes it in the meantime."""
    waiting: collections.deque = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _read_ahead(
    read: Callable[[range], np.ndarray], start: int, stop: int, size: int
) -> Iterator[np.ndarray]:
    """Batches of `read`, in order, read in small pieces by threads while others are at work."""
    batches = [range(low, min(low + size, stop)) for low in range(start, stop, size)]
    pool = ThreadPoolExecutor(os.cpu_count())
    waiting: collections.deque[list[Future]] = collections.deque()

    def submit(batch: range) -> None:
        pieces = (batch[i : i + _PIECE] for i in range(0, len(batch), _PIECE))
        waiting.append([pool.submit(read, piece) for piece in pieces])

    try:
        for batch in batches[:_AHEAD]:
            submit(batch)
        for after in [*batches[_AHEAD:], *[None] * min(_AHEAD, len(batches))]:
            pieces = [future.result() for future in waiting.popleft()]
            if after is not None:
                submit(after)
            yield np.concatenate(pieces)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
