"""Files that torch wrote, as `{name: array}`: read by torch where it is installed and without it
where the file is of the old format; nothing in a file is ever run.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError

FlatTensors = dict[str, np.ndarray]


class _Refused(Exception):
    """The file asks for something that a table of tensors does not need, or is broken."""


# --- through torch ----------------------------------------------------------------------------

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# Keys under which training programs keep the weights beside other things.
_WRAPPERS = ("state_dict", "teacher", "model", "params_ema", "params")
# What published checkpoints hold beside their tensors (Stable Diffusion's .ckpt, DINO's full ones).
# Objects of these names are replaced by empty ones; any other name is refused by torch.
_BOOKKEEPING = (
    "argparse.Namespace",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "_codecs.encode", "pathlib.PosixPath", "pathlib._local.PosixPath",
    "builtins.dict", "builtins.list", "builtins.int", "builtins.float",  # a defaultdict's
)  # fmt: skip


class _Empty:
    """Stands in for any object: takes what a pickle gives it and keeps nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _table(*args: Any) -> OrderedDict:
    """Stands in for a table of another class: torch lays its entries into what this gives."""
    return OrderedDict()


def narrow(path: str | os.PathLike[str], name: str, dtype: str) -> UserError:
    """What to say of a tensor of 8 bits or fewer: without its scales, which every program that
    makes such files keeps in another place, its numbers mean nothing."""
    return UserError(
        f"{path} keeps {name} as {dtype}, and numbers so narrow are scaled in a way of the program "
        "that made them: fetch the float16, bfloat16 or float32 file of the same weights"
    )


def _remedy(path: Path, load: str) -> str:
    file = path.with_suffix(".safetensors").name
    return (
        f'convert it where torch is installed, with  python -c "import torch; from safetensors.'
        f"torch import save_file; t = {load}; save_file({{k: v.contiguous().clone() for k, v in "
        f't.items()}}, {file!r})"  and give {file}'
    )


def read_pth(path: str | os.PathLike[str]) -> FlatTensors:
    """The tensors of a .pth, .pt, .bin or .ckpt file, by torch with `weights_only=True`.

    A table kept under "state_dict", "teacher", "model", "params_ema" or "params" is taken out of
    there. Without torch a file in the format of before 1.6 is read by `read_legacy_pth`.

    Raises `UserError` for another kind of file, one that holds more than tensors or is broken, a
    TorchScript archive, and when torch is needed and missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of weights: give one that ends in .safetensors or in "
            f"{', '.join(SUFFIXES)}"
        )
    load = f"torch.load({path.name!r}, map_location='cpu', weights_only=True)"
    try:
        with path.open("rb") as f:
            names = zipfile.ZipFile(f).namelist() if zipfile.is_zipfile(f) else []
    except (OSError, zipfile.BadZipFile) as e:
        raise UserError(f"cannot read the weights {path}: {getattr(e, 'strerror', 0) or e}") from e
    if any(name.endswith("constants.pkl") for name in names):
        script = f"torch.jit.load({path.name!r}, map_location='cpu').state_dict()"
        raise UserError(
            f"{path} is a TorchScript archive, a program and not a table of tensors: "
            f"{_remedy(path, script)}"
        )
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        if not names:
            return read_legacy_pth(path)
        raise UserError(
            f"{path} can be read only by torch, which is not installed: run  pip install torch  or "
            f"{_remedy(path, load)}"
        ) from e
    try:
        stand_ins = [(_Empty, name) for name in _BOOKKEEPING]
        stand_ins.append((_table, "collections.defaultdict"))
        with torch.serialization.safe_globals(stand_ins):
            table = torch.load(path, map_location="cpu", weights_only=True)
        return _tensors(torch, table, path)
    except UserError:
        raise
    except _Refused as e:
        raise UserError(
            f"refused to read {path}: {e}; save its tensors alone as a .safetensors file"
        ) from e
    except Exception as e:  # a pickle of arbitrary bytes can raise any exception whatever
        why = str(e.__context__ or e).split(" Please ")[0]  # torch wraps it in advice
        what = "fetch it again"
        if "Unsupported global" in why:  # it is whole, but holds objects
            what = "save its state_dict alone with the program that made it"
        raise UserError(
            f"torch refused to read {path} as a table of tensors ({type(e).__name__}: "
            f"{why[:200]}): {what}, or give a .safetensors file of the same weights"
        ) from e


def _tensors(torch: Any, table: Any, path: Path) -> FlatTensors:
    while isinstance(table, Mapping):
        key = next((k for k in _WRAPPERS if isinstance(table.get(k), Mapping)), None)
        if key is None:
            break
        table = table[key]
    if not isinstance(table, Mapping):
        raise _Refused(f"it holds a {type(table).__name__}, not a table of named tensors")
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _Refused(f"beside tensors it holds {name!r}, a {type(value).__name__}")
        if str(value.dtype).startswith(("torch.float8", "torch.float4")):
            raise narrow(path, name, str(value.dtype))
    return {name: _array(torch, t.detach().contiguous()) for name, t in table.items()}


def _array(torch: Any, t: Any) -> np.ndarray:
    """numpy's view of a tensor; bfloat16, which torch does not hand over, by its bits."""
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(jnp.bfloat16)
    return t.numpy()


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
