"""Plans of the whole family, one file for each network, topology and kind; and how they compare
with earlier ones."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import plan as plan_lib
from ldm_scaling.study import plan_show
from ldm_scaling.study.plan import Target

TOPOLOGIES = ("v5e:16x16", "v5p:4x8x8", "v6e:16x16")
KINDS = ("train", "sample")
# The largest of each other backbone, on the first topology alone.
OTHERS = ("dit_xl2", "uvit_h", "mmdit_38", "edm2_xxl")
FOLDER = "launch/plans"
_JOB = ("member", "topology", "num_slices", "kind")
# What a figure may be worse than its baseline by: compilations are not alike to the last digit.
TOLERANCE = 0.01


def file_name(member: str, target: Target, kind: str) -> str:
    """Of a plan, e.g. `866m_v5e-16x16_train.json`; of two slices `866m_2xv5e-16x16_train.json`."""
    slices = f"{target.num_slices}x" if target.num_slices > 1 else ""
    return f"{member}_{slices}{target.topology}_{kind}.json".replace(":", "-")


def read(path: Path) -> dict[str, Any] | None:
    """A plan; None where there is none. Raises `UserError` for a file that is something else."""
    try:
        found = json.loads(path.read_text())
        if not {"member", "fits", "key"} <= set(found):
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is no plan ({e}): remove it, and it is made anew") from e
    return found


def write(path: Path, plan: Mapping[str, Any]) -> None:
    """A plan, whole or not at all."""
    files.write_json(path, plan, allow_nan=False)


def made() -> dict[str, str]:
    """The day, and the commit of this code where git knows it; `-dirty` where it was changed."""
    commit = _git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=9") \
        if _git("ls-files", Path(__file__).name) else ""
    return {"date": datetime.date.today().isoformat(), **({"commit": commit} if commit else {})}


def _came(path: Path) -> dict[str, str]:
    """The day and commit that a plan came with which does not say when it was made; nothing where
    git does not know it."""
    found = _git("log", "-1", "--format=%as %h", "--", path.name, folder=path.parent).split()
    return dict(zip(("came", "commit"), found, strict=True)) if found else {}


def _git(*words: str, folder: Path = Path(__file__).parent) -> str:
    """What git says in a folder; nothing where it cannot."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if not done.returncode else ""


@dataclasses.dataclass(frozen=True)
class _Job:
    """A plan to be had: its file, its key, and the words after `plan` that make it."""

    path: Path
    key: str
    words: tuple[str, ...]


