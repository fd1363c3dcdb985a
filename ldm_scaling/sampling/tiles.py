"""Pictures larger than a network's own size: overlapping tiles, blended by smooth weights.

At each call of the network the tiles' outputs are averaged, so that all sampler steps are taken on
one canvas (MultiDiffusion, arXiv 2302.08113), by Gaussian weights, so that no tile's border shows
(Mixture of Diffusers, arXiv 2302.02412; StableSR, arXiv 2305.07015).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.guidance import Denoise

# Of the weights along a side of length 1, as both papers' code has it.
VARIANCE = 0.01
# What of the conditioning lies on the canvas and is cut; the rest is the same for all tiles.
ON_CANVAS = ("condition",)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size that cover a canvas, as evenly spaced as whole numbers allow.

    Attributes:
      canvas: (height, width).
      tile: (height, width), no larger.
      overlap: of neighbours, at least.
    Raises:
      UserError: for a canvas smaller than a tile, or an overlap that is not below a tile.
    """

    canvas: tuple[int, int]
    tile: tuple[int, int]
    overlap: int

    def __post_init__(self):
        for extent, side in zip(self.canvas, self.tile):
            if not 1 <= side <= extent:
                raise UserError(
                    f"a canvas of {self.canvas[0]}x{self.canvas[1]} is smaller than a tile of "
                    f"{self.tile[0]}x{self.tile[1]}: give a larger picture"
                )
            if not 0 <= self.overlap < side and side < extent:
                raise UserError(
                    f"tiles of {side} cannot overlap by {self.overlap}: give 0 to {side - 1}"
                )

    def __len__(self) -> int:
        return len(self.corners)

    @functools.cached_property
    def corners(self) -> np.ndarray:
        """(top, left) of each tile, int32 (T, 2), row by row."""
        tops, lefts = (
            _starts(extent, side, self.overlap) for extent, side in zip(self.canvas, self.tile)
        )
        return np.array([(top, left) for top in tops for left in lefts], np.int32)

    def weights(self, times: int = 1) -> np.ndarray:
        """Of a tile's pixels, float32 (H, W, 1), on a canvas so many times larger."""
        return _weights(*(times * side for side in self.tile))

    def total(self, times: int = 1) -> np.ndarray:
        """The weights of all tiles added up, float32 (H, W, 1): above 0 everywhere."""
        total_HW1 = np.zeros((*(times * extent for extent in self.canvas), 1))
        weights_HW1 = self.weights(times).astype(np.float64)
        for place in self.slices(times):
            total_HW1[place] += weights_HW1
        return total_HW1.astype(np.float32)

    def slices(self, times: int = 1) -> list[tuple[slice, slice]]:
        """Where each tile lies on a canvas so many times larger."""
        height, width = (times * side for side in self.tile)
        return [
            (slice(times * y, times * y + height), slice(times * x, times * x + width))
            for y, x in self.corners
        ]


