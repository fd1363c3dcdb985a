"""A config's data sets: composed, or collections that are prepared into shards."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.config import SHARDS, Data, Prepare
from ldm_scaling.data import shards, sources
from ldm_scaling.data.composed import builder
from ldm_scaling.data.preparing import prepare
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study.datasets import Collected, Composed, Dataset

log = logging.getLogger(__name__)


def _is_shards(source: str) -> bool:
    return source.startswith(f"{SHARDS}:")


def _shards_folder(source: str) -> epath.Path:
    place = source.partition(":")[2]
    files.on_disk(source, place)
    return epath.Path(place).expanduser()


def resolved(data: Data, root: epath.PathLike) -> Data:
    """The settings with the hash of prepared shards, where all sources are such.

    Warns of a collection whose files are no longer those that it was prepared of.

    Args:
      data: the settings.
      root: where collections are prepared; those that are need no longer be there themselves.
    Raises:
      UserError: for shards that are missing or damaged, or of another hash than is wanted, and for
        a collection that is not there, or that `root` lies in.
    """
    if data.composed:
        return data
    raw = [source for source in data.sources if not _is_shards(source)]
    for source in raw:
        folder = folder_of(data, source, root)
        if not _prepared(folder):
            prepare.check_outside(sources.collection(source, source_options(data)), folder)
        elif hosts.is_lead() and (changed := _changed(data, source, folder, _MOST_COMPARED)):
            log.warning("%s", changed)
    if raw and data.hash:
        raise UserError(
            f"config: data.hash={data.hash!r} is of prepared shards, but data.source="
            f"{data.source!r} is prepared by this study: leave out the hash"
        )
    if raw:
        return data
    found = [shards.open(_shards_folder(source)).hash for source in data.sources]
    have = found[0] if len(found) == 1 else files.sha256_of(found)
    if data.hash not in ("", have):
        raise UserError(
            f"the shards {data.source} have the hash {have}, but the config wants those of "
            f"{data.hash}: restore them, or leave out data.hash and choose another --workdir"
        )
    return dataclasses.replace(data, hash=have)


def _prepared(folder: epath.Path) -> bool:
    return (folder / shards.MANIFEST).exists()


def source_options(data: Data) -> sources.Options:
    """How the files of a collection are read."""
    p = data.prepare
    columns = {"aesthetic": p.aesthetic_column, "watermark": p.watermark_column}
    return sources.Options(
        caption_columns=p.caption_columns, caption_encoding=p.caption_encoding,
        score_columns={k: v for k, v in columns.items() if v}, captions=p.captions,
    )


def prepare_options(data: Data) -> prepare.Options:
    """How a collection becomes shards."""
    p = data.prepare
    return prepare.Options(
        filters=prepare.Filters(
            min_side=(data.side if p.min_side == -1 else p.min_side) or None,
            max_aspect=p.max_aspect or None,
            max_pixels=p.max_pixels or None,
            min_caption=p.min_caption,
            max_caption=p.max_caption or None,
            captions=p.captions,
            min_aesthetic=p.min_aesthetic or None,
            max_watermark=None if p.max_watermark >= 1 else p.max_watermark,
        ),
        duplicates=prepare.Duplicates(p.exact, None if p.perceptual < 0 else p.perceptual),
        validation_share=p.validation_share,
        salt=str(data.seed) if data.seed else "",
        store_side=p.store_side or None,
        tile=p.tile or None,
        limit=p.limit or None,
        skip_broken=p.skip_broken,
    )


def folder_of(data: Data, source: str, root: epath.PathLike) -> epath.Path:
    """Where a source's shards lie: its own folder, or one below `root`."""
    if _is_shards(source):
        return _shards_folder(source)
    kind = source.partition(":")[0]
    name = files.sha256_of([source, dataclasses.asdict(data.prepare), data.seed, data.side])
    return epath.Path(root) / f"{kind}_{name[:8]}"


def make(
    data: Data, source: str, root: epath.PathLike, runner: str | None = None,
    pipeline_options: Sequence[str] = (), workers: int | None = None, compare: bool = False,
) -> shards.Shards:
    """The shards of one source, made below `root` or found.

    Args:
      data: how.
      source: KIND:PATH.
      root: see `resolved`.
      runner, pipeline_options: see `prepare.run`.
      workers: see `prepare.Options`.
      compare: whether those that are found are refused, as a `UserError`, where the collection's
        files are there and others now.
    """
    folder = folder_of(data, source, root)
    if not (_is_shards(source) or _prepared(folder)):
        return prepare_into(data, source, folder, runner, pipeline_options, workers)
    if compare and not _is_shards(source) and (changed := _changed(data, source, folder)):
        raise UserError(changed)
    return shards.open(folder)


# Parts of a collection whose files are compared before every command: 200,000 files of a folder.
_MOST_COMPARED = 200


