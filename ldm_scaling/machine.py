"""What of this machine a process may use."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use, which on a shared machine may be few of those there."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return there or 1


def quiet_cuda() -> None:
    """Where there is no NVIDIA driver, keeps JAX's plug-in for CUDA from complaining at length of
    libraries that it cannot load: `plan` takes its compiler, which needs none of them. Must run
    before JAX makes its first array; every command of `ldm-scaling` begins with it, and so does
    `gallery.sample`."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
