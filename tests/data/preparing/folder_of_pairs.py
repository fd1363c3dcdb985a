"""A collection for tests: a folder of a folder for each part, files named by their pair's number.

A module of its own, so that worker processes can import it.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_scaling import files
from ldm_scaling.data.collection import Pair, Part
from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True)
class FolderOfPairs:
    root: str

    @property
    def name(self) -> str:
        return f"test:{self.root}"

    def parts(self) -> Sequence[Part]:
        return [Part(p.name, str(p)) for p in sorted(Path(self.root).iterdir())]

    def read(self, part: Part) -> Iterator[Pair]:
        folder = Path(part.path)
        for meta in sorted(folder.glob("*.json")):
            facts = json.loads(meta.read_text())
            if "broken" in facts:
                raise UserError(f"the part {folder} is broken: {facts['broken']}")
            facts["captions"] = tuple(facts.get("captions", ()))
            yield Pair(image=meta.with_suffix(".bin").read_bytes(), **facts)

    def fingerprint(self) -> str:
        found = sorted(Path(self.root).rglob("*.*"))
        return files.sha256_of([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in found])


def put(root: Path, parts: Sequence[Sequence[Pair]]) -> FolderOfPairs:
    """Writes the pairs of each part, and gives the collection of them."""
    for i, pairs in enumerate(parts):
        folder = root / f"part{i}"
        folder.mkdir(parents=True)
        for number, pair in enumerate(pairs):
            facts = dataclasses.asdict(pair)
            (folder / f"{number:05d}.bin").write_bytes(facts.pop("image"))
            (folder / f"{number:05d}.json").write_text(json.dumps(facts))
    return FolderOfPairs(str(root))


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image's file."""
    out = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(out, kind, **options)
    return out.getvalue()


def scene(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3]: no two alike, each like itself when resized."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def plain_pairs(count: int, first: int = 0) -> list[Pair]:
    """So many sound pairs, no two alike; JPEG and PNG by turns."""
    return [
        Pair(
            f"pair{i:04d}",
            encoded(scene(i, 40 + i % 7, 48), "JPEG" if i % 2 else "PNG"),
            tuple(f"caption {k} of {i}" for k in range(1 + i % 3)),
            scores={"aesthetic": i % 10} if i % 4 else {},
        )
        for i in range(first, first + count)
    ]
