"""Checks of values, with the key's name in the message."""

from __future__ import annotations

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
