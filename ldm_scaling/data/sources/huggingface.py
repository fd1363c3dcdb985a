"""`huggingface:PATH[#SPLIT]`: a data set of Hugging Face's `datasets`, as it lies on a disk.

    PATH/data/train-00000-of-00002.parquet ...       as the hub has it
    PATH/state.json, PATH/data-00000-of-00001.arrow  as `Dataset.save_to_disk` writes it
    PATH/dataset_dict.json, PATH/train/state.json    as `DatasetDict.save_to_disk` writes it
"""

from __future__ import annotations

import functools
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from ldm_scaling.data.sources import listing
from ldm_scaling.data.sources.options import Options
from ldm_scaling.data.sources.tables import Tables
from ldm_scaling.errors import UserError

_STATE, _DICT = "state.json", "dataset_dict.json"


def collection(name: str, path: Path, options: Options, split: str = "") -> Tables:
    """The rows of a split, or of all, by file name and row.

    Columns are those that the schema's notes call images, or found as in `parquet:`.
    """
    if not path.is_dir():
        raise UserError(f"{name}: {path} is a file: name the folder that it is in, or use parquet:")
    return Tables(name, path, options, functools.partial(_files, path, split))


def _files(root: Path, split: str) -> list[str]:
    if (root / _DICT).is_file():
        splits = _json(root / _DICT).get("splits")
        if not isinstance(splits, list) or not splits:
            raise UserError(f"{root / _DICT} names no splits: save the data set again")
        found = {str(name): [f"{name}/{file}" for file in _saved(root / str(name))]
                 for name in splits}  # fmt: skip
    elif (root / _STATE).is_file():
        found = {str(_json(root / _STATE).get("_split") or "train"): _saved(root)}
    else:
        names = listing.walk(root, lambda name: name.endswith(".parquet"))
        names = names or listing.walk(root, lambda name: name.endswith(".arrow"))
        found = {}
        for name in names:
            found.setdefault(_split_of(name), []).append(name)
    if not found:
        raise UserError(
            f"{root} is no data set on disk: it holds no parquet or arrow file and no {_STATE}"
        )
    if split and split not in found:
        raise UserError(f"{root} has no split {split!r}: it has {', '.join(sorted(found))}")
    return found[split] if split else sorted(name for names in found.values() for name in names)


def _split_of(name: str) -> str:
    """Of `data/train-00000-of-00002.parquet`, `train.parquet` or `train/0000.parquet`."""
    stem = listing.stem(posixpath.basename(name))
    piece = re.fullmatch(r"(?:.*-)?(\w+)-\d+-of-\d+(?:-\w+)?", stem)
    if piece:
        return piece[1]
    folder = posixpath.basename(posixpath.dirname(name))
    return folder if stem.isdecimal() and folder else stem


def _saved(folder: Path) -> list[str]:
    """The files of a folder that `save_to_disk` wrote, in order."""
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder / _STATE} takes rows by an index: save the data set again after "
            "flatten_indices()"
        )
    files = state.get("_data_files")
    try:
        names = [str(file["filename"]) for file in files]
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / _STATE} names no data files: save the data set again") from e
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder / missing[0]} is not there, which {folder / _STATE} names: copy the whole "
            "folder again"
        )
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path} ({e}): save the data set again") from e
