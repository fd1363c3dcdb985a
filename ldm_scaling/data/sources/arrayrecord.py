"""Data sets that TensorFlow Datasets made on this disk as ArrayRecord, read without TensorFlow.

    arrayrecord:PATH[#SPLIT]                         a folder with dataset_info.json
    tfds:NAME[/CONFIG[/VERSION]][:SPLIT][@DATA_DIR]  the same by name, e.g. tfds:coco_captions:train

SPLIT is as TFDS has it, `train[:10%]+validation` too; without it all splits are read. DATA_DIR is
TFDS_DATA_DIR or ~/tensorflow_datasets if none is named. Prepared shards (`data.shards`) are such
folders.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message

from ldm_scaling import files
from ldm_scaling.data import array_records
from ldm_scaling.data.collection import SCORES, Pair, Part
from ldm_scaling.data.sources import listing, texts
from ldm_scaling.data.sources.columns import IMAGE_COLUMNS
from ldm_scaling.data.sources.listing import Once
from ldm_scaling.data.sources.options import NO_CAPTIONS, Options
from ldm_scaling.data.sources.texts import Unusable
from ldm_scaling.errors import UserError, first_line

_INFO = "dataset_info.json"
_KEY = "key"
# What pairs have in common that must not lie in both splits; `concept` is openmoji_composed's.
_GROUPS = ("group", "concept")
_RECORDS = 32  # at once
# What TFDS's own parsers raise of files that say something else.
_DAMAGED = (
    json_format.Error, message.Error, OSError, ValueError, KeyError, TypeError, AttributeError,
    RuntimeError,
)  # fmt: skip
_CONVERT = (
    "convert it with tensorflow_datasets/scripts/convert_format.py --out_file_format=array_record"
)


def collection(name: str, path: Path, options: Options, split: str = "") -> Records:
    """The records of a folder's splits, or of the only such folder below it.

    Raises `UserError` when there is none or there are several.
    """
    found = [path] if (path / _INFO).is_file() else _below(path)
    if not found:
        raise UserError(f"{name}: there is no {_INFO} in {path}: it is no data set of TFDS")
    if len(found) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in found[:8])
        raise UserError(f"{name}: {path} holds {len(found)} data sets, name one: {names}")
    return Records(name, found[0], options, split)


def by_name(name: str, text: str, options: Options) -> Records:
    """A data set by its name in TFDS, prepared on this disk.

    Raises `UserError` when it is not, saying how to prepare it.
    """
    match = re.fullmatch(r"(\w+)((?:/[^/:@]+)*)(?::([^@]+))?(?:@(.+))?", text)
    if not match:
        raise UserError(
            f"{name!r} names no data set: write tfds:NAME[/CONFIG][:SPLIT][@DATA_DIR], e.g. "
            "tfds:coco_captions:train"
        )
    dataset, config, split, data_dir = match.groups()
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    files.on_disk(name, place)
    root = Path(place).expanduser()
    folder = root / (dataset + config)
    found = [folder] if (folder / _INFO).is_file() else _below(folder) if folder.is_dir() else []
    newest: dict[Path, Path] = {}
    for path in sorted(found, key=lambda path: _version(path.name)):
        newest[path.parent] = path
    if not newest:
        raise UserError(
            f"{name}: {dataset}{config} is not prepared in {root}: where TensorFlow is installed, "
            f"run  tfds build {dataset}{config} --file_format=array_record --data_dir=DIR  and "
            f"copy DIR/{dataset} to {root}"
        )
    if len(newest) > 1:
        configs = ", ".join(sorted(path.relative_to(root).as_posix() for path in newest))
        raise UserError(f"{name}: {folder} holds {len(newest)} configs, name one: {configs}")
    return Records(name, next(iter(newest.values())), options, split or "")


def _below(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is a file: name the folder that it is in")
    return [path / os.path.dirname(name) for name in listing.walk(path, lambda n: n == _INFO)
            if "incomplete." not in name]  # fmt: skip


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(".")) if re.fullmatch(r"\d+(\.\d+)*", text) else ()


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a data set's records hold: the features that are read, and the files of its splits."""

    features: Any
    image: str
    captions: tuple[str, ...]
    files: tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Records:
    """Records of examples; a part is some of one file.

    A pair's key is the record's own where it has one (`key`), else FILE/RECORD. Features are found
    by name and type, captions also within other features.

    Attributes:
      name: as in `Collection`.
      root: the folder with dataset_info.json.
      options: how it is read.
      split: what of it, as TFDS has it; empty is all.
    """

    name: str
    root: Path
    options: Options
    split: str = ""
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)

    def _layout(self) -> _Layout:
        import tensorflow_datasets as tfds

        try:
            info = tfds.builder_from_directory(self.root).info
            features = dict(sorted(info.features.items()))
        except _DAMAGED as e:
            why = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"cannot read the data set in {self.root} ({why}): copy or make it again"
            ) from e
        form = info.file_format.value if info.file_format else "an unknown format"
        if form != "array_record":
            raise UserError(f"the data set in {self.root} is {form}: {_CONVERT}")
        split = self.split or "+".join(sorted(info.splits))
        try:
            files = [
                (i.filename, i.skip, i.skip + i.examples_in_shard if i.take == -1 else
                 i.skip + i.take, i.examples_in_shard)
                for i in info.splits[split].file_instructions
            ]  # fmt: skip
        except (ValueError, KeyError) as e:
            raise UserError(
                f"{self.name}: there is no split {split!r} in {self.root}: it has "
                f"{', '.join(sorted(info.splits))}"
            ) from e
        image = self._image(features, tfds)
        captions = texts.columns_of(features, self.options)
        missing = set(self.options.caption_columns) - set(captions)
        if missing or (self.options.captions and not captions):
            what = repr(min(missing)) if missing else "of captions"
            raise UserError(
                f"{self.root} has no feature {what}: {NO_CAPTIONS}; there are {', '.join(features)}"
            )
        scores = (name for score in SCORES for name in self.options.names_of(score))
        wanted = (image, *captions, _KEY, *_GROUPS, *scores)
        kept = {name: features[name] for name in wanted if name in features}
        return _Layout(tfds.features.FeaturesDict(kept), image, captions, tuple(files))

    def _image(self, features: Mapping[str, Any], tfds) -> str:
        images = [n for n, f in features.items() if isinstance(f, tfds.features.Image)]
        named = [column for column in IMAGE_COLUMNS if column in images]
        if not named and len(images) != 1:
            raise UserError(
                f"{self.root} has {'several features' if images else 'no feature'} of images: "
                f"there are {', '.join(features)}"
            )
        return (named or images)[0]

    def parts(self) -> tuple[Part, ...]:
        """As `Collection.parts`."""
        parts = tuple(
            Part(
                f"{os.path.basename(file)}[{start + a}:{start + b}]", file, start + a, start + b,
                of_file,
            )
            for file, start, stop, _ in self.once.get(self._layout).files
            for of_file in [self._fingerprint([file]) if os.path.isfile(file) else ""]
            for a, b in listing.cut(stop - start, self.options.part_size)
        )  # fmt: skip
        if not parts:
            raise UserError(f"{self.name}: there is no record in {self.root}")
        return parts

    def read(self, part: Part) -> Iterator[Pair]:
        """As `Collection.read`; a damaged record is a pair's error."""
        import tensorflow_datasets as tfds

        layout = self.once.get(self._layout)
        decoders = {layout.image: tfds.decode.SkipDecoding()}
        count = next(n for file, _, _, n in layout.files if file == part.path)
        piece = os.path.basename(part.path).replace(".array_record", "")
        for number, record in _records(part, count):
            where = f"record {number} of {part.path}"
            key = listing.key(f"{piece}/{number}")
            if not isinstance(record, bytes):
                yield Pair(key, b"", error=texts.one_line(f"{where} is damaged ({record})"))
                continue
            try:
                row = layout.features.deserialize_example_np(record, decoders=decoders)
            except _DAMAGED as e:
                why = texts.one_line(f"{where} does not hold the features ({e})")
                yield Pair(key, b"", error=why)
                continue
            yield self._pair(key, row, layout, where)

    def _pair(self, key: str, row: Mapping[str, Any], layout: _Layout, where: str) -> Pair:
        try:
            group = next((_text(row[name]) for name in _GROUPS if row.get(name)), "")
            key = _text(row.get(_KEY)) or key
            captions = texts.captions_of([row[c] for c in layout.captions], where, self.options)
            scores = texts.row_scores(row, where, self.options)
        except Unusable as e:
            return Pair(key, b"", error=str(e))
        image = row[layout.image]
        if not image:
            why = texts.one_line(f"{where} holds no image")
            return Pair(key, b"", captions, group, scores, why)
        return Pair(key, image, captions, group, scores)

    def fingerprint(self) -> str:
        """As `Collection.fingerprint`."""
        return self._fingerprint([file for file, *_ in self._layout().files])

    def _fingerprint(self, paths: Iterable[str]) -> str:
        names = sorted({os.path.relpath(path, self.root) for path in paths})
        return listing.fingerprint(self.root, [_INFO, *names], self.options)


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else ""


