"""The workdir: where a study's files lie, which config it is bound to, and its log."""

from __future__ import annotations

import json
import logging
import os

from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError


class Workdir:
    """Paths of a study.

        study.json            the config that the workdir is bound to
        log.txt               everything that was logged, tracebacks too
        data/                 the prepared pictures, and the text states
        autoencoder/          checkpoints/, events/, samples/, curves.csv
        latents/              the training and validation latents
        models/NAME/          as autoencoder/, one folder a member
        reference/            statistics of the real pictures, the caption probe
        records/KEY.json      one record per configuration
        strips/KEY.png        the first pictures of each configuration
        samples/              grids that `ldm-scaling sample` drew
        figures/              plots, PNG and SVG
        report.html
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    def __truediv__(self, name: str) -> epath.Path:
        return self.path / name

    def member(self, name: str) -> epath.Path:
        """Folder of a member's training run."""
        return self.path / "models" / name

    def bind(self, study: Study) -> None:
        """Ties the workdir to a config, or checks that it is tied to this one.

        Raises:
          UserError: when the folder cannot be used, or belongs to another config; it names the
            keys that differ. Nothing is written then.
        """
        marker = self.path / "study.json"
        want = json.loads(json.dumps(study.identity()))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            have = json.loads(marker.read_text())["identity"] if marker.exists() else None
        except OSError as e:
            raise UserError(
                f"cannot use the workdir {self.path}: {e.strerror or e}; choose another --workdir"
            ) from e
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{marker} is damaged ({e}): restore it, or choose another --workdir"
            ) from e
        if have is None:
            body = {"name": study.name, "identity": want}
            files.atomic_write_text(marker, json.dumps(body, indent=1, sort_keys=True) + "\n")
        elif have != want:
            a, b = _flat(have), _flat(want)
            changed = [
                f"{k} is {a.get(k, 'absent')!r} there, {b.get(k, 'absent')!r} here"
                for k in sorted(a.keys() | b.keys()) if a.get(k, "absent") != b.get(k, "absent")
            ]
            more = f"; and {len(changed) - 4} more" if changed[4:] else ""
            shown = "; ".join(changed[:4]) + more
            raise UserError(
                f"the workdir {self.path} belongs to another config ({shown}): choose another "
                "--workdir, or give the config it was made with"
            )
        if not os.access(self.path, os.W_OK):
            raise UserError(f"cannot write to the workdir {self.path}: choose another --workdir")

    def log_to_file(self) -> logging.Handler:
        """Adds `log.txt` to the root logger; returns the handler."""
        handler = logging.FileHandler(os.fspath(self.path / "log.txt"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.setLevel(logging.INFO)
        root = logging.getLogger()
        for other in root.handlers:  # The terminal is for progress bars and errors.
            other.setLevel(max(other.level, logging.ERROR))
        root.addHandler(handler)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        return handler


def _flat(tree, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.")
    return out
