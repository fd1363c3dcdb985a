"""Gaussian data, whose teacher, guidance and trajectories are known, and small students of it.

The teacher of N(mean + shift, spread^2), told a shift and guided at rate w against no shift, is
exactly the denoiser of N(mean + w shift, spread^2). On the way to timestep 0 deviations from
alpha m only change by factors, which are worked out here in float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Train
from ldm_scaling.diffusion import parameterization
from ldm_scaling.training import optimizer as optimizer_lib
from ldm_scaling.training import state as state_lib
from ldm_scaling.training import step
from tests.models.peers import FAST

SHAPE = (1, 1, 3)
MEAN, SPREAD = np.array([1.5, -0.7, 0.2]), np.array([0.3, 0.8, 1.3])
SHIFT = np.array([0.8, 0.6, -0.9])
UNCOND = {"shift": np.zeros((1, 3), np.float32)}


def examples(batch, key):
    """As many draws of N(mean + shift, spread^2) as the batch is long."""
    x0_BC = MEAN + SHIFT + SPREAD * jax.random.normal(key, (*batch.shape[:1], 3))
    shift_BC = jnp.broadcast_to(jnp.asarray(SHIFT, jnp.float32), x0_BC.shape)
    return x0_BC.astype(jnp.float32).reshape(-1, *SHAPE), {"shift": shift_BC}


def plain_examples(batch, key):
    """The same of N(mean, spread^2), told no shift."""
    x0_BHWC, cond = examples(batch, key)
    return x0_BHWC - jnp.asarray(SHIFT, jnp.float32), jax.tree.map(jnp.zeros_like, cond)


def output(prediction, schedule, x0_of):
    """The `denoise` that stands for `x0_of(params, x_BC, t_B int, cond, alpha, sigma)`."""
    alpha_T, sigma_T = (np.float32(a)[:, None] for a in (schedule.alpha, schedule.sigma))

    def denoise(params, x_BHWC, t_B, cond):
        t_B = jnp.round(t_B).astype(jnp.int32)
        x_BC, alpha, sigma = x_BHWC[:, 0, 0], jnp.asarray(alpha_T)[t_B], jnp.asarray(sigma_T)[t_B]
        x0_BC = x0_of(params, x_BC, t_B, cond, alpha, sigma)
        eps_BC = (x_BC - alpha * x0_BC) / sigma
        F_BC = parameterization.target(prediction, x0_BC, eps_BC, alpha, sigma)
        return F_BC[:, None, None]

    return denoise


def teacher(prediction, schedule):
    """The exact denoiser; its parameters are (mean, spread)."""

    def x0_of(params, x_BC, t_B, cond, alpha, sigma):
        m = params[0] + cond["shift"]
        gain = alpha * params[1] ** 2 / ((alpha * params[1]) ** 2 + sigma**2)
        return m + gain * (x_BC - alpha * m)

    return output(prediction, schedule, x0_of)


FROZEN = (jnp.asarray(MEAN, jnp.float32), jnp.asarray(SPREAD, jnp.float32))


def std(schedule):
    """Of noisy data, (T, 3)."""
    return np.hypot(schedule.alpha[:, None] * SPREAD, schedule.sigma[:, None])


def ddim_factor(alpha, sigma, alpha1, sigma1):
    """What a deviation from alpha m is multiplied by in the teacher's DDIM step."""
    gain = alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2)
    return alpha1 * gain + sigma1 / sigma * (1 - alpha * gain)


def flow(schedule):
    """What a deviation becomes on the exact trajectory to timestep 0: a quotient of spreads."""
    return std(schedule)[:1] / std(schedule)


def ddim_chain(schedule, skip):
    """What it becomes in DDIM steps by `skip` from its node to 0: (T, 3), filled at those nodes."""
    out = np.ones((schedule.num_timesteps, 3))
    nodes = [0, *range(skip - 1, schedule.num_timesteps, skip)]
    a, s = schedule.alpha, schedule.sigma
    for k in range(1, len(nodes)):
        t, before = nodes[k], nodes[k - 1]
        if t:
            out[t] = out[before] * ddim_factor(a[t], s[t], a[before], s[before])
    return out