def _records(part: Part, count: int) -> Iterator[tuple[int, bytes | str]]:
    """Number and bytes of a part's records; of a damaged one, why.

    Raises `UserError` for a file that is missing, or is not whole.
    """
    def open_file():
        remedy = f"it should hold {count} records: copy or make it again"
        if not os.path.isfile(part.path):
            raise UserError(f"{part.path} is not there: {remedy}")
        try:
            reader, found = array_records.opened(part.path)
        except RuntimeError as e:
            raise UserError(f"cannot read {part.path} ({first_line(e)}): {remedy}") from e
        if found != count:
            raise UserError(f"{part.path} is damaged, it holds {found} records: {remedy}")
        return reader

    reader = open_file()
    for start in range(part.start, part.stop, _RECORDS):
        stop = min(start + _RECORDS, part.stop)
        try:
            yield from enumerate(reader.read(start, stop), start)
            continue
        except (RuntimeError, IndexError, ValueError):
            pass  # One of them is damaged: find out which.
        for number in range(start, stop):
            reader = open_file()  # a reader is of no use after an error
            try:
                yield number, reader.read(number, number + 1)[0]
            except (RuntimeError, IndexError, ValueError) as e:
                yield number, (str(e).splitlines() or [type(e).__name__])[0]
        reader = open_file()
