"""What is found out of every pair of a collection: one row each, in a parquet file for each part.

Columns: `pair` (its number within the part), `tile` (top and left in pixels as "#y_x", else empty),
`key` (with the tile), `group`, `error` (why it cannot be used), `bytes` (of its file), `width` and
`height` (as it decodes, or of the tile; 0 where the photograph is smaller than one),
`source_width` and `source_height` (of the photograph), `plain` (whether its bytes may be stored as
they are), `captions` (texts), `aesthetic`, `watermark`, `pixels` (hash of the
decoded pixels), `perceptual` (64-bit pHash).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling import files
from ldm_scaling.data.collection import Collection, Pair, Part
from ldm_scaling.data.preparing import stored
from ldm_scaling.errors import MissingPackageError, UserError

_TYPES = {
    "pair": "int32", "tile": "string", "key": "string", "group": "string", "error": "string",
    "bytes": "int64", "width": "int32", "height": "int32", "source_width": "int32",
    "source_height": "int32", "plain": "bool", "captions": "list", "aesthetic": "float32",
    "watermark": "float32", "pixels": "string", "perceptual": "uint64",
}  # fmt: skip
_AHEAD = 4  # pairs in flight for each thread


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """The rows of a part; `facts[column]` is a numpy array.

    Attributes:
      table: the pyarrow table.
      broken: why the part cannot be read to its end; empty where it can.
    """

    table: Any
    broken: str = ""

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns(column)

    def caption_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Length of every caption, and the number of the row that it belongs to."""
        import pyarrow.compute as pc

        column = self.table["captions"].combine_chunks()
        counts = column.value_lengths().to_numpy(zero_copy_only=False)
        owner = np.repeat(np.arange(len(self)), counts)
        lengths = pc.utf8_length(column.flatten())
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64), owner

    def captions(self, rows: np.ndarray) -> list[list[str]]:
        """The captions of each of some rows."""
        return self.table["captions"].take(rows).to_pylist()

    @functools.cached_property
    def _columns(self):
        return functools.cache(lambda name: self.table[name].to_numpy())


def check_packages(perceptual: bool) -> None:
    """Raises `MissingPackageError` for what is not installed; before any work, and workers."""
    needed = [("pyarrow", "pyarrow", "preparing collections")]
    needed += [("imagehash", "ImageHash", "perceptual duplicates")] if perceptual else []
    for module, package, what in needed:
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise MissingPackageError(package, what, extra="data") from e


def scan(
    collection: Collection, part: Part, tile: int | None, perceptual: bool, threads: int = 1
) -> Facts:
    """Reads a part and decodes every image of it whole.

    Args:
      collection: what the part is of.
      part: which.
      tile: side in pixels of the tiles that images are cut into, or None.
      perceptual: whether perceptual hashes are wanted.
      threads: that decode.
    """
    columns: dict[str, list] = {name: [] for name in _TYPES}
    broken = ""
    examine = functools.partial(_rows, tile=tile, perceptual=perceptual)
    pairs = iter_pairs(collection, part)
    try:
        for rows in in_order(examine, enumerate(pairs), threads):
            for row in rows:
                for name, value in row.items():
                    columns[name].append(value)
    except MissingPackageError as e:
        raise UserError(str(e)) from e  # of one argument: it may come from another process
    except UserError as e:  # of the part
        broken = str(e)
    if broken:  # a part is there or not: where it breaks off may differ between two readings
        columns = {name: [] for name in _TYPES}
    return Facts(as_table(columns), broken)


def iter_pairs(collection: Collection, part: Part) -> Iterator[Pair]:
    """The pairs of a part; what its files do to a reader is a `UserError` that names it."""
    pairs = collection.read(part)
    try:
        yield from pairs
    except OSError as e:
        raise UserError(f"cannot read {part.name}: {e.strerror or e}") from e


def save(facts: Facts, path: epath.PathLike) -> None:
    """Writes the facts as parquet by atomic rename."""
    import pyarrow.parquet as pq

    table = facts.table.replace_schema_metadata({"broken": facts.broken})
    with files.atomic_path(path) as temporary:
        pq.write_table(table, os.fspath(temporary), compression="zstd")


def load(path: epath.PathLike) -> Facts:
    """What `save` wrote. Raises `UserError` when the file is damaged."""
    with _saved(path) as pq:
        table = pq.read_table(os.fspath(path), partitioning=None)
        return Facts(table.replace_schema_metadata(None), _broken(table.schema))


