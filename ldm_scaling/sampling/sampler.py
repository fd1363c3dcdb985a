"""The one jitted loop that runs every sampler, step count and guidance rate; and the rows of one
table as a scan, which can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ldm_scaling.diffusion.loss import checked
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import guidance
from ldm_scaling.sampling.guidance import Correction, Denoise
from ldm_scaling.sampling.table import COLUMNS, Padded, SamplerTable


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
        name: rows[..., i].reshape((*rows.shape[:-1], *ones)) for i, name in enumerate(COLUMNS)
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


def _check_table(table: Any, kind: type, remedy: str) -> None:
    if not isinstance(table, kind):
        raise UserError(f"table is a {type(table).__name__}, not a {kind.__name__}: {remedy}")


def _checked_batch(
    index_B: Any, guidance_B: Any, cond: Any, uncond: Any, weaker: Denoise | None
) -> tuple[Array, Array | None]:
    """The samples' numbers and guidance rates as arrays."""
    if (guidance_B is None) != (uncond is None):
        raise UserError("guidance needs both guidance_B and uncond: give both or neither")
    if uncond is not None and weaker is None and not jax.tree.leaves(uncond):
        raise UserError(
            "uncond is empty, so guidance would be away from the prompt itself and do nothing: "
            "give the empty prompt's conditioning, or a weaker network"
        )
    index_B = jnp.asarray(index_B)
    shapes = {f"cond{jax.tree_util.keystr(path)}": jnp.shape(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(cond)}
    if guidance_B is not None:
        guidance_B = jnp.asarray(guidance_B)
        shapes["guidance_B"] = guidance_B.shape
    for name, shape in shapes.items():
        if shape[:1] != index_B.shape:
            raise UserError(
                f"sampling: index_B has shape {index_B.shape}, but {name} {shape}: their first "
                "axes must be the batch"
            )
    return index_B, guidance_B


def _row_of(
    denoise: Denoise, weaker: Denoise | None, params: Any, table: Padded,
    guidance_B: Array | None, cond: Any, uncond: Any, key: Array | None, index_B: Array,
) -> Callable[[Array, Array, State], State]:
    """`step(r, row_C, state)`: one row of a table of a whole batch, in the precision of its x."""
    both = None if uncond is None else guidance.with_unconditional(cond, uncond)

    def step(r: Array, row_C: Array, state: State) -> State:
        row, x = columns(row_C), state.x
        t_B = jnp.broadcast_to(row["t"], index_B.shape)
        if both is None:
            alone = params if weaker is None else params[0]
            F_BHWC = checked(denoise(alone, x, t_B, cond), x)
        else:
            w_B = 1 + row["g"] * (guidance_B.astype(x.dtype) - 1)
            F_BHWC = guidance.guided(
                denoise, params, x, t_B, both, w_B, table.correction,
                row["g"] != 0 if table.sparing else None, weaker,
            )
        F_BHWC = F_BHWC.astype(x.dtype)
        if key is None:
            noise = jnp.zeros_like(x)
        else:
            noise = lax.cond(
                row["c"] != 0,
                lambda: row_noise(key, index_B, r, x.shape[1:]).astype(x.dtype),
                lambda: jnp.zeros_like(x),
            )
        return update(row, state, F_BHWC, noise, table.correction)

    return step


def make_sampler(
    denoise: Denoise, latent_shape: tuple[int, ...],
    narrowed: Callable[[Any], Any] = lambda params: params, weaker: Denoise | None = None,
) -> Callable[..., Array]:
    """The jitted function that runs any table with this network.

    The row count is a traced number, so tables padded to one length, any step count and any
    guidance rate share one trace per batch size, `Correction`, and whether all rows are guided.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        latent_shape: (H, W, C).
        narrowed: what is done to the parameters before the first row, see `models.narrowing`.
        weaker: a second network, such as a smaller one, that guidance is away from (autoguidance):
            `params` are then a pair, and it is called with uncond, of which an empty dict is cond.

    Returns:
        `sample(params, table, guidance_B, cond, uncond, key, index_B) -> x_BHWC`, float32, where

        - table is `SamplerTable.padded()`,
        - guidance_B the guidance rate of each sample, 1 for none,
        - cond a pytree of arrays with leading axis B, uncond the same for the empty prompt with
          leading axis 1,
        - key a JAX random key and index_B the samples' numbers: an image depends on these two and
          not on its batch, so tables compared at one key share their noise.

        With guidance_B = uncond = None the network is called once without guidance, at half the
        cost: a second program. So it is in the rows of a table that take no guidance.

    Raises:
        UserError: (from `sample`) if only one of guidance_B and uncond is given, if uncond is
            empty without a weaker network, if index_B, guidance_B, cond and uncond do not fit, if
            the network's output has another shape than x, or for a table that is not padded.
    """

    @jax.jit
    def sample(
        params: Any, table: Padded, guidance_B: Array | None, cond: Any, uncond: Any, key: Array,
        index_B: Array,
    ) -> Array:
        _check_table(table, Padded, "give table.padded()")
        index_B, guidance_B = _checked_batch(index_B, guidance_B, cond, uncond, weaker)
        step = _row_of(
            denoise, weaker, narrowed(params), table, guidance_B, cond, uncond, key, index_B
        )
        scale = columns(table.rows[0])["s"]
        start = State.start(scale * initial_noise(key, index_B, latent_shape))
        # The trip count is an array: XLA compiles a while loop, once for every table.
        return lax.fori_loop(0, table.n, lambda r, state: step(r, table.rows[r], state), start).x

    return sample


KEPT = {"x": "x", "x0": "m1"}  # In `State` after a row.


def trajectory(
    denoise: Denoise, params: Any, table: SamplerTable, x_BHWC: Array, cond: Any,
    guidance_B: Array | None = None, uncond: Any = None, *, key: Array | None = None,
    index_B: Array | None = None, keep: str | Sequence[str] = (), remat: bool = False,
    weaker: Denoise | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The rows of one table as a `lax.scan`: what `make_sampler` draws, from an x of one's own, to
    be differentiated, looked at row by row, or run in float64.

    Everything is in the precision of `x_BHWC`, timesteps too; the noise that rows add is
    `make_sampler`'s, drawn in float32. The table is part of the program: put this into a function
    of one's own and jit it.

    Args:
        denoise, params, cond, guidance_B, uncond, weaker: see `make_sampler`.
        table: not padded.
        x_BHWC: where samples start; `make_sampler`'s do at `table.s[0] * initial_noise(...)`.
        key, index_B: as there; needed only by a table that adds noise. Numbers are 0 to B - 1
            unless given.
        keep: of "x", what a row leaves, and "x0", the network's x0 in it; a name or several.
        remat: recompute a row in the backward pass instead of keeping what is within it.

    Returns:
        the samples x_BHWC, and what is kept by name, (R, B, H, W, C).

    Raises:
        UserError: as `make_sampler`, for another name to keep, for a table that is padded, or
            that adds noise without a key, for an x in less than float32, or in float64 where JAX
            has none, or for index_B of another length than x.
    """
    _check_table(table, SamplerTable, "give it without .padded()")
    keep = (keep,) if isinstance(keep, str) else keep
    if unknown := set(keep) - set(KEPT):
        raise UserError(f"keep={sorted(unknown)[0]!r}: choose of {', '.join(KEPT)}")
    if jnp.promote_types(x_BHWC.dtype, jnp.float32) != x_BHWC.dtype:
        raise UserError(f"x_BHWC is {x_BHWC.dtype}, which rounds timesteps: give float32 or better")
    if (runs := jax.dtypes.canonicalize_dtype(x_BHWC.dtype)) != x_BHWC.dtype:
        raise UserError(
            f"x_BHWC is {x_BHWC.dtype}, which JAX would make {runs}: enable jax_enable_x64, or "
            f"give {runs}"
        )
    if key is None and table.c.any():
        raise UserError(f"table {table.name!r} adds noise: give a key")
    index_B = jnp.arange(len(x_BHWC)) if index_B is None else jnp.asarray(index_B)
    if index_B.shape != x_BHWC.shape[:1]:
        raise UserError(
            f"index_B has shape {index_B.shape}, but x_BHWC {x_BHWC.shape}: give each sample a "
            "number"
        )
    index_B, guidance_B = _checked_batch(index_B, guidance_B, cond, uncond, weaker)
    step = _row_of(
        denoise, weaker, params, table.padded(table.calls), guidance_B, cond, uncond, key, index_B
    )

    def body(state: State, row: tuple[Array, Array]) -> tuple[State, dict[str, Array]]:
        state = step(*row, state)
        return state, {name: getattr(state, KEPT[name]) for name in keep}

    rows = jnp.arange(table.calls), jnp.asarray(table.rows(x_BHWC.dtype))
    state, kept = lax.scan(jax.checkpoint(body) if remat else body, State.start(x_BHWC), rows)
    return state.x, kept
