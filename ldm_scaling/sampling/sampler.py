"""The one jitted loop that runs every sampler, step count and guidance rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ldm_scaling.errors import UserError
from ldm_scaling.sampling import guidance
from ldm_scaling.sampling.guidance import Correction, Denoise
from ldm_scaling.sampling.table import COLUMNS, Padded


class State(NamedTuple):
    """What a row leaves to the next: the sample, the last corrected one, three x0 before."""

    x: Any
    y: Any
    m1: Any
    m2: Any
    m3: Any

    @classmethod
    def start(cls, x: Any) -> State:
        """A sample at its first node."""
        zero = jnp.zeros_like(x)
        return cls(x, zero, zero, zero, zero)


def columns(rows: Any, ndim: int = 0) -> dict[str, Any]:
    """The columns of rows (..., len(COLUMNS)) by name, each (..., 1, 1, ...) with `ndim` ones."""
    ones = (1,) * ndim
    return {
        name: rows[..., i].reshape(*rows.shape[:-1], *ones) for i, name in enumerate(COLUMNS)
    }


def update(
    row: Mapping[str, Any], state: State, F: Any, noise: Any, correction: Correction = guidance.NONE
) -> State:
    """One row of a table, from the network's output F. See `SamplerTable` for the equations.

    Works on arrays of any shape and library in their own precision; `row` maps the column names
    to numbers or to arrays that broadcast.
    """
    x, y1, m1, m2, m3 = state
    m0 = correction.x0(row["p"] * x + row["q"] * F)
    y = (
        row["kx"] * x + row["ky"] * y1 + row["k0"] * m0 + row["k1"] * m1 + row["k2"] * m2
        + row["k3"] * m3
    )
    x = row["a"] * y + row["b0"] * m0 + row["b1"] * m1 + row["b2"] * m2 + row["c"] * noise
    return State(x, y, m0, m1, m2)


def normal(key: Array, index_B: Array, stream: Array | int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise: a function of (key, index, stream) alone, sample by sample.

    Args:
        key: a JAX random key.
        index_B: the samples' numbers.
        stream: one whole number, or one a sample.
        shape: of one sample's noise.
    """

    def one(index, stream):
        sample_key = jax.random.fold_in(jax.random.fold_in(key, index), stream)
        return jax.random.normal(sample_key, shape, jnp.float32)

    return jax.vmap(one)(index_B, jnp.broadcast_to(stream, index_B.shape))


def initial_noise(key: Array, index_B: Array, latent_shape: tuple[int, ...]) -> Array:
    """The noise that samples start from, but for the table's scale: x_BHWC, a function of (key,
    sample index) alone."""
    return normal(key, index_B, 0, latent_shape)


def row_noise(
    key: Array, index_B: Array, row: Array | int, latent_shape: tuple[int, ...]
) -> Array:
    """The noise z_BHWC that row `row` adds: a function of (key, sample index, row) alone."""
    return normal(key, index_B, row + 1, latent_shape)


def _check_batch(index_B: Array, guidance_B: Array | None, cond: Any) -> None:
    shapes = {f"cond{jax.tree_util.keystr(path)}": leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(cond)}
    if guidance_B is not None:
        shapes["guidance_B"] = guidance_B.shape
    for name, shape in shapes.items():
        if shape[:1] != index_B.shape:
            raise UserError(
                f"sampling: index_B has shape {index_B.shape}, but {name} {shape}: their first "
                "axes must be the batch"
            )


def make_sampler(
    denoise: Denoise, latent_shape: tuple[int, ...],
    narrowed: Callable[[Any], Any] = lambda params: params,
) -> Callable[..., Array]:
    """The jitted function that runs any table with this network.

    The row count is a traced number, so tables padded to one length, any step count and any
    guidance rate share one trace per batch size and `Correction`.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        latent_shape: (H, W, C).
        narrowed: what is done to the parameters before the first row, see `models.narrowing`.

    Returns:
        `sample(params, table, guidance_B, cond, uncond, key, index_B) -> x_BHWC`, float32, where

        - table is `SamplerTable.padded()`,
        - guidance_B the guidance rate of each sample, 1 for none,
        - cond a pytree of arrays with leading axis B, uncond the same for the empty prompt with
          leading axis 1,
        - key a JAX random key and index_B the samples' numbers: an image depends on these two and
          not on its batch, so tables compared at one key share their noise.

        With guidance_B = uncond = None the network is called once without guidance, at half the
        cost: a second program.

    Raises:
        UserError: (from `sample`) if only one of guidance_B and uncond is given, or if the
            shapes of index_B, guidance_B, cond and uncond do not fit.
    """

    @jax.jit
    def sample(
        params: Any, table: Padded, guidance_B: Array | None, cond: Any, uncond: Any, key: Array,
        index_B: Array,
    ) -> Array:
        if (guidance_B is None) != (uncond is None):
            raise UserError("guidance needs both guidance_B and uncond: give both or neither")
        _check_batch(index_B, guidance_B, cond)
        params = narrowed(params)
        both = None if uncond is None else guidance.with_unconditional(cond, uncond)

        def body(r: Array, state: State) -> State:
            row = columns(table.rows[r])
            t_B = jnp.broadcast_to(row["t"], index_B.shape)
            if uncond is None:
                F_BHWC = denoise(params, state.x, t_B, cond).astype(jnp.float32)
            else:
                w_B = 1 + row["g"] * (guidance_B.astype(jnp.float32) - 1)
                F_BHWC = guidance.guided(
                    denoise, params, state.x, t_B, both, w_B, table.correction
                )
            noise = lax.cond(
                row["c"] != 0,
                lambda: row_noise(key, index_B, r, latent_shape),
                lambda: jnp.zeros_like(state.x),
            )
            return update(row, state, F_BHWC, noise, table.correction)

        scale = columns(table.rows[0])["s"]
        start = State.start(scale * initial_noise(key, index_B, latent_shape))
        # The trip count is an array: XLA compiles a while loop, once for every table.
        return lax.fori_loop(0, table.n, body, start).x

    return sample
