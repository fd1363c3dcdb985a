"""The family: one job for each size, by one command.

    python3 launch/family.py --on=gke --workdir=/mnt/ldm/family --image=IMAGE --bucket=my-bucket
        [--dry-run]

    --on          tpu-vm, gke, slurm or local
    --members     39m,83m,... ; the whole family if not given
    --topology    the same slice for all, for example v5e:16x16
    --num-slices  with it
    --unplanned   starts a size on a slice for which it has no plan, where it has others
    --job         what is run: train (default), sweep, study, ...
    --arm         argument of every config: local is the small arm for a CPU

Every other flag goes to the launcher as it is, and what stands after  --  to each job. A member's
config is configs/t2i_MEMBER.py, its workdir WORKDIR/t2i_MEMBER, its name t2i-MEMBER with - for _.
--logs is a folder for what they print: of each job on slurm, LOGS/t2i-MEMBER/K.log on local.

Chips: --topology where given; else the plan in launch/plans/ that fits at the fewest chip-hours
(of `ldm-scaling plan`). It says which it used. A size that has plans, but none for --topology, is
refused without --unplanned. Slurm and local take what their own flags say: --nodes and --gpus,
--processes.

On tpu-vm every member has a `launch/tpu_vm.sh watch` of its own, all at the same time, until all
are done; their output is in --logs (runs/family_logs). The others are started in turn. SIGTERM and
Ctrl-C go on to what runs, and nothing more is started.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch import common, local
from launch.common import ROOT, LaunchError, entry
from launch.tpu import GENERATIONS, Slice

PLANS = ROOT / "launch" / "plans"
CONFIGS = ROOT / "configs"
LOGS = pathlib.Path("runs/family_logs")
# The paper's, the smallest first: those that run unless others are named.
PAPER = ("39m", "83m", "145m", "223m", "318m", "430m", "558m", "704m", "866m", "2b", "5b")
TRAINING = ("train", "study")
LAUNCHERS = ("tpu-vm", "gke", "slurm", "local")


@dataclasses.dataclass(frozen=True)
class Chips:
    """What a member runs on, who says so, and the flags with which it fits there."""

    tpu: Slice
    num_slices: int
    why: str
    flags: tuple[str, ...] = ()


def members_known() -> list[str]:
    """Members with a config: the paper's smallest first, then others by name."""
    found = {path.stem.removeprefix("t2i_") for path in CONFIGS.glob("t2i_*.py")}
    return [*(m for m in PAPER if m in found), *sorted(found - set(PAPER))]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a file of `ldm-scaling plan` matters here.

    Attributes:
      path: of the file.
      tpu, num_slices: where it would run.
      hours: chip-hours, a bound; infinite where it does not fit.
      takes: memory of a chip, in words.
      flags: with which it fits.
    """

    path: pathlib.Path
    tpu: Slice
    num_slices: int
    hours: float
    takes: str
    flags: tuple[str, ...]

    @property
    def chips(self) -> int:
        return self.tpu.chips * self.num_slices

    @property
    def fits(self) -> bool:
        return self.hours < float("inf")


def plans_of(member: str, folder: pathlib.Path) -> list[Plan]:
    """The plans to train the member on TPUs that can be asked for, the fewest chip-hours first.

    `ldm-scaling plan` knows others, and GPUs. Raises `LaunchError` for a damaged one.
    """
    plans = []
    for path in sorted(folder.glob(f"{member}_*.json")):
        try:
            plan = json.loads(path.read_text())
            if plan["member"] != member or plan.get("kind", "train") != "train":
                continue
            if str(plan["topology"]).partition(":")[0] not in GENERATIONS:
                continue
            tpu, slices = Slice.parse(plan["topology"]), int(plan.get("num_slices") or 1)
            days = float(plan["days_bound"]) if plan["fits"] else float("inf")
            flags = tuple(plan.get("remedies") or ())
            takes = "fits" if plan["fits"] else "does not fit"
            if plan["fits"] and plan.get("hbm_capacity_gb"):
                takes = f"takes {plan['hbm_gb']:.1f} of {plan['hbm_capacity_gb']:.1f} GB a chip"
        except (KeyError, TypeError, ValueError) as e:
            raise LaunchError(
                f"{path} is no plan ({type(e).__name__}: {e}): make it again by  ldm-scaling plan"
            ) from e
        plans.append(Plan(path, tpu, slices, 24 * days * tpu.chips * slices, takes, flags))
    return sorted(plans, key=lambda plan: plan.hours)


def chips_for(member: str, topology: str, num_slices: int, folder: pathlib.Path = PLANS,
              unplanned: bool = False) -> Chips:
    """What the member runs on.

    Raises:
      LaunchError: when there is no plan, none fits, one is damaged, or there are plans but none of
        the topology that is asked for (unless it may be unplanned).
    """
    plans = plans_of(member, folder)
    if topology:
        tpu = Slice.parse(topology)
        here = [plan for plan in plans if (plan.tpu, plan.num_slices) == (tpu, num_slices)]
        if not here and plans and not unplanned:
            raise LaunchError(_not_planned(member, tpu, num_slices, plans, folder))
        if not here:
            return Chips(tpu, num_slices, "--topology, no plan")
        why = f"--topology, {here[0].path.name}" + ("" if here[0].fits else " says: does not fit")
        return Chips(tpu, num_slices, _with(why, here[0].flags), here[0].flags)
    if not plans:
        raise LaunchError(f"{member} has no plan in {folder}: give --topology=KIND:SHAPE")
    if not plans[0].fits:
        raise LaunchError(
            f"{member} fits none of the {len(plans)} plans in {folder}: give --topology=KIND:SHAPE"
        )
    best = plans[0]
    why = f"plan {best.path.name}: {best.hours:,.0f} chip-hours, a bound"
    return Chips(best.tpu, best.num_slices, _with(why, best.flags), best.flags)


def _not_planned(
    member: str, tpu: Slice, num_slices: int, plans: Sequence[Plan], folder: pathlib.Path
) -> str:
    """Of a slice that no plan is of, but some are of others."""
    chips = tpu.chips * num_slices
    near = min(plans, key=lambda plan: (
        plan.tpu.generation != tpu.generation, abs(math.log(plan.chips / chips))))
    slices, flag = (f"{num_slices}x", f"--num-slices={num_slices} ") if num_slices > 1 else ("", "")
    to = folder / f"{member}_{slices}{tpu}_train.json".replace(":", "-")
    return (
        f"--topology={tpu}: {member} has no plan for {num_slices} x {tpu}, {chips} chips; on "
        f"{near.num_slices} x {near.tpu}, {near.chips} chips, it {near.takes} "
        f"({near.path.name}). See what it takes here by  ldm-scaling plan "
        f"--config=configs/t2i_{member}.py --topology={tpu} {flag}--kind=train --to={to}  , or "
        "give --unplanned"
    )


def _with(why: str, flags: Sequence[str]) -> str:
    return f"{why}; with {' '.join(flags)}" if flags else why


def job_name(member: str) -> str:
    """Of a member's job and logs: `dit_b2` is t2i-dit-b2. Raises as `common.check_name`."""
    return common.check_name(f"t2i-{member.replace('_', '-')}")