def _changed(data: Data, source: str, folder: epath.Path, most: int | None = None) -> str:
    """What to say where a collection's files are others than it was prepared of, else nothing: it
    need no longer be there, and one of more than `most` parts is not looked at."""
    try:
        manifest = dict(json.loads((folder / shards.MANIFEST).read_text()))
        if most is not None and manifest.get("parts", 0) > most:
            return ""
        have = sources.collection(source, source_options(data)).fingerprint()
    except (UserError, OSError, ValueError, TypeError):  # What is damaged, `shards.open` says.
        return ""
    if manifest.get("fingerprint") in (None, have):
        return ""
    return (
        f"the files of {source} are not those that {os.fspath(folder)} was prepared of: "
        "choose another --workdir for those that are there now; remove that folder to have them "
        "here, where nothing is trained yet"
    )


def prepare_into(
    data: Data, source: str, folder: epath.PathLike, runner: str | None = None,
    pipeline_options: Sequence[str] = (), workers: int | None = None,
) -> shards.Shards:
    """A collection's shards in a folder: made, gone on with, or found, see `prepare.run`."""
    collection = sources.collection(source, source_options(data))
    options = dataclasses.replace(prepare_options(data), workers=workers)
    if source.startswith("photos:"):  # None has a caption.
        filters = dataclasses.replace(options.filters, captions=False)
        options = dataclasses.replace(options, filters=filters)
    return prepare.run(collection, folder, options, runner, pipeline_options)


def composed_spec(data: Data) -> builder.ComposedSpec:
    """The composed pictures of a config."""
    return builder.ComposedSpec(
        data.side, data.train_pictures, data.validation_pictures, data.seed
    )


def prepared(data: Data, root: epath.PathLike) -> bool:
    """Whether all data sets of a config are there. Raises `UserError` for a damaged one."""
    if data.composed:
        return builder.is_prepared(root, composed_spec(data))
    return all(_prepared(folder_of(data, source, root)) for source in data.sources)


def at_most(data: Data, root: epath.PathLike) -> tuple[int, int, int] | None:
    """How many pictures a config can take at most, found out without reading one.

    Args:
      data: the settings.
      root: see `resolved`.
    Returns:
      Of training and of validation, and how many there are; None where the names of a collection's
      files do not tell.
    Raises:
      UserError: for a collection that cannot be listed, and damaged shards.
    """
    split_of = prepare_options(data).split
    taken, total = np.zeros(2, int), 0
    for source in data.sources:
        folder = folder_of(data, source, root)
        if _prepared(folder):
            held = shards.open(folder)
            counts = {split: held.count(split) for split in shards.SPLITS}
        else:
            collection = sources.collection(source, source_options(data))
            if data.prepare.tile or not hasattr(collection, "groups"):
                return None
            counts = collections.Counter(map(split_of, collection.groups()))
        have = [counts["train"], counts["validation"]]
        most = [data.train_pictures, data.validation_pictures]
        taken += [min(n, m) if m else n for n, m in zip(have, most)]
        total += sum(have)
    return *map(int, taken), total


def of(data: Data, root: epath.PathLike) -> tuple[Dataset, ...]:
    """The data sets of a config, made below `root` if need be.

    Raises:
      UserError: for data that cannot be read or prepared.
      MissingPackageError: for a package that a source needs.
    """
    if data.composed:
        return (Composed(builder.prepare(root, composed_spec(data))),)
    most = {"train": data.train_pictures, "validation": data.validation_pictures}
    found = []
    for source in data.sources:
        found.append(Collected(make(data, source, root), data.side, most))
        _tell(data, source, found[-1])
    return tuple(found)


def _tell(data: Data, source: str, found: Collected) -> None:
    """What somebody might not expect of shards: settings that come too late, small pictures that
    are enlarged, and how many are left out."""
    if _is_shards(source):
        have = _flat(found.shards.manifest.get("options", {}))
        usual, wanted = (_flat(prepare_options(d).identity) for d in (
            dataclasses.replace(data, prepare=Prepare()), data))
        late = [
            f"data.prepare.{name}={getattr(data.prepare, name)!r}" for name, value in wanted.items()
            if hasattr(data.prepare, name)
            and value not in (usual[name], have.get(name, usual[name]))
        ]
        if late:
            log.warning("%s was prepared already, with other settings: %s changes nothing; prepare "
                        "the collection anew with it", source, ", ".join(late))
    have, taken = found.shards.count("train"), found.count("train")
    sides_N = found.shards.sizes("train").min(axis=1, initial=data.side)
    if small := int((sides_N < data.side).sum()):
        log.warning(
            "%d of %d training pictures of %s are smaller than data.side=%d, down to %d, and are "
            "enlarged; prepared with data.prepare.min_side=%d it has none", small, have, source,
            data.side, sides_N.min(), data.side)
    if taken < have:
        log.info("of %d training pictures of %s, data.train_pictures takes %d", have, source, taken)


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(value if isinstance(value, dict) else {key: value})
    return out
