"""Stand-ins for what is not here (gcloud, kubectl, srun, ...), and how launchers are called."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"


def fake(folder: pathlib.Path, name: str, script: str) -> pathlib.Path:
    """A program of that name in `folder`, which is to stand first on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def environment(*folders: pathlib.Path, **variables: str) -> dict[str, str]:
    """This process's, with folders and the tests' Python first on PATH."""
    path = [*map(str, folders), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {"PATH": os.pathsep.join(path)} | variables


def call(*command: object, **options) -> subprocess.CompletedProcess:
    """Runs a launcher (its name in launch/) and returns what it said."""
    name, *arguments = map(str, command)
    first = [sys.executable] if name.endswith(".py") else ["bash"]
    options.setdefault("env", environment())
    return subprocess.run([*first, str(LAUNCH / name), *arguments], capture_output=True, text=True,
                          timeout=60, **options)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something that comes."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)
