"""What the samplers' parity tests share: our rows on a peer's path, and a network for both."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.diffusion.schedule import Schedule, variance_preserving
from ldm_scaling.sampling import sampler
from ldm_scaling.sampling.sampler import State
from ldm_scaling.sampling.table import SamplerTable

# Few, awkward (13 does not divide 1000, 14 and 15 differ in order control, 61 in rounding), many.
STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 14, 15, 20, 50, 61, 250)
FEWER = tuple(steps for steps in STEP_COUNTS if steps < 100)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 3, 4)
# All step counts in one scan, twice over for the solvers that call the network twice a step.
SCAN_ROWS = 2 * sum(STEP_COUNTS)


def schedule_of(alphas_cumprod) -> Schedule:
    """The peer's schedule: it is built in float32, and what is compared is the solver."""
    return variance_preserving("peer", np.asarray(alphas_cumprod, np.float64))


class Path(NamedTuple):
    """A peer's path: its x (R+1, *SHAPE), where ours is, and what it was fed (R, *SHAPE)."""

    table: SamplerTable
    x: np.ndarray
    F: np.ndarray
    noise: np.ndarray


def start(table: SamplerTable, dtype="f4") -> Path:
    """Random outputs and noise for every row, and a first x; the rest of x is to be filled in."""
    rng = np.random.default_rng(table.calls)
    F, noise = rng.standard_normal((2, table.calls, *SHAPE)).astype(dtype)
    x = np.zeros((table.calls + 1, *SHAPE), dtype)
    x[0] = rng.standard_normal(SHAPE)
    return Path(table, x, F, noise)


@functools.partial(jax.jit, static_argnames="correction")
def _scan(rows_RC, x_RBHWC, F_RBHWC, noise_RBHWC, correction):
    def step(state, inputs):
        row, x, F, noise = inputs
        state = sampler.update(sampler.columns(row), state._replace(x=x), F, noise, correction)
        return state, state.x

    first = State.start(jnp.zeros(SHAPE))
    return jax.lax.scan(step, first, (rows_RC, x_RBHWC, F_RBHWC, noise_RBHWC))[1]


def teacher_forced(paths: list[Path]) -> list[np.ndarray]:
    """Our float32 x' of every row from the peer's x; what a row keeps for later is ours.

    The paths run one behind the other without a break, so a row that looks back past its table's
    first is found out.
    """
    def joined(arrays):
        array = np.concatenate(arrays).astype(np.float32)
        return np.pad(array, [(0, SCAN_ROWS - len(array))] + [(0, 0)] * (array.ndim - 1))

    ours = np.asarray(_scan(
        joined([path.table.rows() for path in paths]),
        joined([path.x[:-1] for path in paths]),
        joined([path.F for path in paths]),
        joined([path.noise for path in paths]),
        paths[0].table.correction,
    ))
    ends = np.cumsum([path.table.calls for path in paths])
    return np.split(ours[: ends[-1]], ends[:-1])


def assert_same_steps(paths: list[Path], tolerance: float = 1e-5) -> None:
    """That ours is the peer's x' in every row, relative to its largest element.

    Where a table weighs x0 by hundreds, as Heun's does in a step over all noise levels, both sides
    have that many more float32 roundings.
    """
    for path, ours in zip(paths, teacher_forced(paths), strict=True):
        error_R = relative_errors(ours, path.x[1:])
        worst, weight = int(error_R.argmax()), np.abs(path.table.b0).max()
        assert error_R[worst] <= max(tolerance, 2**-22 * weight), (
            path.table.name, worst, error_R[worst]
        )


def relative_errors(ours_RBHWC: np.ndarray, theirs_RBHWC: np.ndarray) -> np.ndarray:
    """The largest difference of each row over the peer's largest element."""
    axes = tuple(range(1, ours_RBHWC.ndim))
    # A NaN must not pass for small.
    difference_R = np.abs(ours_RBHWC - theirs_RBHWC).max(axes)
    return np.where(np.isnan(difference_R), np.inf, difference_R / np.abs(theirs_RBHWC).max(axes))


MIX = np.random.default_rng(0).standard_normal((4, 4)).astype("f4") / 2
CONTEXT = np.random.default_rng(1).standard_normal((2, 1, 4)).astype("f4")
EMPTY = np.zeros((1, 1, 4), "f4")
GUIDANCE = 3.5


def network(lib, mix, x, t, context):
    """A small network, the same in JAX and torch."""
    return lib.tanh(x @ mix + context[:, None]) + 0.3 * lib.sin(t / 300.0)


def outputs_in_torch(torch, x, t):
    """The network's outputs with the context and without, for the timestep t of all samples."""
    arrays = (torch.from_numpy(array).to(x) for array in (MIX, CONTEXT, EMPTY))
    mix, *contexts = arrays
    return [network(torch, mix, x, t, context) for context in contexts]


def guided_in_torch(torch, x, t):
    """Its guided output."""
    conditional, unconditional = outputs_in_torch(torch, x, t)
    return unconditional + GUIDANCE * (conditional - unconditional)


@functools.cache
def noise_of_samples():
    """The first x of the two samples of `sample`, and the noise of their first 64 rows."""
    key, index_B = jax.random.key(5), jnp.arange(2)
    draw = jax.jit(lambda row: sampler.row_noise(key, index_B, row, SHAPE[1:]))
    first = sampler.initial_noise(key, index_B, SHAPE[1:])
    return np.array(first), np.stack([draw(row) for row in range(64)])


@functools.cache
def _our_sampler():
    def denoise(params, x_BHWC, t_B, cond):
        return network(jnp, params, x_BHWC, t_B[:, None, None, None], cond["context"])

    return sampler.make_sampler(denoise, SHAPE[1:])


def sample(table: SamplerTable) -> np.ndarray:
    """Two samples of the network, guided, by our jitted loop."""
    return np.asarray(_our_sampler()(
        jnp.asarray(MIX), table.padded(64), jnp.full(2, GUIDANCE),
        {"context": jnp.asarray(CONTEXT)}, {"context": jnp.asarray(EMPTY)},
        jax.random.key(5), jnp.arange(2),
    ))