def _starts(extent: int, side: int, overlap: int) -> list[int]:
    if extent == side:
        return [0]
    count = 1 + -(-(extent - side) // (side - overlap))
    return [round(i * (extent - side) / (count - 1)) for i in range(count)]


def _weights(height: int, width: int) -> np.ndarray:
    y, x = (
        np.exp(-(((np.arange(n) - (n - 1) / 2) / n) ** 2) / (2 * VARIANCE)) for n in (height, width)
    )
    return (y[:, None] * x)[..., None].astype(np.float32)


def tiled(denoise: Denoise, tiles: Tiles, batch: int) -> Denoise:
    """A network as one of the canvas: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC` of any
    sampler. With a single tile it is the network itself.

    Args:
      denoise: of tiles. Of cond, what `ON_CANVAS` names is cut with x; all else each tile sees.
      tiles: of the canvas.
      batch: tiles that the network is given at a time, which bounds its memory.
    """
    if len(tiles) == 1:
        return denoise
    corners_T2, (height, width) = jnp.asarray(tiles.corners), tiles.tile
    weights_HW1, total_HW1 = jnp.asarray(tiles.weights()), jnp.asarray(tiles.total())

    def cut(x_BHWC: Array) -> Array:
        """(T B, h, w, C)."""

        def one(corner: Array) -> Array:
            sizes = (len(x_BHWC), height, width, x_BHWC.shape[3])
            return lax.dynamic_slice(x_BHWC, (0, *corner, 0), sizes)

        return lax.map(one, corners_T2).reshape(-1, height, width, x_BHWC.shape[3])

    def repeated(x: Array) -> Array:
        return jnp.tile(x, (len(tiles), *(1,) * (x.ndim - 1)))

    def run(params: Any, x_BHWC: Array, t_B: Array, cond: Mapping[str, Any]) -> Array:
        several = {
            name: jax.tree.map(cut if name in ON_CANVAS else repeated, leaf)
            for name, leaf in cond.items()
        }
        given = cut(x_BHWC), repeated(t_B), several
        rows = len(tiles) * len(x_BHWC)
        groups, size = -(-rows // batch), min(batch, rows)
        order = np.arange(groups * size) % rows  # The last group is filled up.

        def group(index: Array) -> Array:
            x, t, seen = jax.tree.map(lambda leaf: leaf[index], given)
            return denoise(params, x, t, seen).astype(jnp.float32)

        out = lax.map(group, jnp.asarray(order.reshape(groups, size)))
        out_TBHWC = out.reshape(-1, *out.shape[2:])[:rows].reshape(
            len(tiles), len(x_BHWC), *out.shape[2:]
        )

        def add(canvas_BHWC: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
            (y, x), F_BHWC = tile
            here = lax.dynamic_slice(canvas_BHWC, (0, y, x, 0), F_BHWC.shape)
            here = here + weights_HW1 * F_BHWC
            return lax.dynamic_update_slice(canvas_BHWC, here, (0, y, x, 0)), None

        empty = jnp.zeros((*x_BHWC.shape[:3], out.shape[-1]), jnp.float32)
        canvas_BHWC, _ = lax.scan(add, empty, (corners_T2, out_TBHWC))
        return canvas_BHWC / total_HW1

    return run


def blended(
    function: Callable[[np.ndarray], Any], x_HWC: np.ndarray, tiles: Tiles, batch: int,
    inner: int = 1, outer: int = 1, on_tiles: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """float32 (outer H, outer W, C') of an array on the host, tile by tile: memory on the device is
    that of a batch of tiles. With a single tile it is the function's own value.

    Args:
      function: tiles (batch, inner h, inner w, C) to (batch, outer h, outer w, C'); the last batch
        is filled up.
      x_HWC: (inner H, inner W, C), of a canvas of (H, W).
      tiles: of the canvas.
      batch: tiles at a time.
      inner, outer: pixels of what goes in and of what comes out, for each of the canvas.
      on_tiles: told how many are done, for a progress bar.
    """
    taken, put = tiles.slices(inner), tiles.slices(outer)
    weights_HW1, canvas_HWC = tiles.weights(outer), None
    for start in range(0, len(tiles), batch):
        some = [min(start + i, len(tiles) - 1) for i in range(batch)]
        out_BHWC = np.asarray(function(np.stack([x_HWC[taken[i]] for i in some])), np.float32)
        if len(tiles) == 1:
            on_tiles(1)
            return out_BHWC[0]
        if canvas_HWC is None:
            shape = (outer * tiles.canvas[0], outer * tiles.canvas[1], out_BHWC.shape[3])
            canvas_HWC = np.zeros(shape, np.float32)
        count = min(batch, len(tiles) - start)
        for i, out_HWC in zip(some[:count], out_BHWC):
            canvas_HWC[put[i]] += weights_HW1 * out_HWC
        on_tiles(count)
    return canvas_HWC / tiles.total(outer)
