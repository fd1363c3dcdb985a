"""What of this machine a process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may use, which on a shared machine may be few of those there."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return there or 1
