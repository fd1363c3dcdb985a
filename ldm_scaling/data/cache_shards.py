"""Writing a cache as a folder of shards: it goes on where it was stopped, on one host or several.

Shard k of n is `shard-0000k-of-0000n.array_record`, renamed into place when it is whole. What a
shard holds depends on its place alone, so an interrupted run ends with the bytes of an unbroken
one. The manifest comes last: a folder without it is not finished.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.data import cache
from ldm_scaling.errors import UserError

# JSON values by name: lists of numbers, or numbers.
Statistics = dict[str, Any]


def names(count: int, shard_size: int) -> list[str]:
    """The files of a cache of `count` records."""
    total = -(-count // shard_size)
    return [f"shard-{k:05d}-of-{total:05d}.array_record" for k in range(total)]


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> Statistics:
    """Statistics of two sets of records together: where a name starts with `min` or `max` the
    smaller or larger of both, elsewhere their sum. An empty one is neutral.
    """
    if not a or not b:
        return dict(a or b)
    if a.keys() != b.keys():
        raise ValueError(f"statistics of {sorted(a)} do not merge with those of {sorted(b)}")
    out = {}
    for name in a:
        merged = {"min": np.minimum, "max": np.maximum}.get(name[:3], np.add)
        out[name] = merged(np.asarray(a[name]), np.asarray(b[name])).tolist()
    return out


def write_shards(
    folder: epath.PathLike,
    count: int,
    shard_size: int,
    make: Callable[[int, int], Iterable[Mapping[str, np.ndarray]]],
    meta: Mapping[str, Any],
    hash: str,
    *,
    statistics: Callable[[Mapping[str, np.ndarray]], Statistics] | None = None,
    compress: bool = False,
    what: str = "",
    unit: str = "record",
    process_index: int = 0,
    process_count: int = 1,
    patience_s: float = 1800.0,
) -> cache.CacheSource:
    """Writes what is missing of a cache and opens it; a whole one is only opened.

    Several processes write one folder: each makes every `process_count`-th shard, process 0 adds
    the manifest when all are there, and all return when that is.

    Args:
      folder: to make or to go on with, on a file system that all processes share.
      count: records.
      shard_size: records of a shard; the last one has what is left.
      make: `make(start, stop)` gives records start..stop-1 as batches, dicts of stacked arrays, the
        same in every run.
      meta: plain JSON, given back by `CacheSource.meta` together with the hash.
      hash: of all that decides the records.
      statistics: of a batch, see `merge`; those of all records are `CacheSource.statistics`.
      compress: see `cache.write`.
      what, unit: of the progress bar; none is shown without `what`.
      process_index, process_count: which of how many processes this is.
      patience_s: seconds without a new shard after which the others are taken for dead.

    Raises:
      UserError: the folder holds shards of something else, cannot be written, or the other
        processes stay away.
      ValueError: sizes that are not positive, or batches that do not make up the records asked for.
    """
    if count < 1 or shard_size < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"{count} records in shards of {shard_size} by process {process_index} of "
            f"{process_count}"
        )
    folder = epath.Path(folder)
    paths = [folder / name for name in names(count, shard_size)]
    manifest = folder / cache.MANIFEST
    if manifest.exists():
        found = _open(folder, hash, count)
        if all(map(os.path.exists, found.paths)):
            return found
    _check_strangers(folder, paths)
    spans = [(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    own = range(process_index, len(paths), process_count)
    missing = [k for k in own if _present(paths[k], hash, *spans[k]) is None]
    total = sum(spans[k][1] - spans[k][0] for k in own)
    before = total - sum(spans[k][1] - spans[k][0] for k in missing)
    shown = bool(what and missing)
    bar = files.progress(total, what, unit, before) if shown else contextlib.nullcontext()
    with bar:
        for k in missing:
            advance = bar.update if shown else lambda n: None
            _write_shard(
                paths[k], make, *spans[k], hash, statistics or (lambda batch: {}), compress,
                advance,
            )
    if process_index == 0:
        _wait(lambda: all(path.exists() for path in paths), paths, patience_s)
        _finish(folder, paths, spans, meta, hash)
    else:
        whole = [*paths, manifest]
        _wait(lambda: all(path.exists() for path in whole), whole, patience_s)
    return _open(folder, hash, count)


def _open(folder: epath.Path, hash: str, count: int) -> cache.CacheSource:
    source = cache.CacheSource(folder, hash)
    if len(source) != count:
        raise UserError(
            f"the cache {folder} has {len(source)} records instead of {count}: remove it, and it "
            "is made anew"
        )
    return source


def _write_shard(path, make, start, stop, hash, statistics, compress, advance) -> None:
    note = {"meta": {"hash": hash, "start": start, "stop": stop}, "statistics": {}}

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        have = 0
        for batch in make(start, stop):
            n = len(next(iter(batch.values())))
            have += n
            note["statistics"] = merge(note["statistics"], statistics(batch))
            yield batch
            advance(n)
        if have != stop - start:
            raise ValueError(f"records {start}..{stop - 1} were asked for, {have} were made")

    cache.write_file(path, batches(), note, compress)


def _present(path: epath.Path, hash: str, start: int, stop: int) -> cache.CacheFile | None:
    """A shard, if it is there. Raises `UserError` where it is another's, or damaged."""
    if not path.exists():
        return None
    file = cache.CacheFile(path)
    meta = file.note["meta"]
    if meta != {"hash": hash, "start": start, "stop": stop}:
        raise UserError(
            f"{path} was made from something else (hash {meta.get('hash')}, records "
            f"{meta.get('start')}..; not {hash}, {start}..): remove the folder {path.parent}, and "
            "it is made anew"
        )
    return file


def _check_strangers(folder: epath.Path, paths: list[epath.Path]) -> None:
    known = {path.name for path in paths}
    found = folder.glob("shard-*.array_record") if folder.is_dir() else []
    if strangers := sorted(path.name for path in found if path.name not in known):
        raise UserError(
            f"{folder} holds {strangers[0]}, which is none of the {len(paths)} shards to be made: "
            "remove the folder, or choose another"
        )


def _wait(done: Callable[[], bool], paths: list[epath.Path], patience_s: float) -> None:
    """Waits for what other processes write."""
    missing, since = None, time.monotonic()
    while not done():
        now = [path for path in paths if not path.exists()]
        if now != missing:
            missing, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise UserError(
                f"{missing[0]} and {len(missing) - 1} more files were not made by the other "
                f"processes within {patience_s:.0f} s: start all of them again, or one that makes "
                "all"
            )
        time.sleep(min(0.2, patience_s))


def _finish(folder: epath.Path, paths, spans, meta, hash) -> None:
    counts, statistics, fields = {}, [], None
    for path, span in zip(paths, spans, strict=True):
        file = _present(path, hash, *span)
        fields = fields or file.fields
        if file.fields != fields:
            raise UserError(
                f"{path} holds {file.fields}, but {paths[0].name} {fields}: remove the folder "
                f"{folder}, and it is made anew"
            )
        counts[path.name] = file.count
        statistics.append(file.note["statistics"])
        schema = file.note["schema"]
    manifest = {
        "format": cache.MANIFEST_FORMAT,
        "count": sum(counts.values()),
        "schema": schema,
        "meta": {**meta, "hash": hash},
        "statistics": functools.reduce(merge, statistics, {}),
        "shards": counts,
    }
    files.write_json(folder / cache.MANIFEST, manifest)
    # Another study may be writing the same shards.
    files.remove_leftovers(folder.glob(".tmp-*-shard-*"))
