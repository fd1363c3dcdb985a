"""The small scaling study of configs/h200_ladder.py in stretches, on machines that keep nothing.

    python benchmarks/gpu/ladder.py budget                     FLOPs and minutes, reckoned
    python benchmarks/gpu/ladder.py hand --to=HANDED --python=3.12    where there is no index
    python benchmarks/gpu/ladder.py hand --to=HANDED --from=OUT_BEFORE        the next machine's
    python benchmarks/gpu/ladder.py run --workdir=W --to=OUT [--from=OUT_BEFORE] [--minutes=8.5]
    python benchmarks/gpu/ladder.py report --workdir=W --from=OUT      page and figures, anywhere

`run` prepares the data, the autoencoder and its latents, while `ahead.py` compiles what members
will run, training first; then as many are at work as have 280 channels together (`--channels`), the
narrowest first, a process each: small networks leave a GPU idle that others fill (six at once
trained at 29,500 images/s, `c128_s16` and `c64_s16` alone at 16,600 and 24,900). When these have
ended a row of each is timed with nothing beside it, which is what records' seconds are reckoned
from, and the next begin, but for one that would need more time alone than is left. Each is trained,
swept and its early checkpoints measured by `ldm-scaling`, which goes on where it was. When the
minutes are used up but for those that this takes, `run` ends the commands at work (a training run
saves first), times the members that are done, and packs what is worth keeping into OUT, as it does
whenever a member is done and every minute, in parts of at most 15 MB: see packing.py. `report` is
of the members that are done, and of what the others have measured, and says which those are; of
several stretches that ended on different machines, run it with `--from` each of their folders, in
their order.

`hand` is handing.py, `budget` reckoning.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import bench
import handing
import packing
import reckoning
from packing import APART, COMPILED, SECONDS, alone
from reckoning import ROOT, guided, study_of
from together import FLAGS

from ldm_scaling import files
from ldm_scaling.errors import SAVED, UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import workdir as workdir_lib

# An early checkpoint is measured with one sampler of one length, and always guided.
EARLY = {"sweep.samplers": "('ddim',)", "sweep.steps": "(10,)"}
# What a workdir for an early checkpoint shares with the ladder's.
SHARED = ("data", "text", "latents", "autoencoder", "reference", "latent_scale.json")
# Seconds that a run has to save itself, for who goes on here; to be held back to time a member's
# rows, to begin with that, and to pack.
_SAVES, _ROWS, _BEGINS, _PACKS = 15.0, 8.0, 15.0, 15.0
_WITHOUT_EARLY = "without_early.txt"
_INTERRUPTED = (130, -signal.SIGINT)
_WAIT = 0.5
# Seconds between packs while it is at work: a machine may be gone before a member is done.
_PACKED = 60.0
# Programs that are compiled at a time, and the MiB of a card that these need: seven filled 141 GB.
_COMPILERS, _ROOMY, _FEWER = 4, 100_000, 2
_TRAIN, _SAMPLERS = "train", "samplers"


class Clock:
    """Minutes that are left.

    Args:
      minutes: in all.
    """

    def __init__(self, minutes: float):
        self._start = time.monotonic()
        self._end = self._start + 60 * minutes
        self._held = 0.0

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds, without those that are held back."""
        return self._end - self._held - time.monotonic()

    @contextlib.contextmanager
    def holding(self, seconds: float) -> Iterator[None]:
        """Keeps seconds of the end for what comes after."""
        self._held += seconds
        try:
            yield
        finally:
            self._held -= seconds


