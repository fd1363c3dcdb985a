"""Readers of collections, one module a kind: `collection("folder:~/pictures")`.

    folder        images with captions in files beside them or in a metadata table
    photos        photographs without captions, for super-resolution
    webdataset    tars, folders or parquet files as img2dataset writes them
    huggingface   folders of `datasets`: the hub's parquet files, or what save_to_disk writes
    parquet       any parquet files with image bytes and captions
    arrayrecord   shards that `prepare` or TensorFlow Datasets wrote
    tfds          data sets of TensorFlow Datasets by name
    coco          COCO as downloaded
    dreambench    DreamBooth's subjects

All give `Pair`s by the interface `data.collection.Collection`; nothing but a part's few rows is in
memory at once, and the order is that of names and rows. A kind of one's own is a row of `KINDS`,
see docs/data.md.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from ldm_scaling import files
from ldm_scaling.data.collection import Collection
from ldm_scaling.data.sources import (
    arrayrecord,
    coco,
    dreambench,
    folder,
    huggingface,
    parquet,
    photos,
    webdataset,
)
from ldm_scaling.data.sources.options import Options
from ldm_scaling.errors import UserError

__all__ = ["KINDS", "NOT_FILES", "Options", "canonical", "collection"]

# Kind to what makes it of its name, its path and the options.
KINDS: dict[str, Callable[..., Collection]] = {
    "folder": folder.collection,
    "photos": photos.collection,
    "webdataset": webdataset.collection,
    "huggingface": huggingface.collection,
    "parquet": parquet.collection,
    "arrayrecord": arrayrecord.collection,
    "tfds": arrayrecord.by_name,
    "coco": coco.collection,
    "dreambench": dreambench.collection,
}
# Those whose PATH is no file or folder: they are made of it as it is written, a text.
NOT_FILES = {"tfds"}
_WITHOUT_SCORES = ("photos", "coco", "dreambench")
_WITH_SPLIT = ("huggingface", "arrayrecord", "coco")


def collection(text: str, options: Options = Options()) -> Collection:  # noqa: B008
    """The collection that `KIND:PATH` names, for some kinds `KIND:PATH#SPLIT`.

    Raises `UserError` for an unknown kind and a path that is not there, or in a bucket.
    """
    kind, colon, place = text.partition(":")
    if kind not in KINDS or not colon or not place:
        files.on_disk("a collection", text)
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"did you mean {near[0]}:PATH? " if near else ""
        raise UserError(
            f"{text!r} names no collection: {hint}Write KIND:PATH with one of the kinds "
            f"{', '.join(KINDS)}; what  ldm-scaling prepare --to=PATH  made is "
            "data.source=shards:PATH"
        )
    if kind in _WITHOUT_SCORES and options.score_columns:
        score = next(iter(options.score_columns))
        raise UserError(f"{text} has no scores: leave out data.prepare.{score}_column")
    if kind in NOT_FILES:
        return KINDS[kind](text, place, options)
    files.on_disk(text, place)
    path, split = _found(kind, place)
    pattern = kind == "webdataset" and "{" in place
    if not path.exists() and not pattern:
        raise UserError(f"{text}: there is no {path}")
    return KINDS[kind](text, path.absolute(), options, *split)


def canonical(text: str) -> str:
    """One spelling of every `KIND:PATH` that names the same files; of other texts themselves."""
    kind, colon, place = text.partition(":")
    if kind in NOT_FILES or not place or "://" in text:
        return text
    path, split = _found(kind, place)
    return "#".join([f"{kind}:{os.path.realpath(path)}", *split])


def _found(kind: str, place: str) -> tuple[Path, list[str]]:
    """The path in a place, and the split that some kinds have after it."""
    path = Path(os.path.expanduser(place))
    if kind not in _WITH_SPLIT or "#" not in place or path.exists():
        return path, []
    place, _, split = place.rpartition("#")
    return Path(os.path.expanduser(place)), [split]
