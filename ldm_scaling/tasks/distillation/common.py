"""What the distillation losses share: their examples, their rates, and what they log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ldm_scaling.errors import UserError
from ldm_scaling.sampling import guidance
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.training.task import Beside

# In deviations of the latents: guided targets have 2 or 3, those of a run that is lost hundreds.
_MOST_RMS = 10.0

Loss = Callable[[Any, Any, jax.Array, Beside], tuple[jax.Array, dict[str, jax.Array]]]
"""`loss(params, batch, key, beside) -> (scalar, metrics)`."""

Examples = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
"""`examples(batch, key) -> (x0_BHWC, cond)`: clean latents, float32, and what networks are told of
them, captions dropped and all; arrays with leading axis B."""


def check_rates(rates: tuple[float, float]) -> None:
    """Raises `UserError` unless rates are two finite numbers from 1 on, the lower first."""
    low, high = rates
    if not 1 <= low <= high < np.inf:
        raise UserError(
            f"guidance rates from {low} to {high}: give two from 1 (none) on, the lower first"
        )


def draw_rates(key: jax.Array, rates: tuple[float, float], batch: int) -> jax.Array:
    """w_B, uniform between the two rates."""
    return jax.random.uniform(key, (batch,), jnp.float32, *rates)


def told(cond: dict[str, jax.Array], w_B: jax.Array) -> dict[str, jax.Array]:
    """What a network with a guidance embedding is told."""
    return cond | {"guidance": w_B}


def guided(
    teacher: Denoise, params: Any, z_BHWC: jax.Array, t_B: jax.Array, cond: Any, uncond: Any,
    w_B: jax.Array,
) -> jax.Array:
    """The teacher's guided output, from both of its calls in one; uncond has leading axis 1."""
    both = guidance.with_unconditional(cond, uncond)
    return guidance.guided(teacher, params, z_BHWC, t_B, both, w_B)


def watched(params: Any, beside: Beside, target: jax.Array, got: jax.Array) -> dict[str, jax.Array]:
    """What tells early that a distillation runs away.

    Returns:
        "gap", the distance of the parameters from their average over its norm; "target_rms", the
        size of what is learned, which must stay that of the data; "error_rms", the distance from
        it, without the loss's weights.
    """
    apart = jax.tree.map(jnp.subtract, params, beside.average)
    return jax.lax.stop_gradient({
        "gap": optax.tree.norm(apart) / optax.tree.norm(beside.average),
        "target_rms": jnp.sqrt(jnp.mean(target**2)),
        "error_rms": jnp.sqrt(jnp.mean((got - target) ** 2)),
    })


def diverges(averages: dict[str, float]) -> str:
    """What says that a distillation has run away, in words; empty where nothing does.

    Latents have a deviation of 1, and so have what students learn and, but for a small part, what
    they say; their parameters stay near their average.
    """
    for name, what in (("target_rms", "what it learns has a root mean square of"),
                       ("error_rms", "it is off what it learns by a root mean square of"),
                       ("gap", "its parameters are off their average, of its norm, by")):
        most = 1.0 if name == "gap" else _MOST_RMS
        if not averages[name] <= most:
            return (
                f"{what} {averages[name]:.3g}, beyond {most:g} (loss {averages['loss']:.3g}, "
                f"gradient norm {averages['grad_norm']:.3g}, distance from the average "
                f"{averages['gap']:.3g}): lower learning_rate or clip_norm, raise warmup_steps or "
                "ema_decay, or distil in v (prediction=v)"
            )
    return ""
