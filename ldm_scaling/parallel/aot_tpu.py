"""Slices of TPUs that are not here, by libtpu."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re

import jax

from ldm_scaling.errors import MissingPackageError, UserError, first_line
from ldm_scaling.parallel import aot_gpu

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16", "16x16x16")  # fmt: skip
# Chips of the largest slice, of any three ascending multiples of 4. As launch/tpu.py has it, which
# imports nothing of this package.
_MOST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
_ONE_HOST = 8  # chips of the largest slice of two axes that is one host; else it has 4
# The usual ones of the slices that libtpu knows and that can be asked for.
TOPOLOGIES = tuple(
    f"{name}:{shape}"
    for name, shapes in (
        ("v4", _CUBIC), ("v5e", _FLAT), ("v5p", _CUBIC), ("v6e", _FLAT), ("tpu7x", _CUBIC)
    )
    for shape in shapes
)  # fmt: skip
# Off a TPU machine libtpu asks a server that is not there, locks a file against a second process,
# and complains of what it does not find.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}  # fmt: skip


def named(name: str) -> str:
    """`v5e:16x16` of `v5e-256` or `v5litepod-256`: the usual slice of so many chips, or of v4 and
    v5p cores, two a chip, as the TPU API counts; another name as it is."""
    kind, _, number = name.lower().partition("-")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    if kind in ("v4", "v5e", "v5p", "v6e") and number.isdecimal():
        cores = int(number) * (1 if kind in ("v4", "v5p") else 2)
        found = [t for t in TOPOLOGIES if t.startswith(f"{kind}:") and 2 * _chips(t) == cores]
        return found[0] if found else name
    return name


def require() -> None:
    """Raises `MissingPackageError` where the TPU's compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise MissingPackageError("libtpu", "compiling for a TPU", extra="tpu-plan")


def check(name: str) -> None:
    """Raises what `topology` would, of a name or of a compiler that is not installed."""
    if name not in TOPOLOGIES and not _is_larger(name):
        raise UserError(f"topology {name!r} is not known; {_nearest(name)}")
    require()


def _is_larger(name: str) -> bool:
    """Whether it is a slice of three axes that is no usual one."""
    if not re.fullmatch(rf"({'|'.join(_MOST)}):[1-9]\d*(x[1-9]\d*){{2}}", name):
        return False
    kind, sides = name.split(":")[0], _sides(name)
    fours = sides == sorted(sides) and not any(side % 4 for side in sides)
    return fours and math.prod(sides) <= _MOST[kind]


def of_chips(kind: str, chips: int) -> str:
    """The usual slice of so many chips."""
    return next(one for one in TOPOLOGIES if one.startswith(f"{kind}:") and _chips(one) == chips)


def topology(name: str, num_slices: int = 1) -> list[jax.Device]:
    """As `aot.topology`."""
    check(name)
    if num_slices < 1:
        raise UserError(f"num_slices={num_slices}: give 1 or more")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    # The two cores of a v4 are one device, as on a TPU machine.
    options: dict = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if name.split(":")[0] not in _MOST and _chips(name) <= _ONE_HOST:
        options["chips_per_host_bounds"] = [*_sides(name), 1]
    try:
        found = topologies.get_topology_desc(
            name, platform="tpu", num_slices=num_slices, **options
        )
    except Exception as e:  # libtpu's errors have no type of their own.
        raise UserError(
            f"topology {name!r}, {num_slices} slices: libtpu says {first_line(e)}"
        ) from e
    return list(found.devices)


def _nearest(name: str) -> str:
    if (near := named(name)) != name:
        return f"did you mean {near}?"
    kind, _, shape = name.lower().replace("-", ":").partition(":")
    kind = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "v7": "tpu7x", "v6": "v6e"}.get(
        kind, kind
    )
    same = [one for one in TOPOLOGIES if one.startswith(f"{kind}:")]
    if shape.isdecimal():  # v5e-256: so many chips
        near = [one for one in same if _chips(one) == int(shape)]
    else:
        near = difflib.get_close_matches(f"{kind}:{shape}", TOPOLOGIES, n=1)
    if near:
        return f"did you mean {near[0]}?"
    if same:
        return f"choose from {', '.join(same)}"
    gpu = aot_gpu.nearest(name)
    if gpu:
        return f"did you mean {gpu}?"
    return f"choose from {', '.join(TOPOLOGIES)}; or from GPUs: {aot_gpu.names()}"


def _sides(name: str) -> list[int]:
    return [int(side) for side in name.split(":")[1].split("x")]


def _chips(name: str) -> int:
    return math.prod(_sides(name))
