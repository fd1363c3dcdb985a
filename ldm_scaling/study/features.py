"""Features of sets of images and of captions, kept on disk: what is there is not worked out again.

They are kept under the hash of the images' bytes and order and that of the network, in shards that
are renamed into place: a run that is killed goes on, a second one only reads.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.data import image_folder
from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.metrics import reference, shards

# Pixels that two chunks of images, the one at work and the one being read, may hold in memory for
# each device.
_PIXELS = 2**27


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images as they are scored.

    Attributes:
      folder: the images.
      side: they are brought to side x side by `image_folder.SQUARE`; None leaves them as they are.
    """

    folder: ImageFolder
    side: int | None = None

    def __len__(self) -> int:
        return len(self.folder)

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 [H, W, 3]."""
        image = self.folder.read(i)
        return image if self.side is None else image_folder.square(image, self.side)

    @property
    def resolution(self) -> int:
        """Side in pixels that all images are brought to, 0 where each keeps its size."""
        return self.side or 0

    def remember(self, cache: epath.PathLike) -> None:
        """Hashes the files, those that the cache does not know yet; see `image_folder.remember`."""
        name = sha256_of(str(self.folder.root.resolve()))
        image_folder.remember(self.folder, epath.Path(cache) / "files" / f"{name}.json")

    @functools.cached_property
    def key(self) -> str:
        """Hash of what is seen of the images, and of their order."""
        transform = [self.side, image_folder.SQUARE] if self.side else []
        return sha256_of([self.folder.hashes, *transform])

    @functools.cached_property
    def list_hash(self) -> str:
        """Hash of the images' bytes, whatever their names and order."""
        return reference.list_hash(self.folder.hashes)

    @property
    def pixels(self) -> int:
        """Pixels of the largest image as it is scored."""
        return self.side**2 if self.side else max(w * h for w, h in self.folder.sizes)

    @property
    def order(self) -> list[Any] | None:
        """What to sort the images by, so that those of one size follow each other; None where all
        are of one size.
        """
        return None if self.side else self.folder.sizes

    def describe_sizes(self) -> str:
        """The sizes on disk, e.g. `512x512` or `70x90 to 640x480 (31 sizes)`."""
        sizes = sorted({*self.folder.sizes}, key=lambda size: (size[0] * size[1], size))
        first, last = (f"{w}x{h}" for w, h in (sizes[0], sizes[-1]))
        return first if len(sizes) == 1 else f"{first} to {last} ({len(sizes)} sizes)"


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Images of two sets, one by one: what a distance between two images is taken of."""

    first: ImageSet
    second: ImageSet

    def __len__(self) -> int:
        return len(self.first)

    def read(self, i: int) -> np.ndarray:
        """Pair i, uint8 [2, H, W, 3]. Raises `UserError` where the two are of different sizes."""
        a, b = self.first.read(i), self.second.read(i)
        if a.shape != b.shape:
            raise UserError(
                f"{self.first.folder.path(i)} is {a.shape[1]}x{a.shape[0]} and "
                f"{self.second.folder.path(i)} {b.shape[1]}x{b.shape[0]}: a distance between two "
                "images needs one size, --side=N brings all to it"
            )
        return np.stack([a, b])

    @property
    def key(self) -> str:
        """Hash of what is seen of both."""
        return sha256_of([self.first.key, self.second.key])

    @property
    def pixels(self) -> int:
        """Pixels of the largest pair."""
        return self.first.pixels + self.second.pixels

    @property
    def order(self) -> list[Any] | None:
        """See `ImageSet.order`."""
        return self.first.order


@dataclasses.dataclass(frozen=True)
class CaptionedSet:
    """Images with their captions: what a network that sees both is run on."""

    images: ImageSet
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> tuple[np.ndarray, str]:
        """Image i, uint8 [H, W, 3], and its caption."""
        return self.images.read(i), self.captions[i]

    @property
    def key(self) -> str:
        """Hash of what is seen of both."""
        return sha256_of([self.images.key, self.captions])

    @property
    def pixels(self) -> int:
        """See `ImageSet.pixels`."""
        return self.images.pixels

    @property
    def order(self) -> list[Any] | None:
        """See `ImageSet.order`."""
        return self.images.order


def resumed(
    folder: epath.PathLike, hashes: Mapping[str, str], count: int, what: str,
    chunks: Callable[[np.ndarray], Iterator[tuple[Sequence[int], Any]]],
    compute: Callable[[Any], Mapping[str, np.ndarray]], unit: str = "image",
) -> dict[str, np.ndarray]:
    """Features (count, D) of each layer, from disk as far as they are there.

    Args:
      folder: of these images or captions.
      hashes: layer to the hash of what makes it; a layer's shards lie in a folder of that name.
      count: of images or captions.
      what: for the progress bar.
      chunks: the numbers that are missing to pieces of them, with what `compute` takes.
      compute: to layer -> features of a piece.
      unit: of the progress bar.
    Raises:
      UserError: for a shard that is damaged or cannot be written.
    """
    folder = epath.Path(folder)
    done = [shards.done(folder / hash, hash) for hash in hashes.values()]
    have = functools.reduce(np.intersect1d, done)
    missing = np.setdiff1d(np.arange(count), have)
    if len(missing):
        with files.progress(count, what, unit, initial=count - len(missing)) as bar:
            for index, inputs in chunks(missing):
                values = compute(inputs)
                for layer, hash in hashes.items():
                    shards.write(folder / hash, np.asarray(index), values[layer], hash)
                bar.update(len(index))
    return {layer: shards.merge(folder / hash, hash, count) for layer, hash in hashes.items()}


def of_images(
    images: ImageSet | PairSet | CaptionedSet, run: Callable[[list[Any]], Mapping[str, np.ndarray]],
    hashes: Mapping[str, str], cache: epath.PathLike, what: str,
) -> dict[str, np.ndarray]:
    """Features (N, D) of each layer in `hashes`, in the images' order; see `resumed`.

    Images of one size follow each other, for networks compile once for each size.
    """

    def chunks(missing: np.ndarray) -> Iterator[tuple[Sequence[int], Any]]:
        order, by = missing.tolist(), images.order
        if by:
            order.sort(key=by.__getitem__)
        yield from _read_ahead(images.read, pieces(order, images.pixels))

    folder = epath.Path(cache) / images.key
    return resumed(folder, hashes, len(images), what, chunks, run)


def of_texts(
    texts: Sequence[str], encode: Callable[[list[str]], np.ndarray], hash: str,
    cache: epath.PathLike, what: str,
) -> np.ndarray:
    """`encode`'s embeddings (N, E) of texts, in their order; see `resumed`."""

    def chunks(missing: np.ndarray) -> Iterator[tuple[Sequence[int], Any]]:
        for index in pieces(missing.tolist(), 1):
            yield index, [texts[i] for i in index]

    folder = epath.Path(cache) / sha256_of(list(texts))
    return resumed(
        folder, {"text": hash}, len(texts), what, chunks, lambda some: {"text": encode(some)},
        "caption",
    )["text"]


def pieces(order: list[int], pixels: int) -> list[list[int]]:
    """Parts of a list of images, few enough to be held in memory and lost to a killed run, and
    enough to fill every accelerator's batch.
    """
    cpu = jax.default_backend() == "cpu"
    most, devices = (64, 1) if cpu else (512 * jax.local_device_count(), jax.local_device_count())
    size = max(1, min(most, devices * _PIXELS // (2 * pixels)))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _read_ahead(
    read: Callable[[int], Any], parts: list[list[int]]
) -> Iterator[tuple[list[int], list[Any]]]:
    """Each part with what is read of it, while the next one is being read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(read, i) for i in parts[0]]
        for part, after in zip(parts, [*parts[1:], []]):
            following = [pool.submit(read, i) for i in after]
            yield part, [future.result() for future in waiting]
            waiting = following