def run(
    study_of: Callable[[str], Study], configs: Path, folder: Path, overrides: Sequence[str],
    num_slices: int = 1, batch: int | None = None, again: bool = False, jobs: int = 1,
    say: Callable[[str], None] = print, command: Sequence[str] = (), table: bool = False,
    topologies: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Makes what is missing of the family's plans, each in a process of its own, which gives its
    memory back; and the table `README.md` beside them.

    A plan whose config, code and versions are as they were is kept; one whose programs are, lowered
    anew, is renewed without compiling (`plan.known`). A run that is stopped goes on from there.

    Args:
      study_of: `--config=...` -> the config, with the overrides.
      configs: folder of `t2i_MEMBER.py`.
      folder: where plans are written.
      overrides: `--config.KEY=VALUE`, for every member.
      num_slices, batch: for every plan; the batch is that of training.
      again: compiles all anew.
      jobs: how many are made at a time; a compilation keeps one core busy.
      say: told what is done.
      command: what a plan is made by; this program if not given.
      table: makes no plan, only the table of those that are there.
      topologies: that plans are made for, other backbones on the first alone; `TOPOLOGIES` if not
        given. The table has those of others too that are there.

    Raises:
      UserError: for a config that is missing; at the end, naming the plans that could not be made.
    """
    command = command or (sys.executable, "-m", "ldm_scaling")

    def jobs_of(topologies: Iterable[str], others: Iterable[str]) -> list[_Job]:
        return [
            _job(study_of, configs, folder, overrides, Target(topology, num_slices), member, kind,
                 batch if kind == "train" else None)
            for places, members in ((topologies, [m.name for m in zoo.PAPER]), (others, OTHERS))
            for topology in places for member in members for kind in KINDS
        ]

    def show() -> list[dict[str, Any]]:
        places = dict.fromkeys((*TOPOLOGIES, *_topologies(folder)))
        there = [
            (plan, job) for job in jobs_of(places, places)
            if (plan := read(job.path)) is not None
        ]
        page = plan_show.markdown(
            [plan if "made" in plan else plan | {"made": _came(job.path)} for plan, job in there],
            stale=sum(plan["key"] != job.key for plan, job in there),
            missing=[job.path.stem for job in wanted if not job.path.exists()],
        )
        files.atomic_write_text(folder / "README.md", page)
        return [plan for plan, job in there if job in wanted]

    topologies = topologies or TOPOLOGIES
    wanted = jobs_of(topologies, topologies[:1])
    if table:
        return show()

    def make(job: _Job) -> str:
        """Why it could not be made, or nothing."""
        plan = None if again else read(job.path)
        if plan is not None and plan["key"] == job.key:
            return ""
        say(f"{job.path.name} ...")
        why = _in_process([*command, *job.words, *(("--again",) if again else ())])
        if why:
            say(f"{job.path.name}: {why}")
        return why

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        whys = list(pool.map(make, wanted))
    failed = [job.path.name for job, why in zip(wanted, whys, strict=True) if why]
    found = show()
    if failed:
        raise UserError(f"{len(failed)} plans could not be made: {', '.join(failed)}; see above")
    return found


def _topologies(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(UserError):
            if (plan := read(path)) is not None:
                yield plan["topology"]


def _job(
    study_of: Callable[[str], Study], configs: Path, folder: Path, overrides: Sequence[str],
    target: Target, member: str, kind: str, batch: int | None,
) -> _Job:
    config = configs / f"t2i_{member}.py"
    if not config.is_file():
        raise UserError(f"there is no {config}: run --all where configs/ lies")
    path = folder / file_name(member, target, kind)
    study = plan_lib.with_batch(study_of(f"--config={config}"), kind, batch)
    words = (
        "plan", f"--config={config}", f"--topology={target.topology}", f"--kind={kind}",
        f"--num-slices={target.num_slices}", f"--to={path}", "--format=json", *overrides,
        *((f"--batch={batch}",) if batch else ()),
    )
    return _Job(path, plan_lib.key(study, member, target, kind), words)


def _in_process(command: Sequence[str]) -> str:
    """Runs a command; returns why it failed, or nothing."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if not done.returncode:
        return ""
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1]


# --- the baseline -----------------------------------------------------------------------------


def worse(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What of a plan is worse than it was, beyond `TOLERANCE`: that it fits, its time, its memory.

    Where remedies changed the batch in between, times are compared for an example.
    """
    if old["fits"] and not new["fits"]:
        return ["does not fit any more"]
    if not (old["fits"] and new["fits"]):
        return []
    out = []
    for name, unit, scale in (
        ("seconds_per_step_bound", "s an example", True), ("hbm_gb", "GB", False)
    ):
        was, now = (p[name] / (p["batch"] if scale else 1) for p in (old, new))
        if now > was * (1 + TOLERANCE):
            out.append(f"{now:.4g} {unit}, was {was:.4g} (+{now / was - 1:.1%})")
    return out


def compare(plans: Sequence[Mapping[str, Any]], baseline: Path) -> list[str]:
    """One line for each plan that is worse than its baseline's.

    Raises:
      UserError: where a plan has no baseline, or it is of another job.
    """
    out = []
    for new in plans:
        target = Target(new["topology"], new["num_slices"])
        path = baseline / file_name(new["member"], target, new["kind"])
        old = read(path)
        if old is None:
            raise UserError(f"--baseline={baseline} holds no {path.name} to compare with")
        if differ := [k for k in _JOB if old.get(k) != new[k]]:
            raise UserError(f"{path} is of another job: its {differ[0]} is {old.get(differ[0])}")
        out += [f"{path.name}: {what}" for what in worse(new, old)]
    return out
