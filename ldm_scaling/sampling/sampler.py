"""The one jitted loop that runs every sampler, step count and guidance rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.table import COLUMNS

Denoise = Callable[[Any, Array, Array, Any], Array]


def update(row: Mapping[str, Any], x: Any, F: Any, m1: Any, m2: Any, noise: Any) -> tuple:
    """One row of a table: (x', m0) from x, the network's output and the two x0 before.

    Works on arrays of any shape and library in their own precision; `row` maps the column names
    to numbers. See `SamplerTable` for the equations.
    """
    m0 = row["p"] * x + row["q"] * F
    x = row["a"] * x + row["b0"] * m0 + row["b1"] * m1 + row["b2"] * m2 + row["c"] * noise
    return x, m0


def _normal(key: Array, index_B: Array, stream: Array | int, shape: tuple[int, ...]) -> Array:
    def one(index):
        sample_key = jax.random.fold_in(jax.random.fold_in(key, index), stream)
        return jax.random.normal(sample_key, shape, jnp.float32)

    return jax.vmap(one)(index_B)


def initial_noise(key: Array, index_B: Array, latent_shape: tuple[int, ...]) -> Array:
    """The noise x_BHWC that samples start from: a function of (key, sample index) alone."""
    return _normal(key, index_B, 0, latent_shape)


def row_noise(
    key: Array, index_B: Array, row: Array | int, latent_shape: tuple[int, ...]
) -> Array:
    """The noise z_BHWC that row `row` adds: a function of (key, sample index, row) alone."""
    return _normal(key, index_B, row + 1, latent_shape)


def with_unconditional(cond: Any, uncond: Any) -> Any:
    """The pytree of a batch of 2B that holds each sample's conditioning, then its `uncond`.

    Interleaved, not stacked, so that a batch split over devices stays where it is.

    Raises:
        UserError: if a leaf of `uncond` does not broadcast to `cond`'s.
    """

    def pair(path, leaf, empty):
        if leaf.shape[1:] != empty.shape[1:] or empty.shape[0] not in (1, leaf.shape[0]):
            raise UserError(
                f"guidance: cond{jax.tree_util.keystr(path)} has shape {leaf.shape}, but uncond's "
                f"has {empty.shape}: give (1, {', '.join(map(str, leaf.shape[1:]))})"
            )
        both = jnp.stack([leaf, jnp.broadcast_to(empty, leaf.shape)], axis=1)
        return both.reshape(-1, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(pair, cond, uncond)


def guided(
    denoise: Denoise, params: Any, x_BHWC: Array, t: Array, both: Any, guidance_B: Array
) -> Array:
    """F_u + w (F_c - F_u) in float32, from one call of the network on a batch of 2B.

    w = 1 is no guidance (Stable Diffusion's convention; Ho & Salimans 2022, eq. 6, call that 0).

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        params: its parameters.
        x_BHWC: noisy latents.
        t: the timestep, a scalar.
        both: conditioning of the doubled batch, see `with_unconditional`.
        guidance_B: w of each sample.
    """
    batch = x_BHWC.shape[0]
    t_N = jnp.broadcast_to(t, (2 * batch,))
    F_NHWC = denoise(params, jnp.repeat(x_BHWC, 2, axis=0), t_N, both).astype(jnp.float32)
    F_B2HWC = F_NHWC.reshape(batch, 2, *F_NHWC.shape[1:])
    conditional, unconditional = F_B2HWC[:, 0], F_B2HWC[:, 1]
    w_B111 = guidance_B.astype(jnp.float32).reshape(-1, *(1,) * (x_BHWC.ndim - 1))
    return unconditional + w_B111 * (conditional - unconditional)


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


def make_sampler(denoise: Denoise, latent_shape: tuple[int, ...]) -> Callable[..., Array]:
    """The jitted function that runs any table with this network.

    The row count is a traced number, so tables padded to one length, any step count and any
    guidance rate share one trace per batch size.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        latent_shape: (H, W, C).

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
        params: Any, table: Mapping[str, Array], guidance_B: Array | None, cond: Any, uncond: Any,
        key: Array, index_B: Array,
    ) -> Array:
        if (guidance_B is None) != (uncond is None):
            raise UserError("guidance needs both guidance_B and uncond: give both or neither")
        _check_batch(index_B, guidance_B, cond)
        both = None if uncond is None else with_unconditional(cond, uncond)

        def body(r: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x_BHWC, m1_BHWC, m2_BHWC = carry
            row = {column: table[column][r] for column in COLUMNS}
            if uncond is None:
                t_B = jnp.broadcast_to(row["t"], index_B.shape)
                F_BHWC = denoise(params, x_BHWC, t_B, cond).astype(jnp.float32)
            else:
                F_BHWC = guided(denoise, params, x_BHWC, row["t"], both, guidance_B)
            # Deterministic rows draw nothing.
            noise_BHWC = lax.cond(
                row["c"] > 0,
                lambda: row_noise(key, index_B, r, latent_shape),
                lambda: jnp.zeros_like(x_BHWC),
            )
            x_BHWC, m0_BHWC = update(row, x_BHWC, F_BHWC, m1_BHWC, m2_BHWC, noise_BHWC)
            return x_BHWC, m0_BHWC, m1_BHWC

        x_BHWC = initial_noise(key, index_B, latent_shape)
        history = jnp.zeros_like(x_BHWC)
        # The trip count is an array: XLA compiles a while loop, once for every table.
        x_BHWC, _, _ = lax.fori_loop(0, table["n"], body, (x_BHWC, history, history))
        return x_BHWC

    return sample
