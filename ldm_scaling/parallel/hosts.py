"""What platform this is, and which of several processes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compute_dtype(name: str) -> jnp.dtype:
    """The compute type of `float32`, `bfloat16` or `auto`: bfloat16 where matrix units gain."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def is_lead() -> bool:
    """Whether this process writes logs, pictures and records."""
    return jax.process_index() == 0


def describe() -> str:
    """One line on the devices, e.g. `4 x TPU v5e`."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
