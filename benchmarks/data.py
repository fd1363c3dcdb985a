"""The loader against its peers on the same records and files: interleaved, parity first.

    python benchmarks/data.py --what=cache [--records=4096 --latent=32 --batch=256]
    python benchmarks/data.py --what=jpeg [--images=96 --width=1152 --height=768 --side=256]
    python benchmarks/data.py --what=wait [--steps=200 --workers=0]

- cache: records of cached latents (mean and log-variance, float16) a second of processor time,
  shuffled and batched: ours, and plain grain (`ArrayRecordDataSource`, shuffle, a parse of the same
  bytes, batch), both as they read ahead by default and without that; and JPEGs of 1024 x 768,
  decoded to the size that these latents are of.
- jpeg: pairs a second of processor time, short side resized to `--side` by Lanczos and cut in the
  centre: ours from prepared shards, torch's `DataLoader` with Pillow on the files in a folder, and
  webdataset on a tar of the same files; none reads ahead. The pictures are noise with the spectrum
  of photographs. `--width` must scale to a whole, even number, or the peers cut at half a pixel.
- wait: the share of a training step that is spent waiting for data, in the demo's networks: its
  autoencoder on the composed PNGs, and its smallest U-Net on caches of latents and text states.

The first two run on one core; seconds are of processor time, all threads of the process, which
other programs on the machine do not disturb. Needs the `parity` extra; cache only `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
from PIL import Image

from ldm_scaling.data import cache, shards
from ldm_scaling.data.loading import loader, transforms
from ldm_scaling.data.record import Record


def _photograph(height: int, width: int, seed: int) -> bytes:
    """A JPEG of noise of a photograph's spectrum."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    falling = (np.hypot(fy, fx) + 1 / max(height, width)) ** -1.3
    channels = [
        np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * falling).real
        for _ in range(3)
    ]
    pixels = np.stack([c / c.std() for c in channels], axis=-1)
    pixels = 0.8 * pixels[..., :1] + 0.3 * pixels  # colours go together, as they do
    out = io.BytesIO()
    image = Image.fromarray(np.clip(128 + 55 * pixels, 0, 255).astype(np.uint8))
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _race(ways: dict[str, Callable[[], Iterator[int]]], amounts: dict[str, int], repeats: int):
    """Median items a second of processor time of each way, and their quartiles, interleaved.

    Each starts anew every time, and what it reads ahead and no one takes is its own cost: the
    amounts are far larger.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seen, started = 0, time.process_time()
            with contextlib.closing(way()) as batches:
                while seen < amounts[name]:
                    seen += next(batches)
            if repeat:  # the first warms caches up
                rates[name].append(seen / (time.process_time() - started))
    ours = next(iter(ways))
    for name, found in rates.items():
        low, middle, high = statistics.quantiles(found, n=4)
        ratio = statistics.median(rates[ours]) / middle
        print(f"  {name:28s} {middle:9.1f} /s  quartiles {low:9.1f} to {high:9.1f}  ours / it "
              f"{ratio:7.2f}")


def _lengths(iterator, name: str) -> Iterator[int]:
    with contextlib.closing(iterator):
        for batch in iterator:
            yield len(batch[name])


def _cache(args, folder: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (args.latent, args.latent, 4)
    path = folder / "latents.array_record"
    cache.write(
        path,
        ({name: rng.normal(size=shape).astype(np.float16) for name in ("mean", "logvar")}
         for _ in range(args.records)),
    )
    source = cache.CacheSource(path)
    record = sum(field.size for field in source.fields)
    data_source = grain.sources.ArrayRecordDataSource(os.fspath(path))

    def parse(data: bytes) -> dict[str, np.ndarray]:
        out, start = {}, 0
        for field in source.fields:
            count = int(np.prod(field.shape))
            array = np.frombuffer(data, field.dtype, count, start)
            out[field.name], start = array.reshape(field.shape), start + field.size
        return out

    def plain(options: grain.ReadOptions | None) -> Iterator:
        numbers = grain.MapDataset.range(args.records).shuffle(seed=1).repeat()
        records = numbers.map(lambda i: data_source[i]).map(parse).to_iter_dataset(options)
        return iter(records.batch(args.batch))

    for i in rng.integers(0, args.records, 64).tolist():
        for name, array in parse(data_source[i]).items():
            np.testing.assert_array_equal(source.batch([i])[name][0], array)

    side = 8 * args.latent
    jpegs = [Record(f"k{i}", _photograph(768, 1024, i), ("caption",)) for i in range(32)]
    pairs = transforms.PairSource(_Few(jpegs), side)
    print(f"records of {record} bytes, batches of {args.batch}, one core; JPEGs of 1024 x 768 to "
          f"{side} px")
    none = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ways = {
        "ours": lambda: _lengths(loader.train_loader(source, args.batch, 0), "mean"),
        "ours, without reading ahead": lambda: _lengths(
            loader.train_loader(source, args.batch, 0, threads=0), "mean"),
        "plain grain": lambda: _lengths(plain(None), "mean"),
        "plain grain, without": lambda: _lengths(plain(none), "mean"),
        "JPEGs, ours, without": lambda: _lengths(
            loader.train_loader(pairs, 8, 0, threads=0), "image"),
    }
    _race(ways, {name: 64 if "JPEG" in name else 8 * args.records for name in ways}, args.repeats)


class _Few:
    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def read(self, indices):
        return [self._records[i] for i in indices]


def _resized(image: Image.Image, side: int) -> Image.Image:
    """What torchvision's Resize and CenterCrop do, by Lanczos."""
    image = image.convert("RGB")
    scale = side / min(image.size)
    size = [max(side, round(n * scale)) for n in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (round((n - side) / 2) for n in image.size)
    return image.crop((left, top, left + side, top + side))


def _jpeg(args, folder: Path) -> None:
    import torch
    import webdataset

    torch.set_num_threads(1)
    files = {f"{i:05d}": _photograph(args.height, args.width, i) for i in range(args.images)}
    for key, data in files.items():
        (folder / f"{key}.jpg").write_bytes(data)
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for key, data in files.items():
            for name, content in ((f"{key}.jpg", data), (f"{key}.txt", b"a caption")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    prepared = shards.write(
        folder / "prepared",
        {"train": [Record(key, data, ("a caption",)) for key, data in files.items()]},
    )
    source = transforms.PairSource(prepared.records("train"), args.side)

    class Folder(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            with Image.open(folder / f"{i:05d}.jpg") as image:
                return np.array(_resized(image, args.side)), "a caption"

    def of_torch():
        while True:
            for images, _ in torch.utils.data.DataLoader(Folder(), args.batch, shuffle=True):
                yield len(images)

    def of_webdataset():
        def picture(pair):
            return np.asarray(_resized(pair[0], args.side)), pair[1]

        tar = os.fspath(folder / "pairs.tar")
        pairs = webdataset.WebDataset(tar, shardshuffle=False).shuffle(100).decode("pil")
        pairs = pairs.to_tuple("jpg", "txt").map(picture)
        while True:
            for images, _ in pairs.batched(args.batch):
                yield len(images)

    ours = source.batch(range(min(16, args.images)))["image"]
    for i, image in enumerate(ours):
        error = image.astype(float) - Folder()[i][0]
        psnr = 10 * np.log10(255**2 / max(np.mean(error**2), 1e-9))
        assert psnr > 38, f"picture {i} differs: {psnr:.1f} dB"
    bits = 8 * sum(map(len, files.values())) / (args.images * args.width * args.height)
    print(f"{args.images} JPEGs of {args.width} x {args.height}, {bits:.1f} bits a pixel, to "
          f"{args.side} px, batches of {args.batch}, one core")
    ways = {
        "ours": lambda: _lengths(
            loader.train_loader(source, args.batch, 0, threads=0), "image"),
        "torch DataLoader, Pillow": of_torch,
        "webdataset, Pillow": of_webdataset,
    }
    _race(ways, dict.fromkeys(ways, args.images), args.repeats)


def _wait(args, folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from ldm_scaling.config import parse
    from ldm_scaling.data.composed import builder
    from ldm_scaling.diffusion import loss as loss_lib
    from ldm_scaling.diffusion import schedule as schedule_lib
    from ldm_scaling.models import unet, zoo
    from ldm_scaling.parallel import hosts
    from ldm_scaling.parallel import mesh as mesh_lib
    from ldm_scaling.tasks import autoencoder as autoencoder_task
    from ldm_scaling.training import loop
    from ldm_scaling.training.events import read_curves
    from ldm_scaling.training.task import Task

    hosts.use_cpu_cores()
    sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
    from configs import demo

    config = demo.get_config("")
    for run in (config.autoencoder.train, config.train):
        run.steps, run.log_every = args.steps, max(args.steps // 10, 1)
        run.validate_every = run.sample_every = 0
        run.checkpoint_every = args.steps
    study = parse(config)
    mesh = mesh_lib.make()
    prepared = builder.prepare(
        folder, builder.ComposedSpec(study.data.side, args.records, 64, study.data.seed)
    )
    images = loader.image_source(prepared, "train", ("image",))
    rng = np.random.default_rng(0)
    spec = zoo.get("c8").spec
    shapes = {
        "mean": spec.latent_shape, "logvar": spec.latent_shape,
        "context": (study.data.text_length, 384),
    }  # fmt: skip
    for name in shapes:
        arrays = (rng.normal(size=shapes[name]).astype(np.float16) for _ in range(args.records))
        cache.write(folder / name, ({name: array} for array in arrays))
    caches = loader.zip_sources(*(cache.CacheSource(folder / name) for name in shapes))
    schedule, denoise = schedule_lib.get("sd"), unet.denoise_fn(spec)

    def loss(params, batch, key):
        x = batch["mean"].astype(jnp.float32)
        ctx = batch["context"].astype(jnp.float32)[..., : spec.context_dim]
        each = loss_lib.diffusion_loss(denoise, params, x, {"context": ctx}, key, schedule, "v")
        return jnp.mean(each), {}

    member = Task("c8", lambda key: unet.init(spec, key), lambda batch: batch, loss)
    first = autoencoder_task.make(study.autoencoder, images.batch(range(4))["image"])
    print(f"{hosts.describe()}, {args.steps} steps, {args.workers} worker processes")
    for task, run, source in (
        (first, study.autoencoder.train, images), (member, study.train, caches)
    ):  # fmt: skip
        make = functools.partial(
            loader.train_loader, source, run.batch_size, 0, workers=args.workers
        )
        where = folder / task.name
        started = time.perf_counter()
        loop.fit(task, run, make, where, mesh, 0)
        waits = [value for _, name, value in read_curves(where) if name == "time/data_wait"]
        low, middle, high = statistics.quantiles(waits[1:], n=4)
        print(f"  {task.name:12s} waits {middle:.2%} of a step, quartiles {low:.2%} to {high:.2%}; "
              f"{args.steps / (time.perf_counter() - started):.1f} steps/s, compilation included; "
              f"{jax.device_count()} devices")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["cache", "jpeg", "wait"], required=True)
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    args.batch = args.batch or {"cache": 256, "jpeg": 32, "wait": 64}[args.what]
    if args.what != "wait":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        {"cache": _cache, "jpeg": _jpeg, "wait": _wait}[args.what](args, Path(folder))


if __name__ == "__main__":
    main()
