"""Weights of other people: readers that need no torch, and a filler that accepts only a whole fit.

Files are read as `{name: array}` (`read_weights` takes any of them); `fill` then maps these names
to a parameter tree by regex rules and stops with a diff unless every tensor on both sides has
found its partner.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from ldm_scaling.errors import MissingPackageError, UserError
from ldm_scaling.models.torch_files import FlatTensors, narrow, read_legacy_pth, read_pth

__all__ = [
    "DIFFUSERS", "TRANSFORMERS", "FlatTensors", "Rule", "conv", "fill", "hash_of", "linear",
    "package_file", "present", "read_legacy_pth", "read_safetensors", "read_torch",
    "read_weights", "same", "weights_files",
]  # fmt: skip

# Files of weights as transformers and diffusers name them, in the order they are looked for.
TRANSFORMERS = (
    "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin",
)  # fmt: skip
DIFFUSERS = tuple(
    f"diffusion_pytorch_model.{end}"
    for end in ("safetensors", "fp16.safetensors", "bin", "fp16.bin")
)


def package_file(package: str, relative: str, needed_for: str) -> Path:
    """Path of the file `relative` inside an installed package, which is not imported.

    Raises `MissingPackageError` when the package is absent, `UserError` when the file is.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(package, needed_for)
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / relative).is_file():
        raise UserError(
            f"{folder / relative}, needed for {needed_for}, is missing from the package "
            f"{package!r}: run  pip install --force-reinstall --no-deps {package.replace('_', '-')}"
        )
    return folder / relative


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def read_safetensors(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> FlatTensors:
    """Every tensor of a safetensors file, by its name, in its own shape and dtype; those whose
    whole name matches a pattern of `ignore` are not read.

    Raises `UserError` when the file cannot be read or is not whole, or a tensor is of a type that
    numpy has no name for, such as float8.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as f:
            names = [name for name in f.keys() if not _matches(name, ignore)]
            for name in names:
                if re.match("F[468]_|F4$", kept := f.get_slice(name).get_dtype()):
                    raise narrow(path, name, kept)
            return {name: f.get_tensor(name) for name in names}
    except OSError as e:
        raise UserError(f"cannot read the weights {path}: {e.strerror or e}") from e
    except safetensors.SafetensorError as e:
        raise UserError(
            f"{path} is not a whole safetensors file ({e}): fetch or install it again"
        ) from e


def read_torch(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> FlatTensors:
    """The tensors of one file, .safetensors or torch's own (see `torch_files.read_pth`), but those
    whose whole name matches a pattern of `ignore`.

    Raises `UserError` for a file that is missing, broken or of another kind.
    """
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path, ignore)
    return {name: t for name, t in read_pth(path).items() if not _matches(name, ignore)}


def read_weights(
    path: str | os.PathLike[str], ignore: Sequence[str] = (), names: Sequence[str] = TRANSFORMERS
) -> FlatTensors:
    """The tensors of a file, or of a folder as a library saves it: of the first of `names` that is
    there, whole or in parts.

    Raises `UserError` for what is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return read_torch(path, ignore)
    return _read_parts(path, _first(path, names), ignore)


def _index(folder: Path, name: str) -> Path | None:
    """The index of the parts of the file `name`, where the folder has one."""
    # Of NAME.fp16.ENDING in parts both libraries call the index NAME.ENDING.index.fp16.json.
    whole = name.replace(".fp16.", ".")
    names = (f"{name}.index.json", *[f"{whole}.index.fp16.json"] * (whole != name))
    return next((folder / index for index in names if (folder / index).is_file()), None)


def present(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that a folder has, whole or in parts."""
    return [name for name in names if (folder / name).is_file() or _index(folder, name)]


def _first(folder: Path, names: Sequence[str]) -> str:
    if found := present(folder, names):
        return found[0]
    raise UserError(f"no weights in {folder}: it needs one of {', '.join(names)}")


def weights_files(
    path: str | os.PathLike[str], names: Sequence[str] = TRANSFORMERS
) -> list[Path]:
    """The files that `read_weights` reads with the same arguments.

    Raises `UserError` for what is missing or cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    name = _first(path, names)
    index = _index(path, name)
    if (path / name).is_file() or index is None:
        return [path / name]
    return [index, *(path / part for part in sorted(set(_part_of(index).values())))]


def _read_parts(folder: Path, name: str, ignore: Sequence[str]) -> FlatTensors:
    """The file `name`, or its parts; a part of which every tensor is ignored is not opened."""
    index = _index(folder, name)
    if (folder / name).is_file() or index is None:
        return read_torch(folder / name, ignore)
    wanted = {k: part for k, part in _part_of(index).items() if not _matches(k, ignore)}
    tensors: FlatTensors = {}
    for part in sorted({*wanted.values()}):
        tensors |= read_torch(folder / part, ignore)
    if wrong := {*tensors} ^ {*wanted}:
        raise UserError(
            f"{index} and the parts that it names disagree about {len(wrong)} tensors, among them "
            f"{min(wrong)!r}: fetch them again"
        )
    return tensors


def _part_of(index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    try:
        part_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = [part for part in part_of.values() if Path(part).name != part]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"cannot read the index {index} ({e!r}): fetch it again") from e
    if outside:
        raise UserError(f"{index} names {outside[0]!r}, which is no file beside it: fetch it again")
    return part_of


def hash_of(params: Any) -> str:
    """Hash of the values of a parameter tree (16 hex digits): the same from whatever file they
    came.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        leaf = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {leaf.shape} {leaf.dtype};".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]


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
        if _matches(name, ignore):
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
