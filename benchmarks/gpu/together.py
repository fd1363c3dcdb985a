"""Several pieces at once: they compile side by side and measure one at a time.

    python benchmarks/gpu/together.py --to=runs/gpu [--minutes=5] [SCRIPT:PIECE[:FLAGS] ...]

Where a program takes minutes to compile and seconds to measure, this is what a short stretch of a
GPU is best spent on. Each piece is a process; one that is ready to measure has the card for itself,
all others being stopped (SIGSTOP), who has had fewest turns first. FLAGS are XLA's, without their
dashes and with commas between them; pieces without any have `--flags`. When the minutes are used up
what has not measured is ended. What is done in the folder is not done again; flags other than
`--flags` make a folder of their own, and what was measured with others in a folder is refused. Logs
are in `TO/logs`, the results where the scripts have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench

from ldm_scaling.errors import UserError

GPU = Path(__file__).resolve().parent
# 866M, us and diffusers, training and sampling; 39M; the decoder.
PIECES = (
    "train_step:peer_032", "sampling:peer_008", "train_step:ours_032", "sampling:ours_008",
    "sampling:small_128", "sampling:decoder_008", "kernels:train_step", "train_step:parity",
    "sampling:parity",
)
# What took least to compile without costing speed (results/2026-11-26_h200.md).
FLAGS = "xla_gpu_autotune_level=1,xla_gpu_enable_triton_gemm=false"
# Seconds until what a stopped process has sent to the card is through.
_DRAIN = 0.5
# Seconds in which one that has measured ends, or asks again.
_LEAVE = 2.0


@dataclasses.dataclass
class Job:
    """A piece at work.

    Args:
      told: SCRIPT:PIECE[:FLAGS].
      to: folder of results.
      flags: of pieces that name none.
      more: the line's other flags, for every script.
    """

    told: str
    to: Path
    flags: str
    more: tuple[str, ...]

    def __post_init__(self):
        self.script, self.piece, *own = self.told.split(":")
        if not (GPU / f"{self.script}.py").exists():
            raise SystemExit(f"{self.told}: there is no {GPU / self.script}.py")
        self.name = self.told.replace(":", "_").replace(",", "_").replace("=", "_")
        if own:
            self.flags, self.to = own[0], self.to / own[0].replace(",", "_").replace("=", "_")
        self.process: subprocess.Popen | None = None
        self.turns = 0

    @property
    def done(self) -> bool:
        """Whether its result is there. Raises `UserError` for one of other flags."""
        path = self.to / self.script / f"{self.piece}.json"
        if not path.exists():
            return False
        bench.check_flags(path, self.environment()["XLA_FLAGS"])
        return True

    def environment(self) -> dict[str, str]:
        """Of its process."""
        flags = " ".join(f"--{flag}" for flag in self.flags.split(",") if flag)
        return {**bench.MEMORY, **os.environ, "PYTHONUNBUFFERED": "1",
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}

    def start(self, logs: Path, turns: Path) -> None:
        """Begins it, in a group of its own that can be stopped whole."""
        env = self.environment() | {bench.TURNS: str(turns)}
        line = [sys.executable, str(GPU / f"{self.script}.py"), f"--to={self.to}",
                f"--piece={self.piece}", *self.more]
        with open(logs / f"{self.name}.txt", "w") as log:
            self.process = subprocess.Popen(
                line, env=env, stdout=log, stderr=log, start_new_session=True
            )
        self.asks = turns / f"{self.process.pid}.ready"
        self.may = turns / f"{self.process.pid}.go"

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def send(self, what: signal.Signals) -> None:
        """To all of its processes."""
        if self.runs:
            os.killpg(self.process.pid, what)


def work(jobs: list[Job], seconds: float, logs: Path) -> None:
    """All of them, until they are done or the seconds are used up."""
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def say(job: Job, what: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {job.told}: {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            job.start(logs, Path(folder))
        told = set()
        try:
            while (at_work := [j for j in jobs if j.runs]) and time.monotonic() - start < seconds:
                for job in jobs:
                    if not job.runs and job.told not in told:
                        told.add(job.told)
                        say(job, "done" if job.done else f"status {job.process.returncode}")
                # Who has measured least: sides that measure several times do so in turns.
                ready = min(
                    (j for j in at_work if j.asks.exists()), key=lambda j: j.turns, default=None
                )
                if ready is None:
                    time.sleep(0.05)
                    continue
                others = [j for j in at_work if j is not ready]
                for job in others:
                    job.send(signal.SIGSTOP)
                time.sleep(_DRAIN)
                ready.asks.unlink()
                ready.may.touch()
                ready.turns += 1
                say(ready, f"measures ({ready.turns})")
                while ready.runs and ready.may.exists() and time.monotonic() - start < seconds:
                    time.sleep(0.02)
                # One that is through gives its memory back before the next takes any.
                end = time.monotonic() + _LEAVE
                while ready.runs and not ready.asks.exists() and time.monotonic() < end:
                    time.sleep(0.02)
                for job in others:
                    job.send(signal.SIGCONT)
        finally:
            for job in jobs:
                if job.runs:
                    say(job, "ended")
                    job.send(signal.SIGKILL)
                    job.process.wait()
                elif job.told not in told:
                    say(job, "done" if job.done else f"status {job.process.returncode}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", default=PIECES, metavar="SCRIPT:PIECE[:FLAGS]")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"), help="folder of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which all is ended")
    parser.add_argument("--flags", default=FLAGS, help="XLA's, with commas")
    args, more = parser.parse_known_args(argv)
    # Stopped processes would keep the card.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs = [Job(told, args.to, args.flags, tuple(more)) for told in args.pieces]
    try:
        jobs = [job for job in jobs if not job.done]
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    work(jobs, 60 * args.minutes, args.to / "logs")
    failed = [job for job in jobs if not job.done]
    for job in failed:
        lines = (args.to / "logs" / f"{job.name}.txt").read_text().splitlines() or ["nothing"]
        print(f"not done: {job.told}: {lines[-1][:300]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
