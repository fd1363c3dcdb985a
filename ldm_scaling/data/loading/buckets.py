"""Multi-aspect bucketing: sizes of about the same area, and which of them a picture goes to.

As NovelAI described (2022, "NovelAI improvements on Stable Diffusion", aspect ratio bucketing) and
SDXL does (Podell et al. 2023, section 2.3 and appendix I): a batch holds pictures of one size.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes; make them with `table`.

    Attributes:
      sizes: (height, width) of each, the widest last.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not self.sizes or min(min(size) for size in self.sizes) < 1:
            raise ValueError(f"buckets of {self.sizes} pixels")
        if sorted(set(self.sizes), key=_log_aspect) != list(self.sizes):
            raise ValueError(f"buckets must differ and be ordered by aspect: {self.sizes}")

    def assign(self, sizes_N2: np.ndarray, at_least: int = 1) -> np.ndarray:
        """The bucket of each picture: the one of the nearest logarithm of width / height.

        A bucket of fewer pictures than `at_least` is closed, the smallest first, and its pictures
        go to the nearest of the others: with the size of a batch, every picture is seen as often as
        any other, and none twice in a batch.

        Args:
          sizes_N2: (width, height) of each picture, as the shards' index has them.
          at_least: pictures in a bucket.
        Returns:
          Whole numbers, (N,); of two buckets as near as each other the taller.
        Raises:
          UserError: fewer pictures than `at_least`.
        """
        sizes_N2 = np.asarray(sizes_N2, np.float64).reshape(-1, 2)
        if len(sizes_N2) < at_least:
            raise UserError(
                f"{len(sizes_N2)} pictures do not fill a batch of {at_least}: make the batch "
                "smaller or the data set larger"
            )
        if (sizes_N2 < 1).any():
            row = int(np.argmax((sizes_N2 < 1).any(axis=1)))
            raise ValueError(f"picture {row} is of {sizes_N2[row].astype(int).tolist()} pixels")
        logs_N = np.log(sizes_N2[:, 0]) - np.log(sizes_N2[:, 1])
        open_K = list(range(len(self.sizes)))
        logs_K = np.array([_log_aspect(size) for size in self.sizes])
        while True:
            # Between two neighbours the border is the mean of their logarithms.
            borders = (logs_K[open_K][1:] + logs_K[open_K][:-1]) / 2
            found_N = np.array(open_K)[np.searchsorted(borders, logs_N, side="left")]
            filled_K = np.bincount(found_N, minlength=len(self.sizes))[open_K]
            short = [(n, bucket) for n, bucket in zip(filled_K, open_K) if 0 < n < at_least]
            if not short:
                return found_N.astype(np.int16)
            # Empty ones too, or pictures could move into one and leave it short again.
            empty = {bucket for n, bucket in zip(filled_K, open_K) if not n}
            open_K = [b for b in open_K if b != min(short)[1] and b not in empty]


def table(side: int, step: int = 64, max_aspect: float = 2.0) -> Buckets:
    """Sizes of at most `side`^2 pixels, sides multiples of `step`, aspects to `max_aspect`.

    For every height the widest width that keeps the area, and the transposed of these; so the
    square is among them, and a size of n latents costs a network no more than the square.

    Args:
      side: of the square, a multiple of `step`.
      step: in pixels; the autoencoder's downsampling times the network's.
      max_aspect: the longer side over the shorter.
    Raises:
      UserError: naming the value.
    """
    if step < 1 or side < step or side % step:
        raise UserError(f"buckets: a side of {side} pixels is no multiple of the step {step}")
    if not (math.isfinite(max_aspect) and max_aspect >= 1):
        raise UserError(f"buckets: the largest aspect is {max_aspect}; it must be at least 1")
    tall = set()
    for width in range(step, side + 1, step):
        height = side * side // width // step * step
        if height <= max_aspect * width:
            tall.add((height, width))
    sizes = tall | {(width, height) for height, width in tall}
    return Buckets(tuple(sorted(sizes, key=_log_aspect)))


def _log_aspect(size: tuple[int, int]) -> float:
    height, width = size
    return math.log(width / height)