class Ladder:
    """The study in its workdir.

    Args:
      config: FILE[:argument].
      workdir: where it works.
      clock: what is left of the stretch.
      to: where it packs.
      channels: of the members that are at work side by side, the narrowest first; one alone may
        have more.
    """

    def __init__(self, config: str, workdir: Path, clock: Clock, to: Path, channels: int = 280):
        self.config, self.workdir, self.clock, self.to = config, workdir, clock, to
        self.channels = channels
        self.study = study_of(config)
        self.log: list[str] = []
        self._finishing = threading.Lock()
        self._packing = futures.ThreadPoolExecutor(1)
        self._compiling: set[subprocess.Popen] = set()
        self._given_up, self._interrupted = threading.Event(), threading.Event()
        self._timed: set[str] = set()

    @property
    def done(self) -> list[str]:
        """Members that are trained and swept, early checkpoints aside."""
        return packing.done(self.workdir)

    def finish(self, name: str) -> None:
        """Takes what a member has made to the study's own, and notes that it is done."""
        apart = self.workdir / APART / name
        with self._finishing:  # Others may end at the same time.
            for steps in self.study.train.keep_steps:
                self._bind(self.workdir / "early" / str(steps), steps)
            for pattern in ("records/*", "strips/*", "early/*/records/*", "models/*/curves.csv"):
                for found in sorted(apart.glob(pattern)):
                    target = self.workdir / found.relative_to(apart)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)
                    os.link(found, target)
            packing.note(self.workdir, dict.fromkeys([*self.done, name]))
            self.say(f"{name} is done")
            self._packing.submit(self.pack, self.to)  # The next need not wait for it.

    def command(self, name: str, workdir: Path, changed: dict[str, str]) -> bool:
        """Runs a command of `ldm-scaling`; False where time ran out.

        Raises:
          UserError: where it failed otherwise.
        """
        flags = [f"--config.{key}={value}" for key, value in changed.items()]
        told = "_".join([name, *workdir.relative_to(self.workdir).parts])
        line = ["-m", "ldm_scaling", name, f"--config={self.config}", f"--workdir={workdir}"]
        return self._twice(told, [*line, *flags])

    def ahead(self, what: str, *words: str, **flags: Path) -> bool:
        """Runs `ahead.py`; False where time ran out."""
        script = Path(__file__).resolve().with_name("ahead.py")
        line = [
            os.fspath(script), what, *words, f"--config={self.config}",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        told = "_".join([what, *(word.lstrip("-") for word in words)])
        if what != "programs":
            return self._twice(told, line)
        # Behind those who are waited for, and no more memory than what is at work.
        return self._process(told, line, 10, XLA_PYTHON_CLIENT_ALLOCATOR="platform")

    def _twice(self, told: str, line: Sequence[str]) -> bool:
        """A process, and where it fails another: it goes on where that was, and a card has its
        moments."""
        try:
            return self._process(told, line)
        except UserError:
            return self._process(told, line)

    def _process(self, told: str, line: Sequence[str], nice: int = 0, **more: str) -> bool:
        if self.clock.left < _SAVES or self._interrupted.is_set():
            return False
        env = {**bench.MEMORY, "JAX_COMPILATION_CACHE_DIR": str(self.workdir / COMPILED),
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
               "OPENBLAS_NUM_THREADS": "2",  # Many processes share the cores.
               "XLA_FLAGS": f"--{FLAGS.replace(',', ' --')}", **os.environ, **more}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        logs = self.workdir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(logs / f"{told}.txt", "a") as log:
            process = subprocess.Popen(
                ["nice", "-n", str(nice), sys.executable, *line], cwd=ROOT, env=env, stdout=log,
                stderr=log,
            )
            if nice:
                self._compiling.add(process)
            try:
                status = process.wait(max(self.clock.left, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SAVES)
                process.kill()
                process.wait()
                # It may have ended well within its grace.
                status = SAVED if process.returncode else 0
            self._compiling.discard(process)
        self.say(f"{told}: {time.monotonic() - start:.0f} s, status {status}")
        if status in _INTERRUPTED:
            self._interrupted.set()
            return False
        if status not in (0, SAVED):
            last = (logs / f"{told}.txt").read_text().strip().splitlines()[-1:]
            raise UserError(f"{told} ended with status {status}: {' '.join(last)}")
        return status == 0

    def say(self, what: str) -> None:
        """To the log, with the time of the stretch."""
        self.log.append(f"{self.clock.gone:5.0f} s  {what}")
        print(self.log[-1], flush=True)

    def member(self, name: str, ready: Callable[[], bool] = lambda: True) -> bool:
        """Trains and measures a member, from latents that are there; whether it is done. It is so
        without its early checkpoints too; a run in this workdir tries these again. What measures it
        begins when `ready`."""
        only = {"members": f"('{name}',)"}
        apart = self.workdir / APART / name
        self._bind(apart)
        if not (self.command("train", apart, only) and self.wait(ready)):
            return False
        with futures.ThreadPoolExecutor(1) as beside:
            early = beside.submit(self._early, name, apart, only)
            whole = self.command("sweep", apart, only)
        try:
            missing = None if early.result() else "the time was up"
        except UserError as e:
            missing = str(e)
        if not whole:
            return False
        # Its own records are not lost for those of early checkpoints.
        if missing:
            self.say(f"{name} is without early checkpoints: {missing}")
            files.atomic_write_text(apart / _WITHOUT_EARLY, missing + "\n")
        else:
            (apart / _WITHOUT_EARLY).unlink(missing_ok=True)
        self.finish(name)
        return True

    def _early(self, name: str, apart: Path, only: dict[str, str]) -> bool:
        for steps in self.study.train.keep_steps:
            kept = apart / "models" / name / "checkpoints" / str(steps)
            early = apart / "early" / str(steps)
            self._bind(early, steps)
            target = early / "models" / name / "checkpoints" / str(steps)
            _link(kept, target)
            changed = only | EARLY | {
                "sweep.guidance": str(guided(self.study.sweep.guidance)),
                "train.steps": str(steps), "train.keep_steps": "()",
            }
            if not self.command("sweep", early, changed):
                return False
        return True

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Until something is ready; False where time ran out."""
        while not ready():
            if self.clock.left < _SAVES:
                return False
            time.sleep(_WAIT)
        return True

    def _bind(self, folder: Path, steps: int | None = None) -> None:
        """Makes a workdir of this study, of so many steps, that shares what all members do."""
        if not (folder / workdir_lib.MARKER).exists():
            train = self.study.train
            if steps:
                train = dataclasses.replace(train, steps=steps, keep_steps=())
            workdir_lib.Workdir(folder).bind(dataclasses.replace(self.study, train=train))
        for shared in SHARED:
            place = folder / shared
            if not place.is_symlink():
                place.symlink_to((self.workdir / shared).resolve())

    def run(self) -> bool:
        """What is missing; whether all is done.

        Raises:
          UserError: where a command failed; the others have gone on.
        """
        members, failed = self.study.members, None
        left = [
            name for name in members
            if name not in self.done or (self.workdir / APART / name / _WITHOUT_EARLY).exists()
        ]
        with self.clock.holding(_BEGINS + _PACKS + _SAVES):
            try:
                whole = not left or self._all_of(left)
            except UserError as e:
                whole, failed = False, e
            finally:
                self._packing.shutdown(cancel_futures=True)  # One pack at a time; the last follows.
        try:
            self._time_rows()
        except UserError as e:
            failed = failed or e
        if failed:
            raise failed
        return whole and set(members) <= set(alone(self.workdir / SECONDS))

    def _time_rows(self) -> None:
        """Of members that are done, with nothing at work; those of earlier stretches again, once:
        they may have had another card."""
        timed = alone(self.workdir / SECONDS)
        new = [name for name in self.done if name not in timed]
        old = [name for name in self.done if name in timed and name not in self._timed]
        if new:
            with self.clock.holding(_PACKS):
                self.ahead("seconds", *new, *old, to=self.workdir / SECONDS)
            self._timed.update(new, old)

    def _all_of(self, left: Sequence[str]) -> bool:
        """Prepares what all need, trains and measures members."""
        with (
            futures.ThreadPoolExecutor(1) as beside,
            futures.ThreadPoolExecutor(compilers(_memory())) as pool,
        ):
            parts = [(f"--{part}", name) for part in (_TRAIN, _SAMPLERS) for name in left]
            compiled = {words: pool.submit(self._compile, *words) for words in ((), *parts)}
            beside.submit(self._pack_on)
            try:
                if not self._prepared():
                    return False
                self._packing.submit(self.pack, self.to)
                return self._members(left, compiled)
            finally:
                self._given_up.set()
                for process in list(self._compiling):
                    process.terminate()

    def _prepared(self) -> bool:
        """What all members need."""
        if not self.ahead("data", workdir=self.workdir):
            return False
        with futures.ThreadPoolExecutor() as pool:
            return all(list(pool.map(
                lambda what: self.ahead(what, workdir=self.workdir), ("latents", "reference")
            )))

    def _members(self, left: Sequence[str], compiled: Mapping[tuple, futures.Future]) -> bool:
        """Those that are left, as many at once as there is room for."""

        def one(name: str) -> bool:
            return self.wait(compiled[f"--{_TRAIN}", name].done) and self.member(
                name, compiled[f"--{_SAMPLERS}", name].done)

        left, ended, failed = list(left), [], None
        while left:
            group = self._group(left)
            need = reckoning.seconds(self.study, group[0])
            # The first is begun in any case: a stretch that is too short for it goes on with it.
            if ended and need > self.clock.left:
                self.say(f"{', '.join(left)} not begun: {group[0]} alone would take {need:.0f} s")
                ended.append(False)
                break
            left = left[len(group):]
            with (
                self.clock.holding(_ROWS * len({*group, *self.done} - self._timed)),
                futures.ThreadPoolExecutor(len(group)) as pool,
            ):
                begun = [pool.submit(one, name) for name in group]
            for found in begun:
                try:
                    ended.append(found.result())
                except UserError as e:
                    failed = failed or e
                    ended.append(False)
            if left and self.wait(lambda: all(found.done() for found in compiled.values())):
                with contextlib.suppress(UserError):  # It is tried again at the end.
                    self._time_rows()
        if failed:
            raise failed
        return all(ended)

    def _group(self, left: Sequence[str]) -> list[str]:
        """The next ones of so many channels together; at least one."""
        widths = itertools.accumulate(zoo.get(name).spec.base_channels for name in left)
        return list(left[:max(1, sum(width <= self.channels for width in widths))])

    def _compile(self, *words: str) -> None:
        """Programs ahead of those who need them; without them they compile their own."""
        with contextlib.suppress(UserError):  # It is in the logs.
            if not self._given_up.is_set():
                self.ahead("programs", *words)

    def _pack_on(self) -> None:
        """Packs from time to time, what members that are not done have measured too."""
        while not self._given_up.wait(_PACKED):
            self._packing.submit(self.pack, self.to)

    def pack(self, to: Path) -> list[str]:
        """Writes what is worth keeping; lines of sizes."""
        with self._finishing:  # A member that is noted as done in between would lack its records.
            found = [
                packing.read(of(self.workdir, self.study))
                for of in (packing.to_go_on, packing.for_home)
            ]
        lines = []
        for archive, bodies in zip(packing.ARCHIVES, found, strict=True):
            lines += packing.write(to, archive, bodies)
        files.atomic_write_text(to / "ladder.log", "\n".join(self.log) + "\n")
        return lines

    def report(self) -> None:
        """The page of all records, and the figures of these and the early ones; says of which
        members not all is there. Raises `UserError` where one of them fails."""
        with packing.with_partial(self.workdir, self.study.members) as lines:
            for line in lines:
                print(line)
            for name in packing.reckon_seconds(self.workdir):
                print(f"{name}: its rows were not timed alone, its seconds are of a device that "
                      "was shared")
            self.command("report", self.workdir, {})
            together = packing.gathered(self.workdir)
            self._process("figure", ["-m", "ldm_scaling", "figure", f"--records={together}",
                                     f"--to={self.workdir / 'figures_all'}"])


def compilers(mib: float | None) -> int:
    """How many programs are compiled at a time, on a card of so much memory; of None nothing is
    known."""
    return _FEWER if mib is not None and mib < _ROOMY else _COMPILERS


def _memory() -> float | None:
    """MiB of the smallest card; asked of the driver, for JAX would take some."""
    line = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(line, capture_output=True, text=True, timeout=20).stdout
        return min(map(float, said.split()))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _link(source: Path, target: Path) -> None:
    """A folder at a second place, whole or not at all; its files take no more room."""
    if not target.exists():
        with files.atomic_folder(target) as temporary:
            shutil.copytree(
                source, os.fspath(temporary), copy_function=os.link, dirs_exist_ok=True
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("budget", "hand", "run", "report"))
    parser.add_argument("--config", default="configs/h200_ladder.py", metavar="FILE[:argument]")
    parser.add_argument("--workdir", type=Path, default=Path("runs/h200_ladder"))
    parser.add_argument("--to", type=Path, default=Path("runs/h200_ladder_out"))
    parser.add_argument("--from", dest="source", type=Path, help="what an earlier run packed")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--python", default="", help="hand: with wheels for this version")
    parser.add_argument(
        "--limit", type=float, default=64.0,
        help="hand: MiB of what it writes and this repository; 0 is none")
    parser.add_argument(
        "--channels", type=int, default=280, help="of the members that are at work side by side")
    args = parser.parse_args(argv)
    try:
        if args.what == "budget":
            print("\n".join(reckoning.budget(args.config)))
            return 0
        if args.what == "hand":
            print("\n".join(
                handing.hand(args.config, args.to, args.python, args.limit, args.source)))
            return 0
        # What an earlier run packed where this one packs is never lost.
        packed = any(args.to.glob("ladder.tar.xz.*")) and args.what == "run"
        if source := args.source or (args.to if packed else None):
            args.workdir.mkdir(parents=True, exist_ok=True)
            packing.unpack(source, args.workdir)
        minutes = args.minutes if args.what == "run" else 24 * 60
        ladder = Ladder(
            args.config, args.workdir.resolve(), Clock(minutes), args.to, args.channels)
        if args.what == "report":
            ladder.report()
            return 0
        try:
            whole = ladder.run()
        finally:
            print("\n".join(ladder.pack(ladder.to)))
        left = [m for m in ladder.study.members if m not in ladder.done]
        missing = ", ".join(left) if left else "early checkpoints, or rows to be timed"
        print("all is done" if whole else f"left: {missing}: run the same line again")
        return 0 if whole else 1
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
