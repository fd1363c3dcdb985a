"""Compiled programs are kept: the next process that needs one reads it."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import jax

from ldm_scaling.files import sha256_of

# Shorter compilations are not worth a file; jax's own limit leaves out most of a small network's.
_LEAST_S = 0.1


def keep(shared: str | os.PathLike | None = None) -> None:
    """Turns on jax's compilation cache, in the user's cache folder.

    Several processes need a folder that all see: jax writes in process 0 alone, and the others
    read what it wrote.

    Args:
      shared: what several processes share, their workdir; None for one process.

    What the environment says goes before: `JAX_COMPILATION_CACHE_DIR` names another folder, also of
    a bucket (gs://); `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. A folder that cannot be
    written costs a warning of jax and nothing else.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder(shared)))


def folder(shared: str | os.PathLike | None = None) -> Path:
    """Where programs are kept unless the environment says otherwise, see `keep`.

    Machines with other instructions have folders of their own: a program that XLA made for a CPU
    may not run on another, and jax's keys do not tell them apart.
    """
    kind = sha256_of([platform.machine(), _cpu()])
    if shared is not None:
        return Path(shared).expanduser().absolute() / "compiled" / kind
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "ldm_scaling" / "compiled" / kind


@functools.cache
def _cpu() -> str:
    """What the CPU is and can do, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in names}))
