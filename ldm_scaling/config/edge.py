"""Between a ConfigDict, as files in configs/ and the command line fill it, and a `Study`."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from ldm_scaling.config import plugins
from ldm_scaling.config.check import placed
from ldm_scaling.config.study import Study
from ldm_scaling.errors import UserError


def _to_dict(cls: type, instance: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            value = _to_dict(type(value), value)
        elif isinstance(value, dict):
            value = ml_collections.ConfigDict(value)
        out[field.name] = value
    return out


def default() -> ml_collections.ConfigDict:
    """The locked ConfigDict of all keys, at the paper's recipe where it gives one."""
    config = _to_dict(Study, Study())
    config.lock()
    parts = (config.finetune, config.consistency, config.halving, config.cascade)
    for part in (config, *parts):
        part.sweep.max_steps.unlock()
    return config


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`, or a `UserError`: JSON and flags blur tuples, lists, ints and floats."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = (value,)
        item = typing.get_args(kind)[0]
        return tuple(_coerce(f"{name}[{i}]", item, v) for i, v in enumerate(value))
    if origin is dict:
        item = typing.get_args(kind)[1]
        return {str(k): _coerce(f"{name}.{k}", item, v) for k, v in dict(value).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"config: {name}={value!r} should be a {kind.__name__}")
    return value


def _build(base: Any, tree: Any, where: str) -> Any:
    """What a tree says of a part, and of the rest what `base` does."""
    kinds = typing.get_type_hints(type(base))
    if not isinstance(tree, dict):
        raise UserError(f"config: {where[:-1]}={tree!r} should be keys with values")
    for key in tree:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(kinds)}"
            raise UserError(f"config: unknown key {where}{key}; {hint}")
    values = {}
    for key, kind in kinds.items():
        if key not in tree:
            continue
        if dataclasses.is_dataclass(kind):
            values[key] = _build(getattr(base, key), tree[key], f"{where}{key}.")
        else:
            values[key] = _coerce(f"{where}{key}", kind, tree[key])
    with placed(f"{type(base).__name__.lower()}.", where):
        return dataclasses.replace(base, **values)


def parse(config: ml_collections.ConfigDict | dict[str, Any], source: str = "") -> Study:
    """Validates a ConfigDict (or a plain dict) into a `Study`; imports its plugins first, which may
    register what it names.

    Args:
      config: its keys.
      source: takes the place of its `data.source`, which decides what other keys may be.
    Raises:
      UserError: naming the key, its value and what it may be; for an unknown key the nearest name;
        for a plugin that cannot be imported.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    if source and isinstance(tree.get("data", {}), dict):  # Else `_build` says what is wrong.
        tree = {**tree, "data": {**tree.get("data", {}), "source": source, "hash": ""}}
    if tree.get("plugins"):
        named = _coerce("plugins", tuple[str, ...], tree["plugins"])
        tree = {**tree, "plugins": plugins.load(named)}
    return _build(Study(), tree, "")
