"""AdamW behind clipping by global norm, its learning rate, and the EMA's decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_scaling.config import Train


def decays(params: Any) -> Any:
    """True where weight decay applies: kernels, not biases nor norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def learning_rate(config: Train) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then constant (the recipe of the SD v1 model card) or
    linear to 0 at the last step (Salimans & Ho 2022, of every halving)."""
    rate, warm = config.learning_rate, config.warmup_steps
    rises = optax.linear_schedule(0.0, rate, warm)
    if config.learning_rate_decay == "none":
        return rises if warm else optax.constant_schedule(rate)
    falls = optax.linear_schedule(rate, 0.0, config.steps - warm)
    return optax.join_schedules([rises, falls], [warm]) if warm else falls


def make(config: Train, rates: Any = None) -> optax.GradientTransformation:
    """The optimiser of a run (Loshchilov & Hutter 2019, decay scaled by the learning rate).

    Args:
      config: the run.
      rates: by parameter, what Adam's steps are multiplied by, see `models.width`. Weight decay
        keeps the run's own rate: what a weight forgets in a step is the same at every width, as
        `mup`'s AdamW has it and as transfer needs it (Wang & Aitchison 2024, arXiv 2405.13698).
        What is carried is the same with rates and without.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, mu_dtype=config.moment_dtype)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, state = adam.update(grads, state, params)
        return jax.tree.map(lambda step, rate: rate * step, steps, rates), state

    # What `optax.adamw` is, with a place between its parts; nested, as checkpoints have it.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.chain(
        adam if rates is None else optax.GradientTransformation(adam.init, update),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    ))


def ema_decay(config: Train, step: jax.Array) -> jax.Array | float:
    """The EMA's decay at a step, from the start shortened to about a tenth of the run so far.

    min(decay, (1 + step) / (10 + step)), so that a short run's average forgets its random start;
    the decay itself without `ema_ramp`.
    """
    if not config.ema_ramp:
        return config.ema_decay
    step = step.astype(jnp.float32)
    return jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