def perfect(prediction, schedule, factor_TC):
    """A student that is told its rate and whose f is alpha_0 m + factor (z - alpha m)."""
    t_T = 10.0 * np.arange(schedule.num_timesteps)
    skip_T, out_T = 0.25 / (t_T**2 + 0.25), t_T / np.sqrt(t_T**2 + 0.25)
    out_T[0] = 1.0  # Nothing that is said of timestep 0 counts.
    tables = [np.float32(a) for a in (factor_TC, skip_T[:, None], out_T[:, None])]

    def x0_of(params, x_BC, t_B, cond, alpha, sigma):
        factor, c_skip, c_out = (jnp.asarray(a)[t_B] for a in tables)
        m = params[0] + cond["guidance"][:, None] * cond["shift"]
        f = np.float32(schedule.alpha[0]) * m + factor * (x_BC - alpha * m)
        return (f - c_skip * x_BC) / c_out

    return output(prediction, schedule, x0_of)


def linear(schedule, prediction="x0"):
    """A student whose x0 is linear in x and in w times the shift, anew at each timestep.

    Returns:
        its `denoise` and first parameters.
    """

    def x0_of(params, x_BC, t_B, cond, alpha, sigma):
        a, b, c = (params[name][t_B] for name in ("gain", "bias", "shift"))
        w_B = cond.get("guidance", jnp.ones(len(x_BC)))
        return a * x_BC + b + c * w_B[:, None] * cond["shift"]

    T = schedule.num_timesteps
    params = {"gain": jnp.full((T, 3), 0.5), "bias": jnp.zeros((T, 3)), "shift": jnp.ones((T, 3))}
    return output(prediction, schedule, x0_of), params


def run(f, *args):
    """f of these, compiled in a hurry."""
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args)


@functools.partial(jax.jit, static_argnames=("loss", "steps", "batch", "rate", "decay"))
def train(loss, params, frozen, key, steps, batch=256, rate=1e-2, decay=0.95):
    """The state after so many steps of the one train step, and the metrics of each."""
    config = Train(
        steps=steps, batch_size=batch, learning_rate=rate, warmup_steps=0, weight_decay=0.0,
        ema_decay=decay, clip_norm=1e9, compute_dtype="float32",
    )
    optimizer = optimizer_lib.make(config)
    state = state_lib.create(params, optimizer)

    def one(state, _):
        return step.train_step(
            state, jnp.zeros(batch), key, frozen, loss=loss, config=config, optimizer=optimizer
        )

    return jax.lax.scan(one, state, None, length=steps)


def codi_gain(schedule, skip, data_weight):
    """Where CoDi's loss with its own step leads a linear student of N(mean, spread^2): (T, 3).

    x0 = mean + g (z - alpha mean). With f = c_skip + c_out g its boundary-conditioned factor, the
    target's factor is K = f_s (alpha_s g + sigma_s / sigma_t (1 - alpha_t g)), and the derivative
    of (f - K)^2 V + weight E(x - f z)^2 with K held is 0 at
    f - K + weight (f - alpha spread^2 / V) = 0, linear in g once f_s is known: from t=0 upwards.
    """
    a, s, T = schedule.alpha, schedule.sigma, schedule.num_timesteps
    t_T = 10.0 * np.arange(T)
    skip_T, out_T = 0.25 / (t_T**2 + 0.25), t_T / np.sqrt(t_T**2 + 0.25)
    gain = np.zeros((T, 3))
    for t in range(1, T):
        b = max(t - skip, 0)
        f_b = skip_T[b] + out_T[b] * gain[b]
        posterior = a[t] * SPREAD**2 / std(schedule)[t] ** 2
        kept = s[b] / s[t]
        gain[t] = (f_b * kept + data_weight * posterior - (1 + data_weight) * skip_T[t]) / (
            (1 + data_weight) * out_T[t] - f_b * (a[b] - kept * a[t])
        )
    return gain
