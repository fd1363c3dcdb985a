"""A sweep as one compiled program: lanes that run rows of different samplers side by side.

`packing.Plan` lays all samples of all configurations into B lanes beforehand. The program runs a
chunk of the timeline: in every row each lane takes one row of its own table, with its own timestep,
guidance rate, noise and prompt, and a lane whose sample ends begins the next one. So step counts,
solvers and guidance rates share a batch, none idles, and nothing is compiled anew. A sample is the
plain sampler's for the same number, in whatever lane, batch or order it runs.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ldm_scaling.diffusion.loss import checked
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.sampling import guidance, packing, sampler
from ldm_scaling.sampling.guidance import Correction, Denoise
from ldm_scaling.sampling.packing import Chunk, Configuration, Plan
from ldm_scaling.sampling.sampler import State
from ldm_scaling.sampling.table import COLUMNS

_COND_BYTES = 64 * 2**20
_MAX_JOBS = 8


class Lane(NamedTuple):
    """What every lane holds between rows; all leaves have the leading axis B."""

    state: State
    guidance: Array
    index: Array
    cond: Any  # guided: (B, 2, ...), the prompt's and the empty one's


class Finished(NamedTuple):
    """Samples that have ended.

    Attributes:
        configuration: (J,) int, their configurations, as given to `run`.
        position: (J,) int, their places in these.
        latents_JHWC: the samples, float32, on the host.
        rows: rows that samples needed, run since the last one of these.
        guided: whether rows with guidance were two evaluations of the network.
        first: whether the rows were of a cascade's first stage, whose samples are no one's here.
        unguided_rows: rows of a guided program's tables that take no guidance: one evaluation.
    """

    configuration: np.ndarray
    position: np.ndarray
    latents_JHWC: np.ndarray
    rows: int
    guided: bool
    first: bool = False
    unguided_rows: int = 0

    @property
    def evaluations(self) -> int:
        """Evaluations of the network that the samples needed."""
        return self.rows + (self.rows - self.unguided_rows if self.guided else 0)


def _pick(flag_B: Array, new: Any, old: Any) -> Any:
    """Per lane, `new` where the flag is set."""
    def one(new, old):
        return jnp.where(flag_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(one, new, old)


def _take(tree_BK: Any, k_B: Array) -> Any:
    """Per lane, entry k of the second axis."""
    def one(leaf):
        k = k_B.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.take_along_axis(leaf, k, axis=1, mode="clip")[:, 0]

    return jax.tree.map(one, tree_BK)


class Lanes:
    """Draws samples with one network, `size` at a time.

    Args:
        denoise: `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`.
        latent_shape: (H, W, C).
        size: B, the number of lanes, over all devices of the mesh.
        mesh: lanes are split over its devices.
        admit: what is done on the device to the conditioning of a batch when it enters its lanes,
            such as a cast or padding; nothing by default.
        max_rows: S, the most rows between two visits of the host.
        told: whether the network is told each sample's guidance rate, as cond["guidance"] (B,),
            and so called once, whatever the rate.
        narrowed: what is done to the parameters before the first row of a chunk, see
            `models.narrowing`; nothing by default.

    Beyond the network's needs the device holds each lane's prompt and the latents of its last
    rows, and for each chunk on its way B K prompts and latents, however long the sweep: K, the
    samples that a lane may begin in a chunk, is as large as 64 MiB of prompts allow, 1 to 8.

    Three programs are compiled at most for each `Correction`: with guidance, without it at half the
    cost, and for tables with guidance in some rows only. Of these a row is two evaluations where
    any lane takes guidance: lanes that run one table side by side save what it says.

    Raises:
        UserError: if `size` does not split over the mesh, or for max_rows below 1.
    """

    def __init__(
        self, denoise: Denoise, latent_shape: tuple[int, ...], size: int, mesh: jax.sharding.Mesh,
        admit: Callable[[Any], Any] = lambda cond: cond, max_rows: int = 32, told: bool = False,
        narrowed: Callable[[Any], Any] = lambda params: params,
    ):
        mesh_lib.check_batch(mesh, size, "lanes")
        if max_rows < 1:
            raise UserError(f"max_rows={max_rows}: give 1 or more")
        self.denoise, self.latent_shape, self.size, self.mesh = denoise, latent_shape, size, mesh
        self.admit, self.max_rows, self.told, self.narrowed = admit, max_rows, told, narrowed
        self._programs: dict[tuple[Correction, bool], Callable] = {}

    def _program(self, correction: Correction, guided: bool) -> Callable:
        kind = (correction, guided)
        if kind not in self._programs:
            run = functools.partial(self._run_chunk, correction, guided)
            self._programs[kind] = jax.jit(run, donate_argnames="lane")
        return self._programs[kind]

    def _run_chunk(
        self, correction: Correction, guided: bool, params: Any, lane: Lane, cond_BK: Any,
        uncond: Any, chunk: dict[str, Array], key: Array,
    ) -> tuple[Lane, Array]:
        """Runs a chunk's rows; returns the lanes and the latents that ended, (B, K, H, W, C)."""
        K, shape = chunk["index"].shape[1], self.latent_shape
        params = self.narrowed(params)

        def begin(lane: Lane, start_B: Array, scale_B111: Array) -> Lane:
            index_B = _take(chunk["index"], start_B)
            cond = self.admit(_take(cond_BK, start_B))
            if guided:
                both = guidance.with_unconditional(cond, self.admit(uncond))
                cond = jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), both)
            fresh = Lane(
                State.start(scale_B111 * sampler.initial_noise(key, index_B, shape)),
                _take(chunk["guidance"], start_B), index_B, cond,
            )
            return _pick(start_B < K, fresh, lane)

        def body(s: Array, carry: tuple[Lane, Array]) -> tuple[Lane, Array]:
            lane, out_BKHWC = carry
            start_B, end_B = chunk["start"][:, s], chunk["end"][:, s]
            row = sampler.columns(chunk["rows"][:, s], ndim=len(shape))
            lane = lax.cond(
                chunk["starts"][s], begin, lambda lane, *_: lane, lane, start_B, row["s"]
            )
            state = lane.state
            t_B = row["t"].reshape(-1)
            if guided or self.told:
                w_B = 1 + row["g"].reshape(-1) * (lane.guidance - 1)
            if guided:
                both = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lane.cond)
                pair = chunk["pairs"][s] if "pairs" in chunk else None
                F_BHWC = guidance.guided(
                    self.denoise, params, state.x, t_B, both, w_B, correction, pair
                )
            else:
                cond = lane.cond | {"guidance": w_B} if self.told else lane.cond
                F_BHWC = checked(self.denoise(params, state.x, t_B, cond), state.x)
                F_BHWC = F_BHWC.astype(jnp.float32)
            noise_BHWC = lax.cond(
                chunk["noisy"][s],
                lambda: sampler.row_noise(key, lane.index, chunk["stream"][:, s], shape),
                lambda: jnp.zeros_like(state.x),
            )
            state = sampler.update(row, state, F_BHWC, noise_BHWC, correction)

            def collect(out_BKHWC: Array) -> Array:
                ends_BK = end_B[:, None] == jnp.arange(K)
                ends_BK111 = ends_BK.reshape(*ends_BK.shape, *(1,) * len(shape))
                return jnp.where(ends_BK111, state.x[:, None], out_BKHWC)

            out_BKHWC = lax.cond(chunk["ends"][s], collect, lambda out: out, out_BKHWC)
            return lane._replace(state=state), out_BKHWC

        carry = (lane, jnp.zeros((self.size, K, *shape), jnp.float32))
        # The trip count is an array: chunks of any length share the program.
        carry = lax.fori_loop(0, chunk["n"], body, carry)
        return lax.with_sharding_constraint(carry, mesh_lib.batch_sharding(self.mesh))

    def _put(self, tree: Any) -> Any:
        return placing.put_batch(self.mesh, tree)

    def _shapes(self, cond_1: Any, guided: bool) -> Lane:
        """What the lanes hold."""
        cond = jax.eval_shape(self.admit, cond_1)
        pair = (2,) if guided else ()
        size, shape = self.size, jax.ShapeDtypeStruct
        x = shape((size, *self.latent_shape), np.float32)
        return Lane(
            State(*[x] * len(State._fields)), shape((size,), np.float32), shape((size,), np.int32),
            jax.tree.map(lambda c: shape((size, *pair, *c.shape[1:]), c.dtype), cond),
        )

    def _empty(self, cond_1: Any, guided: bool) -> Lane:
        """Lanes before the first row."""
        shapes = self._shapes(cond_1, guided)
        lane = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        return self._put(lane._replace(guidance=np.ones(self.size, np.float32)))

    def abstract(self, cond_1: Any, guided: bool) -> tuple[Callable, tuple[Any, ...]]:
        """The program that runs rows, and what follows its parameters, as shapes: for compiling
        ahead of time. How many rows it runs is one of its arguments.

        Args:
            cond_1: shapes of a prompt's conditioning, with leading axis 1.
            guided: whether rows are guided.
        """
        size, rows, jobs = self.size, self.max_rows, _most_jobs(self.size, cond_1)

        def shape(dims: tuple[int, ...], dtype: Any, split: bool = True) -> jax.ShapeDtypeStruct:
            whole, parts = mesh_lib.replicated(self.mesh), mesh_lib.batch_sharding(self.mesh)
            return jax.ShapeDtypeStruct(dims, dtype, sharding=parts if split else whole)

        lane = jax.tree.map(lambda s: shape(s.shape, s.dtype), self._shapes(cond_1, guided))
        cond_BK = jax.tree.map(lambda c: shape((size, jobs, *c.shape[1:]), c.dtype), cond_1)
        uncond = jax.tree.map(lambda c: shape(c.shape, c.dtype, split=False), cond_1)
        chunk = {
            "rows": shape((size, rows, len(COLUMNS)), np.float32),
            **{name: shape((size, rows), np.int32) for name in ("stream", "start", "end")},
            "guidance": shape((size, jobs), np.float32), "index": shape((size, jobs), np.int32),
            **{name: shape((rows,), bool, split=False) for name in ("starts", "ends", "noisy")},
            "n": shape((), np.int32, split=False),
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        program = self._program(guidance.NONE, guided)
        return program, (lane, cond_BK, uncond if guided else None, chunk, key)

    def plans(self, configurations: Sequence[Configuration]) -> list[Plan]:
        """Where each sample runs, one plan per program; rows are known before any has run."""
        groups = packing.split(configurations, self.told)
        return [
            Plan([configurations[i] for i in some], self.size, self.told) for _, some in groups
        ]

    def run(
        self, params: Any, configurations: Sequence[Configuration],
        cond_of: Callable[[np.ndarray], Any], uncond: Any, key: Array, in_flight: int = 2,
    ) -> Iterator[Finished]:
        """Draws all samples of all configurations and yields them as they end.

        The device has up to `in_flight` chunks to do while the host looks at what has ended
        before, so what a caller does between two of these runs behind the device's work.

        Args:
            params: of the network.
            configurations: what to draw. The guided ones run together, and the others.
            cond_of: `cond_of(prompt_M) -> pytree` of M prompts' conditioning on the host, numpy
                arrays with leading axis M, for numbers out of `Configuration.prompt_N`.
            uncond: the empty prompt's, leading axis 1; may be None if nothing is guided.
            key: a JAX random key.
            in_flight: chunks given to the device ahead.

        Raises:
            UserError: if a configuration is guided and `uncond` is None or holds nothing, or all
                configurations are empty.
        """
        for guided, some in packing.split(configurations, self.told):
            if guided and not jax.tree.leaves(uncond):
                raise UserError("guided configurations need the empty prompt: give uncond")
            group = np.array(some)
            plan = Plan([configurations[i] for i in some], self.size, self.told)
            empty = uncond if guided else None
            for finished in self._run_plan(params, plan, guided, cond_of, empty, key, in_flight):
                yield finished._replace(configuration=group[finished.configuration])

    def _run_plan(
        self, params: Any, plan: Plan, guided: bool, cond_of: Callable[[np.ndarray], Any],
        uncond: Any, key: Array, in_flight: int,
    ) -> Iterator[Finished]:
        program = self._program(plan.correction, guided)
        example = cond_of(plan.configurations[0].prompt_N[:1])
        max_jobs = _most_jobs(self.size, example)
        lane = self._empty(example, guided)
        uncond = placing.replicate(self.mesh, uncond)
        waiting: collections.deque[tuple[Chunk, Array]] = collections.deque()
        for chunk in plan.chunks(self.max_rows, max_jobs):
            cond_BK = self._put(_conditioning(chunk, cond_of, example))
            lane, out_BKHWC = program(
                params, lane, cond_BK, uncond, self._arrays(chunk, plan.partly), key
            )
            if len(chunk.finished) and out_BKHWC.is_fully_addressable:
                out_BKHWC.copy_to_host_async()
            waiting.append((chunk, out_BKHWC))
            if len(waiting) > in_flight:
                yield _finished(*waiting.popleft(), guided)
        while waiting:
            yield _finished(*waiting.popleft(), guided)

    def _arrays(self, chunk: Chunk, partly: bool) -> dict[str, Any]:
        split = {
            "rows": chunk.rows_BSC, "stream": chunk.stream_BS, "start": chunk.start_BS,
            "end": chunk.end_BS, "guidance": chunk.guidance_BK, "index": chunk.index_BK,
        }
        whole = {
            "starts": chunk.starts_S, "ends": chunk.ends_S, "noisy": chunk.noisy_S,
            "n": np.array(chunk.n, np.int32),
        }
        if partly:
            whole["pairs"] = chunk.pairs_S
        return self._put(split) | placing.replicate(self.mesh, whole)


def _most_jobs(lanes: int, cond_1: Any) -> int:
    """K, samples that a lane may begin in a chunk."""
    leaves = jax.tree.leaves(cond_1)
    one = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    return int(np.clip(_COND_BYTES // (lanes * max(1, one)), 1, _MAX_JOBS))


def _conditioning(chunk: Chunk, cond_of: Callable[[np.ndarray], Any], example: Any) -> Any:
    """The new jobs' conditioning, (B, K, ...); what no job takes is zero."""
    lane_J, k_J = chunk.started.T
    shape = chunk.prompt_BK.shape
    some = cond_of(chunk.prompt_BK[lane_J, k_J]) if len(lane_J) else None

    def place(leaf, *values):
        out = np.zeros((*shape, *leaf.shape[1:]), leaf.dtype)
        for value in values:
            out[lane_J, k_J] = value
        return out

    return jax.tree.map(place, example, *([] if some is None else [some]))


def _finished(chunk: Chunk, out_BKHWC: Array, guided: bool) -> Finished:
    lane_J, k_J, configuration_J, position_J = chunk.finished.T
    out_BKHWC.block_until_ready()
    if len(lane_J):
        latents = placing.fetch(out_BKHWC)[lane_J, k_J]
    else:
        latents = np.zeros((0, *out_BKHWC.shape[2:]), np.float32)
    return Finished(
        configuration_J, position_J, latents, chunk.useful_rows, guided,
        unguided_rows=chunk.unguided_rows,
    )
