"""What the ladder keeps of a stretch: archives in parts, and what is read of them at home.

`ladder.tar.xz.*` is what a later stretch goes on from, and is small enough to be handed to one:
records, statistics, curves, the autoencoder's averaged parameters, the compiler's choices of
kernels. `home.tar.xz.*` is for the report alone: pictures, and under `partial/MEMBER` what members
that are not done have measured so far. No member's own parameters: one that is not done is trained
anew on a machine that has lost it, and not alike to the last digit, so `run` takes no partial
records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import lzma
import os
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.study import records

PART = 15_000_000
STATE = "ladder.json"
COMPILED = "compiled"  # programs; of these what was found out about kernels goes along
_KERNELS = "xla_gpu_per_fusion_autotune_cache_dir"
APART, PARTIAL = "apart", "partial"  # a workdir for each member, until all of it is done
LIGHT = "light"  # the autoencoder's checkpoint without what only its training needs
SECONDS = "seconds.json"  # of a row of each member, and of decoding, alone on the card
_NOT_ALONE = ", shared"
# Below a workdir, of a member: what is not a record or a picture.
_RECORDS = ("records/*.json", "early/*/records/*.json")
ARCHIVES = ("ladder", "home")


def to_go_on(workdir: Path, study: Study) -> dict[str, Path]:
    """Files by their names in the archive, which are those below the workdir."""
    members, found = done(workdir), []
    for root in [workdir, *sorted((workdir / "early").glob("*"))]:
        found += [root / name for name in ("study.json", STATE, SECONDS)]
    found += [path for path in _records(workdir) if _model(path) in members]
    found += sorted(p for p in (workdir / "reference").rglob("*") if not _unfinished(p))
    found += [workdir / "models" / name / "curves.csv" for name in members]
    kernels = workdir / COMPILED / _KERNELS
    found += sorted(
        p for p in kernels.rglob("*") if "tmp" not in p.relative_to(kernels).parts)
    found += [workdir / "autoencoder" / "curves.csv", workdir / "latent_scale.json"]
    named = {os.fspath(p.relative_to(workdir)): p for p in found if p.is_file()}
    last = Path("autoencoder", "checkpoints", str(study.autoencoder.train.steps))
    root = workdir / LIGHT if (workdir / LIGHT / last).exists() else workdir
    return named | {
        os.fspath(p.relative_to(root)): p for p in sorted((root / last).rglob("*")) if p.is_file()
    }


def for_home(workdir: Path, study: Study) -> dict[str, Path]:
    """As `to_go_on`."""
    members, block = done(workdir), study.sweep.report_block
    named = {os.fspath(p.relative_to(workdir)): p for p in _strips(workdir, block, members)}
    for name in study.members:
        if name in members:
            continue
        root = partial(workdir, name)
        found = [
            *_records(root), *_strips(root, block, [name]), root / "models" / name / "curves.csv",
        ]
        named |= {
            f"{PARTIAL}/{name}/{p.relative_to(root)}": p for p in found if p.is_file()
        }
    return named


def partial(workdir: Path, name: str) -> Path:
    """Where what a member that is not done has measured is: here, or as an archive brought it."""
    apart = workdir / APART / name
    return apart if apart.exists() else workdir / PARTIAL / name


def _records(root: Path) -> list[Path]:
    found = [path for pattern in _RECORDS for path in sorted(root.glob(pattern))]
    return [path for path in found if not _unfinished(path)]


def _unfinished(path: Path) -> bool:
    """Whether it is about to be renamed, see `files.atomic_path`."""
    return path.name.startswith(".tmp-")


def _model(path: Path) -> str:
    return json.loads(path.read_text())["identity"]["model"]


def _strips(root: Path, block: int, members: Iterable[str]) -> list[Path]:
    """Pictures of what is reported of members."""
    found = []
    for path in _records(root):
        strip = path.parents[1] / "strips" / f"{path.stem}.png"
        if strip.exists():
            identity = json.loads(path.read_text())["identity"]
            if identity["model"] in members and identity["seed_block"] == block:
                found.append(strip)
    return found


def read(named: Mapping[str, Path]) -> dict[str, bytes]:
    """Their bytes; without those that are gone by now, for compilers are at work in their cache."""
    bodies = {}
    for name, path in named.items():
        with contextlib.suppress(FileNotFoundError):
            bodies[name] = path.read_bytes()
    return bodies


def write(to: Path, archive: str, bodies: Mapping[str, bytes]) -> list[str]:
    """An archive in parts; lines of their sizes."""
    to.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=6) as tar:
        for name, body in bodies.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(body), int(time.time())
            tar.addfile(entry, io.BytesIO(body))
    data = buffer.getvalue()
    lines, old = [], set(to.glob(f"{archive}.tar.xz.*"))
    for number in range(-(-len(data) // PART)):
        part = to / f"{archive}.tar.xz.{number}"
        files.atomic_write_bytes(part, data[number * PART : (number + 1) * PART])
        lines.append(f"{part}: {part.stat().st_size / 1e6:.2f} MB")
        old.discard(part)
    for part in old:
        part.unlink()
    return lines


def done(workdir: Path) -> list[str]:
    """Members that are trained and swept, early checkpoints aside."""
    path = workdir / STATE
    return json.loads(path.read_text())["done"] if path.exists() else []


def note(workdir: Path, names: Iterable[str]) -> None:
    """Writes which they are."""
    files.atomic_write_text(workdir / STATE, json.dumps({"done": list(names)}) + "\n")


def parts(source: Path, archive: str = ARCHIVES[0]) -> list[Path]:
    """An archive's, in their order.

    Raises:
      UserError: where there are none of the one that a stretch goes on from.
    """
    found = sorted(source.glob(f"{archive}.tar.xz.*"), key=lambda p: int(p.suffix[1:]))
    if not found and archive == ARCHIVES[0]:
        raise UserError(f"there are no parts ladder.tar.xz.* in {source}: give the folder of run")
    return found


def unpack(source: Path, workdir: Path) -> None:
    """Both archives, of which `home` may be missing, into a workdir that may have some of it, or
    more.

    Raises:
      UserError: where parts are missing or damaged.
    """
    before = done(workdir)
    for archive in ARCHIVES:
        found = parts(source, archive)
        if not found:
            continue
        data = io.BytesIO(b"".join(p.read_bytes() for p in found))
        try:
            with tarfile.open(fileobj=data, mode="r:xz") as tar:
                # Python 3.11.0 to 3.11.3 have none.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(workdir)
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as e:
            raise UserError(f"the parts in {source} are not whole ({e}): copy them again") from e
        note(workdir, dict.fromkeys([*before, *done(workdir)]))


@contextlib.contextmanager
def with_partial(workdir: Path, members: Iterable[str]) -> Iterator[list[str]]:
    """Has what members that are not done have measured among the study's own for as long as a
    report is made; lines that say whose."""
    finished, lines, copies = done(workdir), [], []
    for name in members:
        root = partial(workdir, name)
        found = [] if name in finished else _records(root)
        strips = sorted(root.glob("strips/*.png")) if found else []
        for path in [*found, *strips]:
            target = workdir / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            copies.append(target)
        if found:
            lines.append(f"{name} is not done: {len(found)} records of it are in the report")
    try:
        yield lines
    finally:
        for path in copies:
            path.unlink(missing_ok=True)


def alone(path: Path) -> dict[str, dict[str, Any]]:
    """By member, seconds of a guided and a plain row of a sample, of decoding one; the device."""
    return json.loads(path.read_text()) if path.exists() else {}


def reckon_seconds(workdir: Path) -> list[str]:
    """Records' seconds a picture by the rows that were timed alone; the members that have none,
    whose seconds stay those of a device that others were at work on, as it is called from then."""
    timed, shared = alone(workdir / SECONDS), set()
    for path in _records(workdir):
        record = records.read(path)
        if (of := timed.get(record.identity.model)) is None:
            shared.add(record.identity.model)
            device = record.device.removesuffix(_NOT_ALONE) + _NOT_ALONE
            records.write(path.parent, dataclasses.replace(record, device=device))
            continue
        row = of["plain" if record.identity.guidance == 1 else "guided"]
        seconds = record.calls * row + of["decode"]
        records.write(path.parent, dataclasses.replace(
            record, seconds_per_image=seconds, device=of["device"]))
    return sorted(shared)


def gathered(workdir: Path) -> Path:
    """A folder of all records, of early checkpoints too."""
    together = workdir / "all_records"
    shutil.rmtree(together, ignore_errors=True)
    together.mkdir()
    for path in _records(workdir):
        shutil.copy(path, together)
    return together