def launch_command(on: str, member: str, chips: Chips | None, workdir: str, job: str,
                   flags: Sequence[str], rest: Sequence[str], arm: str = "") -> list[str]:
    """The launcher's command line for one member."""
    launch = ROOT / "launch"
    name = job_name(member)
    slices = []
    if chips is not None:
        slices = [f"--topology={chips.tpu}", f"--num-slices={chips.num_slices}"]
    first = {
        "tpu-vm": [str(launch / "tpu_vm.sh"), "watch", f"--name={name}", *slices],
        "gke": [sys.executable, str(launch / "gke.py"), "apply", f"--name={name}", *slices],
        "slurm": [str(launch / "slurm.sh"), f"--name={name}"],
        "local": [sys.executable, str(launch / "local.py")],
    }[on]
    return [
        *first, *flags, "--", job, f"--config=configs/t2i_{member}.py" + (f":{arm}" if arm else ""),
        f"--workdir={workdir.rstrip('/')}/t2i_{member}",
        *(chips.flags if chips else ()), *rest,
    ]


class Launchers:
    """Launchers that run, while it is entered: signals go on to them and what they call, once. One
    at a time in a process: it holds the process's signals."""

    def __init__(self):
        self.running: list[subprocess.Popen] = []
        self.asked: int | None = None

    def __enter__(self) -> Launchers:
        self.before = {s: signal.signal(s, self._asked) for s in local.SIGNALS}
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], **options) -> subprocess.Popen | None:
        """Starts one where configs/ is, in a session of its own; none once a signal has come."""
        with local.signals_wait():
            if self.asked is not None:
                return None
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True,
                                       preexec_fn=local.in_child, **options)
            self.running.append(process)
        return process

    @property
    def status(self) -> int:
        """Of all that ended well, or were not started."""
        if self.asked is None:
            return common.DONE
        return common.INTERRUPTED if self.asked == signal.SIGINT else common.SAVED

    def _asked(self, number: int, _frame: object) -> None:
        self.asked = number
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)


