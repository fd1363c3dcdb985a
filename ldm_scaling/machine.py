"""What of this machine a process may use."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use, which on a shared machine may be few of those there."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return there or 1


# What stands for signs that an output's encoding lacks; `?` for others.
_PLAIN = {"─": "-", "━": "-", "•": "*", "·": "-", "…": "...", "±": "+-", "×": "x"}


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # A byte of a file's name.
        return bytes([ord(sign) & 0xFF]), error.start + 1
    return _PLAIN.get(sign, "?"), error.start + 1


def print_any_sign() -> None:
    """Has standard output take every text: where its encoding lacks a sign, another stands for it.
    Standard error writes such signs as Python spells them, by itself."""
    codecs.register_error("ldm_scaling.plain", _plain)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):  # A notebook's has none.
        reconfigure(errors="ldm_scaling.plain")


def quiet_cuda() -> None:
    """Where there is no NVIDIA driver, keeps JAX's plug-in for CUDA from complaining at length of
    libraries that it cannot load: `plan` takes its compiler, which needs none of them. Must run
    before JAX makes its first array; every command of `ldm-scaling` begins with it, and so does
    `gallery.sample`."""
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
