"""What the ladder's members cost: FLOPs, and minutes of an H200."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ldm_scaling import config as config_lib
from ldm_scaling.config import Study
from ldm_scaling.models import cost, zoo
from ldm_scaling.study import subject as subject_lib

ROOT = Path(__file__).resolve().parents[2]
# Of the H200's peak in bfloat16 `c128_s16` reaches this in training (results/2026-11-26_h200.md),
# `c64_s16` 0.063: nearly in proportion to width, for small networks wait for launches.
PEAK, SHARE, WIDTH = 989e12, 0.156, 128
_DECODES = 1.5e-4  # seconds of a picture, reckoned


def study_of(config: str) -> Study:
    """The settings of a config file with its argument."""
    path, _, arg = config.partition(":")
    spec = importlib.util.spec_from_file_location("ladder_config", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_lib.parse(module.get_config(arg))


def guided(rates: Sequence[float]) -> tuple[float, ...]:
    """Rates that are guidance."""
    return tuple(rate for rate in rates if rate != 1)


def reckon(study: Study, member: str) -> dict[str, tuple[float, float]]:
    """PFLOP of its training, sweep and early checkpoints, and their minutes with the card to
    itself; those of decoding too. Touches no device: others are at work there."""
    spec = zoo.get(member).spec
    size = cost.of(spec)
    few = dataclasses.replace(
        study.sweep, samplers=("ddim",), steps=(10,), guidance=guided(study.sweep.guidance))
    gflops, pictures = {"training": 3 * size.gflops * study.train.batch_size * study.train.steps}, 0
    for what, grid, times in (
        ("sweep", study.sweep, 1), ("early", few, len(study.train.keep_steps)),
    ):
        subject = dataclasses.replace(subject_lib.of_member(study, member), sweep=grid)
        planned = subject_lib.planned(subject)
        gflops[what] = times * sum(subject_lib.work(subject, size, i) for i in planned)
        pictures += times * sum(i.num_images for i in planned)
    rate = PEAK * SHARE * min(2.0, spec.base_channels / WIDTH)
    found = {what: (g / 1e6, g * 1e9 / rate / 60) for what, g in gflops.items()}
    return found | {"decoding": (0.0, _DECODES * pictures / 60)}


def seconds(study: Study, member: str) -> float:
    """Of all of it."""
    return 60 * sum(minutes for _, minutes in reckon(study, member).values())


def budget(config: str) -> list[str]:
    """Lines: PFLOP and minutes of each member, and of all."""
    study = study_of(config)
    rows = {member: reckon(study, member) for member in study.members}
    parts = list(rows[study.members[0]])
    rows["all"] = {
        part: tuple(sum(row[part][i] for row in rows.values()) for i in (0, 1)) for part in parts
    }
    return [f"PFLOP (minutes, by what was measured in training): {', '.join(parts)}",
            *(_line(name, list(row.values())) for name, row in rows.items())]


def _line(name: str, row: Sequence[tuple[float, float]]) -> str:
    cells = [f"{pflop:8.2f} ({minutes:.2f})" for pflop, minutes in row]
    return f"{name:10s} {'  '.join(cells)}"
