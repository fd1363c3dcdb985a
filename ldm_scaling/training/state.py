"""`TrainState`: all that a run carries from step to step, a plain pytree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What a run is at.

    Attributes:
      step: optimiser steps taken, int32 scalar.
      params: float32 parameters.
      opt_state: optax's.
      ema: exponential moving average of the parameters; evaluation uses these.
      averages: length -> average of that length, see `averages`; () where none is tracked.
      rests: length -> what its average is beyond float32, bfloat16; () where none is tracked.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    averages: Any = ()
    rests: Any = ()


def create(
    params: Any, optimizer: optax.GradientTransformation, lengths: Sequence[float] = ()
) -> TrainState:
    """The state before the first step; averages, those of `lengths` too, start at the parameters.
    """
    names = [f"{n:g}" for n in lengths]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        averages={name: jax.tree.map(jnp.copy, params) for name in names} or (),
        rests={name: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
               for name in names} or (),
    )
