"""A study from Python: what the commands that work in a workdir do.

    from ldm_scaling.study.api import run

    records = run(config, "runs/mine")
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath

from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.study import stages, study_checks
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.records import Record, read_all
from ldm_scaling.study.workdir import Workdir

log = logging.getLogger(__name__)

_FUNCTIONS = {
    "prepare": "prepare", "cache-latents": "cache_latents", "train": "train", "sample": "sample",
    "sweep": "run_sweep", "report": "run_report", "study": "study_all", "dreambooth": "dreambooth",
}
"""Stages, as commands are called -> their functions in `stages`."""


def check(
    stage: str, study: Study, workdir: Workdir, prompted: bool = False, dry: bool = False
) -> Materials:
    """What a stage works with, see `study_checks.check`, which raises.

    Args:
      stage: its command's name.
      study: the config.
      workdir: where it will work.
      prompted: of `sample`, whether prompts are given; else captions of its data are drawn.
      dry: whether nothing is done, and only reckoned what it would take.
    """
    draws = stage == "sample"
    return study_checks.check(
        study, workdir, measured=stage not in ("sample", "report") and not dry,
        trains=stage in ("prepare", "train", "study"),
        pictures=draws and not prompted, text=draws and prompted,
    )


def do(stage: str, materials: Materials, **values: Any) -> list[str]:
    """Does what of a stage is missing; returns what there is to tell, files among it.

    Args:
      stage: its command's name.
      materials: of the study.
      **values: of `sample`, see `stages.sample`.
    """
    told = getattr(stages, _FUNCTIONS[stage])(materials, **values)
    return [told] if isinstance(told, str) else told or []


def run(
    config: Mapping[str, Any] | None, workdir: epath.PathLike, stage: str = "study"
) -> list[Record]:
    """Does what the command `ldm-scaling STAGE --config=... --workdir=DIR` does, in this process:
    all that is missing, and only that. Killed or stopped, the same call goes on.

    Args:
      config: as a file in configs/ returns it (`config.default()` has all keys), or a plain dict of
        what differs from that; None is the one that was last used in the workdir, which keeps it.
      workdir: where everything is written, `log.txt` too. It is locked meanwhile.
      stage: `study`, which is all of these in order: `prepare`, `train`, `sample`, `sweep`,
        `report`; or one of them, or `cache-latents` or `dreambooth`.
    Returns:
      All records that the workdir holds then, of other configs too; `Record.flat` is a row of a
      table.
    Raises:
      UserError: for what the user can mend, most of it before anything is computed or written: a
        stage that there is not, a config that cannot be, a workdir of another config or in use.
    """
    if stage not in _FUNCTIONS:
        raise UserError(f"no stage is called {stage!r}; choose {', '.join(_FUNCTIONS)}")
    with contextlib.suppress(RuntimeError):  # Of JAX, where it has made arrays: devices stay.
        hosts.begin()
    place = Workdir(workdir)
    materials = check(stage, place.study(config), place)
    if stage == "report":
        stages.require_records(materials)
    with place.held(materials.study):
        log.info("%s, from Python", stage)
        do(stage, materials)
    return read_all(place / "records")
