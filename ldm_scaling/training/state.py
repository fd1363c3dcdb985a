"""`TrainState`: all that a run carries from step to step, a plain pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: optimiser steps taken, int32 scalar.
      params: float32 parameters.
      opt_state: optax's.
      ema: exponential moving average of the parameters; evaluation uses these.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
    )