def start_all(commands: dict[str, list[str]], logs: pathlib.Path) -> int:
    """Runs all at the same time, each with its output in a file; the first bad status, or 0.

    After a signal none is started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    worst = 0
    with Launchers() as launchers:
        for member, command in commands.items():
            with open(logs / f"{job_name(member)}.log", "ab") as out:
                if launchers.start(command, stdout=out, stderr=subprocess.STDOUT) is None:
                    break
        for member, process in zip(commands, launchers.running, strict=False):
            status = local.status_of(process.wait())
            print(f"{member}: status {status}, {logs / f'{job_name(member)}.log'}", flush=True)
            worst = worst or status
    return worst or launchers.status


def start_in_turn(commands: dict[str, list[str]], dry: bool) -> int:
    """Runs one after the other until one ends with a bad status, which is returned, or a signal
    comes."""
    with Launchers() as launchers:
        for member, command in commands.items():
            if dry:
                print(f"# {member}", flush=True)
            process = launchers.start(command)
            if process is None:
                break
            status = local.status_of(process.wait())
            if status and status != common.UNREAD:
                print(f"launch/family.py: {member} ended with {status}", file=sys.stderr)
            if status:
                return status
    return launchers.status


def main(arguments: list[str]) -> int:
    own, rest = common.parted(arguments)
    p = argparse.ArgumentParser("launch/family.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--on", required=True, choices=LAUNCHERS)
    p.add_argument("--workdir", required=True)
    p.add_argument("--members", default="")
    p.add_argument("--topology", default="")
    p.add_argument("--num-slices", type=int)
    p.add_argument("--unplanned", action="store_true")
    p.add_argument("--job", default="train")
    p.add_argument("--arm", default="")
    p.add_argument("--logs", type=pathlib.Path)
    p.add_argument("--dry-run", action="store_true")
    given, flags = p.parse_known_args(own)
    if any(flag.partition("=")[0] == "--name" for flag in flags):
        raise LaunchError("leave out --name: each size's job has its own, t2i-MEMBER")
    if given.on == "gke" and given.logs:
        raise LaunchError(
            f"--logs={given.logs}: on gke the cluster keeps what pods print: launch/gke.py logs"
        )
    known = members_known()
    members = [m for m in known if m in PAPER]
    if given.members:
        members = [m.strip() for m in given.members.split(",")]
    for member in members:
        if member not in known:
            raise LaunchError(f"--members: no config of {member!r}; there are {', '.join(known)}")
    counted = given.num_slices is not None
    if given.on in ("slurm", "local") and (given.topology or counted):
        raise LaunchError(
            f"--on={given.on} takes no --topology and no --num-slices: give its own flags"
        )
    if counted and not given.topology:
        raise LaunchError(f"--num-slices={given.num_slices}: give --topology=KIND:SHAPE with it")
    workdir = given.workdir
    common.check_workdir(workdir)
    if given.on == "tpu-vm":  # All watches are started at once, each with its own log.
        common.check_on_hosts(workdir, any(flag.startswith("--bucket=") for flag in flags))
    if given.on in ("slurm", "local"):
        workdir = str(pathlib.Path(workdir).expanduser().absolute())
    commands = {}
    for member in members:
        chips = None
        if given.on in ("tpu-vm", "gke"):
            chips = chips_for(
                member, given.topology, given.num_slices if counted else 1,
                # Plans are of training, and of no small arm.
                unplanned=given.unplanned or bool(given.arm) or given.job not in TRAINING,
            )
            total = chips.tpu.chips * chips.num_slices
            print(f"# {member}: {chips.num_slices} x {chips.tpu}, {total} chips ({chips.why})")
        passed = [*flags, "--dry-run"] if given.dry_run else flags
        if given.logs and given.on in ("slurm", "local"):
            logs = given.logs.expanduser().absolute()
            own_logs = logs / job_name(member) if given.on == "local" else logs
            passed = [*passed, f"--logs={own_logs}"]
        commands[member] = launch_command(
            given.on, member, chips, workdir, given.job, passed, rest, given.arm
        )
    sys.stdout.flush()
    if given.on == "tpu-vm" and not given.dry_run:
        return start_all(commands, given.logs or LOGS)
    return start_in_turn(commands, given.dry_run)


if __name__ == "__main__":
    entry(main)
