"""Checks of values, with the key's name in the message."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ldm_scaling.errors import UserError


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raises `UserError` with the key, its value and what it may be, unless `condition`."""
    if not condition:
        raise UserError(f"config: {name}={value!r}: {remedy}")


def positive(obj: Any, *names: str) -> None:
    """Raises `UserError` for the first of these attributes that is not above 0."""
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{type(obj).__name__.lower()}.{name}", value, "must be above 0")


@contextlib.contextmanager
def placed(own: str, where: str) -> Iterator[None]:
    """Inside, errors name keys of a part by its place in the config, as `autoencoder.train.`, where
    they call it by its `own` name, as `train.`: several parts are of one class."""
    try:
        yield
    except UserError as e:
        if where not in (own, ""):  # Not within values, which are quoted, nor paths.
            e.args = (re.sub(rf"(?<![\w.'\"/]){re.escape(own)}(?=\w)", where, str(e)),)
        raise
