"""The data set `openmoji_composed`: a TFDS builder that writes ArrayRecord without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import time
from collections.abc import Iterator
from concurrent import futures

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from google.protobuf import json_format
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils

from ldm_scaling import files
from ldm_scaling.data import array_records
from ldm_scaling.data.composed import compose, openmoji
from ldm_scaling.errors import UserError, first_line

_STALE_SECONDS = 3600
_PIECE = 256  # pictures that are held in memory, as PNG
_THREADS = 4  # much of a picture is Python, one thread at a time: two are 1.6 times as fast as one


@dataclasses.dataclass(frozen=True)
class ComposedSpec:
    """Which pictures to make.

    Attributes:
      side: height and width in pixels.
      train: pictures in the train split.
      validation: pictures in the validation split.
      seed: of the composer.
    """

    side: int = 32
    train: int = 10_000
    validation: int = 2_000
    seed: int = 0

    def __post_init__(self):
        if not 16 <= self.side <= 1024:
            raise UserError(f"image side {self.side} is outside 16..1024")
        for split in compose.SPLITS:
            if self.count(split) < 1:
                raise UserError(f"the {split} split needs at least 1 picture: {self.count(split)}")
        if self.seed < 0:
            raise UserError(f"the data set's seed must not be negative: {self.seed}")

    def count(self, split: str) -> int:
        """Pictures in `split`."""
        return {"train": self.train, "validation": self.validation}[split]

    @property
    def about(self) -> str:
        """What they are, in a sentence."""
        return (
            f"OpenMoji pictograms composed into {self.side} x {self.side} pictures with captions "
            f"that are true by construction: {self.train:,} for training and "
            f"{self.validation:,} for validation, which share no concept."
        )

    @property
    def name(self) -> str:
        """The folder's name: every field and the composer's version."""
        return (
            f"side{self.side}_train{self.train}_validation{self.validation}_seed{self.seed}"
            f"_v{compose.VERSION}"
        )


class OpenmojiComposed(tfds.core.GeneratorBasedBuilder):
    """Pictograms on coloured backgrounds with captions that are true by construction."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    url_infos = None  # nothing is downloaded; TFDS would look for checksums beside this file

    def __init__(self, spec: ComposedSpec, data_dir: epath.PathLike):
        self._spec = spec
        config = tfds.core.BuilderConfig(name=spec.name, version=self.VERSION)
        with _quiet():
            super().__init__(
                config=config, data_dir=os.fspath(data_dir), file_format="array_record"
            )

    @property
    def spec(self) -> ComposedSpec:
        """What was asked for."""
        return self._spec

    def _info(self) -> tfds.core.DatasetInfo:
        side = self._spec.side
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://openmoji.org",
            license=openmoji.ATTRIBUTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "concept": tfds.features.Text(),
                    "index": tfds.features.Scalar(dtype=np.int64),
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,  # records lie in the order of their index
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        catalogue = openmoji.load()
        composer = compose.Composer(catalogue, self._spec.side, self._spec.seed)
        self.info.metadata.update(
            composer=compose.VERSION, catalogue=catalogue.hash, drawings=catalogue.version,
            left_out=catalogue.excluded,
        )  # fmt: skip
        return {split: self._generate_examples(composer, split) for split in compose.SPLITS}

    def _generate_examples(self, composer: compose.Composer, split: str):
        count = self._spec.count(split)
        digest = hashlib.sha256()
        with files.progress(count, f"composing {split} pictures", "picture") as bar:
            for index, (png, caption, concept) in enumerate(_composed(composer, split, count)):
                digest.update(png + caption.encode() + concept.encode())
                bar.update(1)
                example = {
                    "image": png,
                    "caption": caption,
                    "concept": concept,
                    "index": index,
                }
                yield index, example
        self.info.metadata[f"sha256_{split}"] = digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A data set that is wholly on disk.

    Attributes:
      builder: its builder.
      path: its folder.
      hash: 16 hex digits of every picture, caption and concept, in order.
    """

    builder: OpenmojiComposed
    path: epath.Path
    hash: str


def is_prepared(data_dir: epath.PathLike, spec: ComposedSpec) -> bool:
    """Whether the data set is there. Raises `UserError` where it is damaged."""
    root = epath.Path(data_dir)
    if not (root / OpenmojiComposed.name / spec.name).exists():
        return False
    with _quiet():
        return _found(spec, root).is_prepared()


def prepare(data_dir: epath.PathLike, spec: ComposedSpec) -> Prepared:
    """Makes the data set below `data_dir`, or finds it there.

    The folder gets its name only when all is written: a killed run leaves nothing that reads as
    finished, and the next starts afresh. One process prepares a folder at a time.

    Raises:
      UserError: a folder that cannot be read or written, or a data set in it that is damaged.
      MissingPackageError: the pictograms' packages are not installed.
    """
    root = epath.Path(data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        builder = _found(spec, root)
        with _quiet():
            finished = builder.is_prepared()
        if not finished:
            _remove_stale(builder)
            openmoji.load()
            with _quiet():
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(
                        try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
                    )
                )
    except (OSError, RuntimeError) as e:  # ArrayRecord's writer raises RuntimeError
        how = getattr(e, "strerror", None) or first_line(e)
        raise UserError(
            f"cannot prepare the data set below {os.fspath(root)}: {how}; "
            "choose a folder that can be written and has room"
        ) from e
    return _checked(builder)


def _found(spec: ComposedSpec, root: epath.Path) -> OpenmojiComposed:
    try:
        builder = OpenmojiComposed(spec, root)
        _ = builder.info.metadata  # read on first use
        return builder
    except (json_format.Error, ValueError) as e:  # of TFDS's own files
        folder = os.fspath(root / OpenmojiComposed.name / spec.name)
        raise UserError(
            f"the data set in {folder} is damaged: {first_line(e)}; remove the folder "
            "and run again"
        ) from e


def _checked(builder: OpenmojiComposed) -> Prepared:
    """The finished data set, after a look at its counts and its files."""
    path = epath.Path(builder.data_dir)
    remedy = f"remove the folder {os.fspath(path)} and run again"
    metadata = builder.info.metadata or {}
    digests = []
    for split in compose.SPLITS:
        expected = builder.spec.count(split)
        info = builder.info.splits.get(split)
        found = info.num_examples if info else 0
        if found != expected:
            raise UserError(
                f"the data set in {os.fspath(path)} is damaged: its {split} split has {found} "
                f"pictures instead of {expected}; {remedy}"
            )
        if f"sha256_{split}" not in metadata:
            raise UserError(f"{os.fspath(path / 'metadata.json')} is missing or cut; {remedy}")
        for name, length in zip(info.filenames, info.shard_lengths, strict=True):
            found = _records(path / name)
            if found != length:
                raise UserError(
                    f"{os.fspath(path / name)} is missing or damaged: it has {found} records "
                    f"instead of {length}; {remedy}"
                )
        digests.append(metadata[f"sha256_{split}"])
    return Prepared(builder, path, files.sha256_of([builder.spec.name, *digests]))


def _records(path: epath.Path) -> int:
    """Records of an ArrayRecord file; 0 where there is no whole one."""
    if not path.exists():
        return 0
    try:
        return array_records.opened(path)[1]
    except RuntimeError:
        return 0


def _composed(
    composer: compose.Composer, split: str, count: int
) -> Iterator[tuple[bytes, str, str]]:
    """PNG, caption and concept of a split's pictures, in order; made by several threads."""

    def one(index: int) -> tuple[bytes, str, str]:
        picture = composer.compose(split, index)
        return _png(picture), picture.caption, picture.concept

    with futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, count, _PIECE):
            yield from pool.map(one, range(start, min(start + _PIECE, count)))


def _png(picture: compose.Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def _remove_stale(builder: OpenmojiComposed) -> None:
    """Removes what killed preparations left, an hour after they last touched it."""
    path = epath.Path(builder.data_dir)
    for folder in path.parent.glob(f"incomplete.*_{path.name}") if path.parent.exists() else ():
        if time.time() - folder.stat().mtime > _STALE_SECONDS:
            folder.rmtree()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's own bars and notices: `files.progress` shows what matters."""
    verbosity = logging.get_verbosity()
    bars = getattr(tqdm_utils, "_active", True)
    logging.set_verbosity(logging.ERROR)
    tqdm_utils.display_progress_bar(False)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        tqdm_utils.display_progress_bar(bars)
        logging.set_verbosity(verbosity)
