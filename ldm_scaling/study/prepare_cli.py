"""What `ldm-scaling prepare` does beyond its stage: shards of their own, and what caching costs."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.markdown import Markdown

from ldm_scaling.config import Study
from ldm_scaling.data import shards as shards_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import caching_cost, datasets, encoders, preparing
from ldm_scaling.study.materials import Materials


def show(prepared: shards_lib.Shards) -> None:
    """Prints where a prepared data set lies, and what was kept and dropped."""
    report = prepared.path / "report.md"
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if report.exists():
        console.print(Markdown(report.read_text(encoding="utf-8")))
    print(f"{os.fspath(prepared.path)}: {prepared.count('train'):,} pairs for training, "
          f"{prepared.count('validation'):,} for validation, hash {prepared.hash}")


def to_folder(
    study: Study, to: str, runner: str | None = None, pipeline_options: Sequence[str] = (),
    workers: int | None = None,
) -> None:
    """Turns the config's collection into shards in a folder of their own, and prints the report.

    Args:
      study: its `data`.
      to: the folder to make.
      runner, pipeline_options: of Apache Beam, see `prepare.run`.
      workers: processes of this machine, see `prepare.Options`.
    Raises:
      UserError: for a config whose data is no single collection, and as `prepare.run`.
    """
    data = study.data
    if data.composed or len(data.sources) > 1 or data.source.startswith(f"{preparing.SHARDS}:"):
        raise UserError(
            f"--to={to} takes one collection, given by --source=KIND:PATH or data.source, not "
            f"{data.source!r}"
        )
    folder = epath.Path(to).expanduser()
    show(preparing.prepare_into(data, data.source, folder, runner, pipeline_options, workers))
    made = shlex.quote(f"{preparing.SHARDS}:{os.fspath(folder)}")
    print(f"use it by  --config.data.source={made}")


def in_workdir(
    materials: Materials, runner: str | None = None, pipeline_options: Sequence[str] = (),
    workers: int | None = None,
) -> None:
    """Prepares the collections of a study's config in its workdir, and prints their reports.

    Raises `UserError` for one that is prepared there and has other files now, and as `prepare.run`.
    """
    data = materials.study.data
    for source in () if data.composed else data.sources:
        root = materials.workdir / "data"
        show(preparing.make(data, source, root, runner, pipeline_options, workers, compare=True))


def dry_run(materials: Materials, format: str) -> str:
    """What caching the frozen encoders' outputs would cost and save each member of the family.

    Raises:
      UserError: where it is not known how many pictures there are.
    """
    study = materials.study
    if study.weights:
        encoders.check_encodes(study.weights)
    images, captions, known = _counts(materials)
    plan = caching_cost.Plan(
        images, captions, study.data.side, materials.networks.decoder_spec,
        _text_spec(materials), study.data.text_length, study.data.flip,
    )
    found = caching_cost.rows(plan, _family(study))
    if format == "json":
        rows = [dataclasses.asdict(row) for row in found]
        return json.dumps({"images": images, "captions": captions, "counted": known, "rows": rows})
    note = "" if known else (
        "Not prepared yet: data.train_pictures stands for the number of pictures of a collection, "
        "one caption each.\n"
    )
    return note + caching_cost.text(plan, found)


def _counts(materials: Materials) -> tuple[int, int, bool]:
    """Training pictures and captions, and whether they are counted or guessed by the config."""
    data = materials.study.data
    if data.composed:
        return data.train_pictures, data.train_pictures, True
    most = {"train": data.train_pictures, "validation": data.validation_pictures}
    images = captions = 0
    known = True
    for source in data.sources:
        place = preparing.folder_of(data, source, materials.workdir / "data")
        if (place / shards_lib.MANIFEST).exists():
            found = datasets.Collected(shards_lib.open(place), data.side, most)
            images += found.count("train")
            captions += len(found.captions("train"))
        elif data.train_pictures:
            images += data.train_pictures
            captions += data.train_pictures
            known = False
        else:
            raise UserError(
                f"it is not known how many pictures {source} has: give "
                "--config.data.train_pictures=N, or prepare it first"
            )
    return images, captions, known


def _text_spec(materials: Materials) -> Any:
    """The sizes of the text encoder."""
    spec = materials.text_states.spec
    return spec if spec is not None else caching_cost.TEXTS["minilm"]


def _family(study: Study) -> list[str]:
    """The config's members' families, whole."""
    wanted = {zoo.get(member).reference for member in study.members}
    return [name for name, member in zoo.MEMBERS.items()
            if member.reference in wanted and (member is not zoo.SD15 or name in study.members)]
