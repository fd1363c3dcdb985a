"""The workdir: where a study's files lie, which config it is bound to, and its log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from ldm_scaling import config, files
from ldm_scaling.config import LEFT_OUT, LENGTH, Study
from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)

MARKER = "study.json"
_LOOKING_S = 5.0
# What a workdir may hold whose config has decided nothing: data sets lie in folders of their own,
# and weights are known by their files.
_UNDECIDED = {MARKER, "log.txt", "logs", "data", "weights.json", "compiled"}


class Workdir:
    """Paths of a study.

        study.json            what the workdir is bound to, and the config that was used last
        log.txt               everything that was logged, tracebacks too
        logs/process_K.txt    the same of the other processes, where there are several
        data/                 the prepared pictures
        text/                 the text states of their captions
        weights.json          hashes of published weights' files
        autoencoder/          checkpoints/, events/, samples/, curves.csv
        latents/, buckets/    the training and validation latents, square and of other aspects
        latent_scale.json     what latents are multiplied by: all that drawing needs of them
        models/NAME/          as autoencoder/, one folder a member; averages/ where it tracks some;
                              NAME_run1/ of the second time that it was trained, and so on
        finetuned/TASK_HASH/  members trained further: NAME/ as autoencoder/; DreamBooth's has more
        distilled/METHOD_HASH/ students: NAME/STAGE/ as autoencoder/
        cascades/             base_HASH/NAME/, upper_HASH/NAME/ as autoencoder/
        small_N/              latents of pictures N times smaller
        baselines/            what restored pictures are held against
        reference/            statistics of the real pictures, the caption probe
        records/KEY.json      one record per configuration
        rates/KEY.json        a short run at a learning rate, see `ldm-scaling rates`; its figure
        averages/KEY.json     a member with an average of a length, see `ldm-scaling averages`; its
                              figure; records/, strips/ and seconds/ as a sweep's
        features/KEY.npz      features of a racing sweep between its rounds
        seconds/KEY.json      measured seconds of each network's programs
        strips/KEY.png        the first pictures of each configuration
        samples/              grids that `ldm-scaling sample` drew
        figures/              plots: PNG, SVG, PDF and CSV
        compiled/             programs that several processes compiled, for their next start
        report.html
    """

    def __init__(self, path: epath.PathLike):
        """Raises `UserError` for a URL: a bucket must be mounted."""
        if "://" in os.fspath(path):
            raise UserError(
                f"workdir {os.fspath(path)}: buckets are not written directly: mount it, for "
                "example with gcsfuse, and give the path there"
            )
        self.path = epath.Path(path).expanduser()

    def __truediv__(self, name: str) -> epath.Path:
        return self.path / name

    def member(self, name: str) -> epath.Path:
        """Folder of a member's training run; of a further one by its name, see `config.repeats`."""
        return self.path / "models" / name

    def last_config(self, key: str = "") -> Study:
        """The config that was used last here, as `bind` kept it.

        Args:
          key: of another study's config, where that names this workdir.
        Raises:
          UserError: when the workdir holds none: it is not there, or older than this.
        """
        body = self._marker()
        of = f"config: {key}: " if key else ""
        where = " in that workdir" if key else ""
        if key and body is None:
            raise UserError(
                f"{of}{self.path / MARKER} is not there: give --config=FILE with --config.{key}="
                "WORKDIR, where it lies now"
            )
        if body is None or "config" not in body:
            what = "holds no config" if body else "is not there"
            name = "" if body else "name a study's workdir, or "
            raise UserError(
                f"{of}{self.path / MARKER} {what}: {name}give --config=FILE once{where}, the "
                "workdir keeps it"
            )
        try:
            return config.parse(body["config"])
        except UserError as e:
            raise UserError(
                f"{of}{self.path / MARKER}: {e}; give --config=FILE anew{where}") from e

    def study(self, given: Mapping[str, Any] | None = None, source: str = "") -> Study:
        """That of a config that is given, as `config.parse` takes it, or of the last one here; of
        another source of data, where that is given.

        Raises:
          UserError: for a config that cannot be, or where none is given and the workdir has none.
        """
        if source and not given:
            given = dataclasses.asdict(self.last_config())
        return config.parse(given, source) if given else self.last_config()

    @property
    def bound_source(self) -> str:
        """`data.source` of the config that this is bound to; empty where that says none."""
        body = self._marker() or {"identity": {}}
        return body["identity"].get("data", {}).get("source", "")

    def check_new(self, study: Study) -> None:
        """Raises `UserError` where a study would begin here that is one which none begins with."""
        if self._marker() is None:
            study.require_new()

    def bind(self, study: Study, keep_last: bool = False) -> None:
        """Ties the workdir to a config, or checks that it is tied to this one; keeps the config.

        One that holds nothing yet that its config decided is tied anew, with a warning.

        Args:
          study: the config.
          keep_last: where the workdir has a last config, it stays that.
        Raises:
          UserError: when the folder cannot be used, or belongs to another config; it names the
            keys that differ. Nothing is written then.
        """
        self.check_new(study)
        body = self._marker()
        want = json.loads(json.dumps(
            {"name": study.name, "identity": study.identity(), "config": dataclasses.asdict(study)}
        ))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise self._unusable(e) from e
        if body is None:
            for name in ("autoencoder", "models", "latents", "records"):
                if (self.path / name).exists():
                    raise UserError(
                        f"{self.path / MARKER} is missing but {self.path / name} is there, of an "
                        "unknown config: restore the file, or choose another --workdir"
                    )
        elif changed := _differences(body["identity"], want["identity"]):
            more = f"; and {len(changed) - 4} more" if changed[4:] else ""
            shown = "; ".join(changed[:4]) + more
            if {p.name for p in self.path.glob("[!.]*")} - _UNDECIDED:
                only = {key.split(" ")[0] for key in changed} <= {f"train.{k}" for k in LENGTH}
                longer = (
                    "; members go on from its checkpoints in another, with "
                    f"--config.start.workdir={self.path} --config.start.take=run: docs/training.md"
                    if only else "")
                raise UserError(
                    f"the workdir {self.path} belongs to another config ({shown}): choose another "
                    f"--workdir, or give the config it was made with{longer}"
                )
            study.require_new()
            log.warning("the workdir %s, in which nothing is made yet but pictures, is of this "
                        "config from now on (%s)", self.path, shown)
            body = None
        if not os.access(self.path, os.W_OK):
            raise UserError(f"cannot write to the workdir {self.path}: choose another --workdir")
        if body != want and not (keep_last and body and "config" in body):
            text = json.dumps(want, indent=1, sort_keys=True) + "\n"
            files.atomic_write_text(self.path / MARKER, text)

    def _marker(self) -> dict[str, Any] | None:
        """What study.json holds; None where there is none."""
        marker = self.path / MARKER
        try:
            body = json.loads(marker.read_text()) if marker.exists() else None
            if body is not None and not isinstance(body.get("identity"), dict):
                raise ValueError("it has no identity")
        except OSError as e:
            raise self._unusable(e) from e
        except (ValueError, AttributeError) as e:
            raise UserError(
                f"{marker} is damaged ({e}): restore it, or choose another --workdir"
            ) from e
        return body

    def _unusable(self, e: OSError) -> UserError:
        return UserError(
            f"cannot use the workdir {self.path}: {e.strerror or e}; choose another --workdir"
        )

    def lock(self) -> IO[str]:
        """Holds the workdir for this process while the returned file is open.

        Then removes what killed runs left half-written, see `files.remove_leftovers`. A lock ends
        with its process, however.

        Raises:
          UserError: when another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = files.lock(
                self.path / ".lock",
                f"another process works in {self.path}: wait for it, or choose another --workdir",
            )
        except OSError as e:
            raise self._unusable(e) from e
        # `figure` and `averages` draw without the lock. Of a folder that is no workdir, a home
        # given by mistake, nothing is ours.
        if (self.path / MARKER).exists():
            files.remove_leftovers(self._temporary())
        return file

    def _temporary(self) -> Iterator[epath.Path]:
        """Temporary files and folders of `files`, as far as some seconds of looking go; none within
        checkpoints, which are Orbax's, nor in another workdir below this one."""
        until = time.monotonic() + _LOOKING_S
        for folder, below, inside in os.walk(self.path):
            if time.monotonic() > until:
                return
            if MARKER in inside and epath.Path(folder) != self.path:
                below.clear()
                continue
            for name in (*below, *inside):
                if name.startswith(".tmp-"):
                    yield epath.Path(folder) / name
            kept = "_CHECKPOINT_METADATA" in inside
            below[:] = [] if kept else [name for name in below if not name.startswith(".tmp-")]

    @contextlib.contextmanager
    def held(self, study: Study, keep_last: bool = False) -> Iterator[None]:
        """Within it this process alone works here, on this study, and logs to its file: see `lock`,
        `bind` and `log_to_file`, which raise."""
        with self.lock():
            self.bind(study, keep_last)
            with self.log_to_file():
                yield

    def log_file(self, process: int = 0) -> epath.Path:
        """Where a process logs."""
        return self.path / (f"logs/process_{process}.txt" if process else "log.txt")

    @contextlib.contextmanager
    def log_to_file(self, process: int = 0) -> Iterator[None]:
        """Logs everything to the process's file, and nothing to the terminal, inside the context.

        Raises:
          UserError: when the file cannot be opened. Where it cannot be written later, such as on a
            full disk, that is told once and the work goes on.
        """
        path = self.log_file(process)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = _LogFile(os.fspath(path), encoding="utf-8", errors="backslashreplace")
        except OSError as e:
            raise self._unusable(e) from e
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.setLevel(logging.INFO)
        root = logging.getLogger()
        levels = {logger: logger.level for logger in (root, *root.handlers)}
        for other in root.handlers:  # The terminal is for progress bars and one-line errors.
            other.setLevel(logging.CRITICAL + 1)
        root.addHandler(handler)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            root.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log on a disk that may be full."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"ldm-scaling: cannot write {self.baseFilename}: {error.strerror or error}; "
                  "what is logged is lost", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Which keys of two identities differ, and how; what one leaves out is at its default."""
    usual, a, b = (_flat(json.loads(json.dumps(tree))) for tree in (LEFT_OUT, there, here))
    a, b = ({k: of.get(k, usual.get(k, "absent")) for k in a.keys() | b.keys()} for of in (a, b))
    return [f"{k} is {a[k]!r} there, {b[k]!r} here" for k in sorted(a) if a[k] != b[k]]


def _flat(tree, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.")
    return out
