"""Optimisers behind clipping by global norm, their learning rates, and the EMA's decay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_scaling.config import Train, named
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import rules

# Names that no weight decay is for, whatever their axes.
_KEPT = ("bias", "scale", "gain", "embedding", "positions")


def decays(params: Any) -> Any:
    """True where weight decay applies: kernels, not biases nor norms; of parameters of other names
    those of two axes and more."""
    def decay(path: tuple, leaf: Any) -> bool:
        name = rules.path_name(path[-1:])
        return name == "kernel" or name not in _KEPT and leaf.ndim > 1

    return jax.tree_util.tree_map_with_path(decay, params)


def _inverse_sqrt(config: Train, after: float) -> optax.Schedule:
    def rate(n):
        return config.learning_rate / jnp.sqrt(
            jnp.maximum((n + config.warmup_steps) / after, 1.0)
        )

    return rate


def _wsd(config: Train, share: float, power: float) -> optax.Schedule:
    rate, cool = config.learning_rate, config.cooldown_steps
    stable = config.steps - config.warmup_steps - cool

    def falls(n):
        return rate * (1.0 - jnp.clip(n / cool, 0.0, 1.0) ** power)

    return optax.join_schedules([optax.constant_schedule(rate), falls], [stable])


DECAYS = named.filled(named.DECAYS, {
    "none": lambda config: optax.constant_schedule(config.learning_rate),
    "linear": lambda config: optax.linear_schedule(
        config.learning_rate, 0.0, config.steps - config.warmup_steps
    ),
    "cosine": lambda config: optax.cosine_decay_schedule(
        config.learning_rate, config.steps - config.warmup_steps
    ),
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
})
"""What a rate does after its warm-up, by name: `make(config, **options)` is an optax schedule that
counts from the end of the warm-up. One's own are added here."""


OPTIMIZERS = named.filled(named.OPTIMIZERS, {
    "adamw": lambda config, eps: optax.scale_by_adam(
        config.beta1, config.beta2, eps, mu_dtype=config.moment_dtype
    ),
    "lion": lambda config: optax.scale_by_lion(
        config.beta1, config.beta2, mu_dtype=config.moment_dtype
    ),
})
"""What makes steps of clipped gradients, by name: `make(config, **options)` is an optax
transformation, before weight decay and the rate. What it carries must be numbers, and trees of the
parameters' shapes: the mesh holds these as it does the parameters. One's own are added here."""


def learning_rate(config: Train) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then, with n steps taken of N:

    | decay        | times the rate                                                             |
    |--------------|----------------------------------------------------------------------------|
    | none         | 1 (the recipe of the SD v1 model card)                                     |
    | linear       | linear to 0 at N (Salimans & Ho 2022, of every halving)                    |
    | cosine       | (1 + cos(pi s)) / 2, s from 0 at the warm-up's end to 1 at N               |
    | inverse_sqrt | 1 / sqrt(max(n / after, 1)) (Karras et al. 2024, arXiv 2312.02696)         |
    | wsd          | 1, then 1 - s^power, s from 0 to 1 over the last `share` of the N steps    |
    |              | (Hägele et al. 2024, arXiv 2405.18392, whose best has a power of 1/2)      |
    """
    name, options = config.decay
    after, warm = DECAYS[name].make(config, **options), config.warmup_steps
    if not warm:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.learning_rate, warm), after], [warm]
    )


def make(config: Train, rates: Any = None) -> optax.GradientTransformation:
    """The optimiser of a run: clipping, one of `OPTIMIZERS`, and decoupled weight decay, which the
    learning rate scales too (Loshchilov & Hutter 2019; of Lion Chen et al. 2023, arXiv 2302.06675);
    last `config.rate_factors`.

    Args:
      config: the run.
      rates: by parameter, what the optimiser's steps are multiplied by, see `models.width`. Weight
        decay keeps the run's own rate: what a weight forgets in a step is the same at every width,
        as `mup`'s AdamW has it and as transfer needs it (Wang & Aitchison 2024, arXiv 2405.13698).
        What is carried is the same with rates and without.
    """
    name, options = named.parse("train.optimizer", config.optimizer, OPTIMIZERS)
    own = OPTIMIZERS[name].make(config, **options)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, state = own.update(grads, state, params)
        return jax.tree.map(lambda step, rate: rate * step, steps, rates), state

    slowed = [_slowed(config.factors)] if config.factors else []
    # What `optax.adamw` is, with a place between its parts; nested, as checkpoints have it.
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.chain(
        own if rates is None else optax.GradientTransformation(own.init, update),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    ), *slowed)


def _slowed(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies steps, weight decay's too, by the factor of the first expression that is found in
    a parameter's path. `init` raises `UserError` for one that no parameter is left for."""
    def place(path: tuple) -> int:
        name = rules.path_name(path)
        return next((i for i, (p, _) in enumerate(factors) if re.search(p, name)), len(factors))

    def init(params: Any) -> optax.EmptyState:
        used = {place(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        for i, (pattern, factor) in enumerate(factors):
            if i not in used:
                shown = next(rules.path_name(p) for p, _ in
                             jax.tree_util.tree_leaves_with_path(params))
                raise UserError(
                    f"config: train.rate_factors={pattern}={factor:g}: no parameter is left for "
                    f"it: expressions are searched in their order, in paths such as {shown}"
                )
        return optax.EmptyState()

    def update(steps: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        numbers = [factor for _, factor in factors] + [1.0]
        return jax.tree_util.tree_map_with_path(
            lambda path, step: numbers[place(path)] * step, steps
        ), state

    return optax.GradientTransformation(init, update)


def ema_decay(config: Train, step: jax.Array) -> jax.Array | float:
    """The EMA's decay at a step, from the start shortened to about a tenth of the run so far.

    min(decay, (1 + step) / (10 + step)), so that a short run's average forgets its random start;
    the decay itself without `ema_ramp`.
    """
    if not config.ema_ramp:
        return config.ema_decay
    step = step.astype(jnp.float32)
    return jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