def why_broken(path: epath.PathLike) -> str:
    """`Facts.broken` of saved facts, of which no more is read. Raises as `load`."""
    with _saved(path) as pq:
        return _broken(pq.read_schema(os.fspath(path)))


def _broken(schema: Any) -> str:
    return schema.metadata[b"broken"].decode()


@contextlib.contextmanager
def _saved(path: epath.PathLike) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield pq
    except (OSError, pa.ArrowException, KeyError, TypeError) as e:
        raise UserError(f"{os.fspath(path)} is damaged: remove it, and run again") from e


def tiles(width: int, height: int, side: int) -> list[tuple[int, int]]:
    """Top and left of the tiles that fit, side by side from the upper left corner."""
    return [(y * side, x * side) for y in range(height // side) for x in range(width // side)]


def perceptual_hash(image_HWC: np.ndarray) -> int:
    """The 64 bits of imagehash's `phash`, the first the highest."""
    import imagehash

    bits = imagehash.phash(Image.fromarray(image_HWC)).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def pixel_hash(image_HWC: np.ndarray) -> str:
    """Hash of the decoded pixels and the size."""
    digest = hashlib.sha256(np.array(image_HWC.shape, np.int64).tobytes())
    digest.update(np.ascontiguousarray(image_HWC))
    return digest.hexdigest()[:32]


def _rows(item: tuple[int, Pair], tile: int | None, perceptual: bool) -> list[dict[str, Any]]:
    """The row of a pair, or those of its tiles."""
    number, pair = item
    row = {
        "pair": number, "tile": "", "key": _printable(pair.key),
        "group": _printable(pair.group or pair.key), "error": pair.error or _wrong_text(pair),
        "bytes": len(pair.image), "width": 0, "height": 0, "source_width": 0, "source_height": 0,
        "plain": False, "captions": [_printable(caption) for caption in pair.captions],
        "aesthetic": pair.score("aesthetic"), "watermark": pair.score("watermark"),
        "pixels": "", "perceptual": 0,
    }  # fmt: skip
    if row["error"]:
        return [row]
    try:
        decoded = stored.decode(pair.image)
    except stored.BrokenImage as e:
        return [{**row, "error": str(e)}]
    height, width = decoded.image_HWC.shape[:2]
    row.update(source_width=width, source_height=height)
    if tile is None:
        return [{**row, "plain": decoded.plain, **_picture(decoded.image_HWC, perceptual)}]
    return [
        {
            **row, "tile": f"#{y}_{x}", "key": f"{pair.key}#{y}_{x}",
            **_picture(decoded.image_HWC[y : y + tile, x : x + tile], perceptual),
        }
        for y, x in tiles(width, height, tile)
    ] or [row]  # fmt: skip


def _picture(image_HWC: np.ndarray, perceptual: bool) -> dict[str, Any]:
    return {
        "height": image_HWC.shape[0],
        "width": image_HWC.shape[1],
        "pixels": pixel_hash(image_HWC),
        "perceptual": perceptual_hash(image_HWC) if perceptual else 0,
    }


def _wrong_text(pair: Pair) -> str:
    """What is wrong with its texts: half a surrogate pair, as in JSON or a file's odd name."""
    for what, text in (("key", pair.key), ("group", pair.group), *(
        ("caption", caption) for caption in pair.captions
    )):  # fmt: skip
        if _printable(text) != text:
            return f"its {what} {_printable(text)[:60]!r} is no valid Unicode"
    return "" if pair.key else "it has no key"


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def in_order(function, items: Iterator, threads: int) -> Iterator:
    """Map over items by threads, in order, without reading far ahead."""
    if threads <= 1:
        yield from map(function, items)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        queue = [pool.submit(function, x) for x in itertools.islice(items, _AHEAD * threads)]
        while queue:
            result = queue.pop(0).result()
            queue += [pool.submit(function, x) for x in itertools.islice(items, 1)]
            yield result


def as_table(columns: dict[str, list]) -> Any:
    """The columns as a pyarrow table of the types that facts have."""
    import pyarrow as pa

    types = {"list": pa.list_(pa.string()), "bool": pa.bool_(), "string": pa.string()}
    schema = pa.schema(
        [(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in _TYPES.items()]
    )
    return pa.table(columns, schema=schema)
