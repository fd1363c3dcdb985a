"""Programs compiled for NVIDIA GPUs that are not here, by XLA's own compiler for them.

It comes with JAX's plug-in for CUDA, needs no driver and no cuDNN, and takes the GPU's description
from `gpus`. Nothing runs, so nothing is tried out: which of cuDNN's convolutions and which tiles of
products a real GPU would choose is left open, and with it their workspace.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax

from ldm_scaling import machine
from ldm_scaling.errors import MissingPackageError, UserError, first_line
from ldm_scaling.parallel import chips, gpus

# JAX's plug-ins for CUDA, and the packages that their compilers are in.
_PLUGINS = {
    "jax_plugins.xla_cuda13": "jax-cuda13-pjrt", "jax_plugins.xla_cuda12": "jax-cuda12-pjrt",
}  # fmt: skip
# What other names may mean.
_MEANT = {
    "a100": ("a100-80gb", "a100-40gb"), "a100-sxm": ("a100-80gb", "a100-40gb"),
    "4090": ("rtx4090",), "rtx-4090": ("rtx4090",), "h100-sxm": ("h100",), "h200-sxm": ("h200",),
}  # fmt: skip


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def package() -> str:
    """The package that compiles; of CUDA 13 where none is installed."""
    installed = [package for plugin, package in _PLUGINS.items() if _installed(plugin)]
    return installed[0] if installed else "jax-cuda13-pjrt"


def check(topology: str) -> None:
    """Raises what `topology` would, of a name or number that cannot be, of a part of the memory
    that cannot be, or where JAX's plug-in for CUDA is not installed."""
    if gpus.split(topology) is None:
        raise UserError(f"topology {topology!r} is not known; {_instead(topology)}")
    if not any(_installed(name) for name in _PLUGINS):
        raise MissingPackageError("jax-cuda13-plugin", "compiling for a GPU", extra="gpu-plan")
    chips.share_of_gpu()


def is_name(topology: str) -> bool:
    """Whether a topology's name is meant for GPUs: `h100:8`, `h100`, `rtx4090:1`."""
    return topology.partition(":")[0].lower() in gpus.GPUS


def nearest(name: str) -> str:
    """The GPUs that a name that is not known may have meant, for a question; empty for none."""
    kind, _, number = name.lower().partition(":")
    count = number if number.isdecimal() else 8
    meant = _MEANT.get(kind) or difflib.get_close_matches(kind, gpus.GPUS, n=1)
    return " or ".join(f"{gpu}:{count}" for gpu in meant)


def names() -> str:
    """What can be asked for, for a message."""
    return f"{', '.join(gpus.GPUS)}, each with a number of GPUs: h100:1, h100:8, h100:64"


def topology(name: str) -> list[jax.Device]:
    """Devices of GPUs that are not here, for a mesh to compile for.

    Args:
      name: e.g. `h100:8`; more than 8 are hosts of 8.

    Raises:
      MissingPackageError: without JAX's plug-in for CUDA.
      UserError: for a name or number that cannot be.
    """
    check(name)
    gpu, servers, each = gpus.split(name)
    from jax.experimental import topologies

    machine.quiet_cuda()
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # jax's own choice
        # XLA complains of programs that do not fit: that is decided, and said, by `aot`.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{servers}x{each}", target_config=gpus.config(gpu)
        )
    except (RuntimeError, NotImplementedError, ValueError) as e:
        raise UserError(
            f"topology {name!r}: JAX's plug-in for CUDA says {first_line(e)}; its version must be "
            f"jax's, {jax.__version__}"
        ) from e
    return list(described.devices)


def _instead(name: str) -> str:
    kind, _, number = name.lower().partition(":")
    if not number:
        return f"how many: {kind}:1, {kind}:8, {kind}:64?"
    return f"{number!r} GPUs: give 1 to 8, or a multiple of 8 up to 1024"


@contextlib.contextmanager
def as_on(device: Any) -> Iterator[None]:
    """While a program is traced for a GPU that is not here: what JAX's cuDNN attention would ask of
    the process's own is answered for that one. JAX has no public way to say so."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    current = tuple(int(n) for n in str(device.compute_capability).split("."))

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split("."))

    major, minor, patch = gpus.CUDNN
    answers = {
        "check_compute_capability": lambda asked: current >= version(asked),
        "is_cuda_compute_capability_equal": lambda asked: current == version(asked),
        "check_cudnn_version": lambda: 10000 * major + 100 * minor + patch,
    }
    before = {name: getattr(fused, name) for name in answers}
    for name, answer in answers.items():
        setattr(fused, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(fused, name, function)
