"""A sweep in lanes against one configuration at a time on one GPU: ours, and diffusers compiled.

    python benchmarks/gpu/lanes.py --to=runs/gpu [--no-peer]
    python benchmarks/gpu/lanes.py --toy --to=/tmp/toy

What benchmarks/sampling.py measures on a CPU, with the 39M network at 64x64 latents in bfloat16:
2 solvers x 5 step counts x 7 guidance rates of `SAMPLES` samples each, as

- lanes: one program for all of it (`sampling.lanes`);
- plain, filled: our plain sampler, one configuration after the other, at the lanes' batch, which
  the samples do not fill;
- plain, exact: the same at a batch that just holds the samples;
- diffusers under torch.compile, exact batch; one guidance rate of the seven, its time times seven.

Cold is the first sweep of a process; against it a loop that compiles a scan for each configuration,
of which some are compiled and scaled up. Samples are compared first, in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np
import peers
from bench import Book, Piece

from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import guidance, sampler, solvers
from ldm_scaling.sampling.lanes import Lanes
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.sampler import State
from ldm_scaling.tasks import drawing

SAMPLES = 24


@dataclasses.dataclass(frozen=True)
class Grid:
    """A sweep.

    Attributes:
      member: the network.
      steps, rates, solvers: its axes.
      samples: of each configuration.
      lanes: of the engine.
      compiled: configurations whose own scan is compiled for the cold loop.
    """

    member: str = "39m"
    steps: tuple[int, ...] = (4, 6, 8, 10, 20)
    rates: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5)
    solvers: tuple[str, ...] = ("ddim", "dpmpp_2m")
    samples: int = SAMPLES
    lanes: int = 64
    compiled: int = 3


TOY = Grid("toy", (1, 2), (1.5, 3.0), ("ddim",), samples=3, lanes=4, compiled=1)


class Sweep:
    """The same sweep, run in each of the ways.

    Args:
      grid: what is drawn.
      params: of the network; random ones if None.
      dtype: see `config.Train.compute_dtype`.
    """

    def __init__(self, grid: Grid, params: Any = None, dtype: str = "auto"):
        self.grid, self.spec = grid, bench.spec_of(grid.member)
        mesh = mesh_lib.make(devices=jax.local_devices()[:1])
        denoise = self.denoise = drawing.denoiser(self.spec, mesh, dtype)
        if params is None:
            params = bench.filled(unet.param_shapes(self.spec))
        self.params = jax.device_put(params, mesh_lib.replicated(mesh))
        rng = np.random.default_rng(0)
        shape = (grid.samples + 1, self.spec.context_length, self.spec.context_dim)
        states = rng.standard_normal(shape, np.float32)
        self.context, self.empty = states[1:], states[:1]
        self.key, self.index = jax.random.key(0), np.arange(grid.samples, dtype=np.int32)
        schedule = schedule_lib.get("sd")
        self.configurations = [
            Configuration(solvers.make(name, schedule, steps), w, self.index)
            for name, steps, w in itertools.product(grid.solvers, grid.steps, grid.rates)
        ]
        narrowed = drawing.narrowed(self.spec, mesh, dtype)
        self.engine = Lanes(
            denoise, self.spec.latent_shape, grid.lanes, mesh, narrowed=narrowed
        )
        self.plain = sampler.make_sampler(denoise, self.spec.latent_shape, narrowed=narrowed)

    def lanes(self) -> np.ndarray:
        """All samples, (configurations, samples, H, W, C)."""
        shape = (len(self.configurations), self.grid.samples, *self.spec.latent_shape)
        out = np.zeros(shape, np.float32)
        for finished in self.engine.run(
            self.params, self.configurations, lambda prompt: {"context": self.context[prompt]},
            {"context": self.empty}, self.key,
        ):
            out[finished.configuration, finished.position] = finished.latents_JHWC
        return out

    def loop(self, batch: int) -> np.ndarray:
        """The same by the plain sampler."""
        shape = (batch, *self.context.shape[1:])
        context, index = np.resize(self.context, shape), np.resize(self.index, batch)
        longest, out = max(self.grid.steps), []
        for c in self.configurations:
            x = self.plain(
                self.params, c.table.padded(longest), jnp.full(batch, c.guidance),
                {"context": context}, {"context": self.empty}, self.key, index,
            )
            out.append(np.asarray(x)[: self.grid.samples])
        return np.stack(out)

    def compiled_alone(self, some: int) -> None:
        """Scans whose table and guidance rate are constants, the first so many configurations."""
        for c in self.configurations[:some]:
            rows = c.table.rows()

            @jax.jit
            def draw(params, context, index_B, rows=rows, rate=c.guidance):
                both = guidance.with_unconditional({"context": context}, {"context": self.empty})
                w_B = jnp.full(len(index_B), rate)

                def step(state, row):
                    row = sampler.columns(row)
                    t_B = jnp.broadcast_to(row["t"], index_B.shape)
                    F = guidance.guided(self.denoise, params, state.x, t_B, both, w_B)
                    return sampler.update(row, state, F, 0.0), None

                noise = sampler.initial_noise(self.key, index_B, self.spec.latent_shape)
                return jax.lax.scan(step, State.start(noise), rows)[0].x

            jax.block_until_ready(draw(self.params, self.context, self.index))


def diffusers_sweep(sweep: Sweep, model: Any) -> Callable[[], None]:
    """What draws the sweep's configurations of one guidance rate by diffusers."""
    from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler

    t, grid = peers.torch(), sweep.grid
    dtype = t.bfloat16 if peers.where() == "cuda" else t.float32
    model = peers.ready(model, half=True)
    index = np.arange(grid.samples, dtype=np.int32)
    start = peers.tensor(np.asarray(
        sampler.initial_noise(sweep.key, index, sweep.spec.latent_shape)
    )).to(dtype)
    context = t.from_numpy(sweep.context)
    both = t.cat([t.from_numpy(sweep.empty).expand_as(context), context]).to(peers.where(), dtype)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "steps_offset": 1, "timestep_spacing": "leading"}
    made = {
        "ddim": lambda: DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False),
        "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**noise, solver_order=2),
    }

    def run() -> None:
        for name, steps in itertools.product(grid.solvers, grid.steps):
            scheduler, x = made[name](), start
            scheduler.set_timesteps(steps, device=peers.where())
            with t.inference_mode():
                for step in scheduler.timesteps:
                    empty, full = model(t.cat([x, x]), step, both).sample.chunk(2)
                    x = scheduler.step(empty + grid.rates[0] * (full - empty), step, x).prev_sample
            x.float().cpu()

    return run


# --- pieces -----------------------------------------------------------------------------------


def parity(grid: Grid, args: Any, book: Book) -> dict[str, Any]:
    """A small sweep in float32: the lanes' samples are the plain sampler's."""
    few = dataclasses.replace(grid, steps=grid.steps[:2], rates=grid.rates[:1], samples=3, lanes=4)
    with jax.default_matmul_precision("highest"):
        sweep = Sweep(few, dtype="float32")
        error = bench.relative(sweep.lanes(), sweep.loop(few.samples))
    return {"error": bench.check("lanes", error, 1e-3)}


def cold(grid: Grid, args: Any, book: Book) -> dict[str, Any]:
    """The first sweep in lanes, and scans compiled for each configuration; no programs kept."""
    jax.config.update("jax_enable_compilation_cache", False)
    sweep = Sweep(grid)
    with bench.turn():
        start = time.perf_counter()
        sweep.lanes()
        lanes = time.perf_counter() - start
        start = time.perf_counter()
        sweep.compiled_alone(grid.compiled)
        count = len(sweep.configurations)
        loop = (time.perf_counter() - start) * count / grid.compiled
    jax.config.update("jax_enable_compilation_cache", True)
    return {"lanes": lanes, "compiled scans": loop, "compiled": grid.compiled, "of": count}


def warm(grid: Grid, args: Any, book: Book) -> dict[str, Any]:
    """All ways in turns, everything compiled."""
    sweep = Sweep(grid)
    runs = {
        "lanes": sweep.lanes, "plain, filled": lambda: sweep.loop(grid.lanes),
        "plain, exact": lambda: sweep.loop(grid.samples),
    }
    why = bench.no_peer(args, "diffusers")
    if why is None:
        runs["diffusers"] = diffusers_sweep(sweep, peers.network(sweep.spec))
    found = bench.interleaved(runs, args.toy, 120.0)
    seconds = {name: one["median"] for name, one in found.items()}
    if why is None:
        seconds["diffusers"] *= len(grid.rates)
    plan = sweep.engine.plans(sweep.configurations)[0]
    return {"seconds": seconds, "why": why, "useful": plan.useful, "turns": found["lanes"]["n"]}


def pieces(args: Any) -> list[Piece]:
    """In order."""
    grid = TOY if args.toy else Grid()
    return [
        Piece("parity", functools.partial(parity, grid, args), 3.0, first=True),
        Piece("cold", functools.partial(cold, grid, args), 5.0),
        Piece("warm", functools.partial(warm, grid, args), 5.0),
    ]


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["a sweep", "s", "lanes are faster by"]]
    if found := book.get("cold"):
        names = ("lanes", "compiled scans")
        rows += [
            [f"{name}, cold", bench.number(found[name]), bench.number(found[name] / found["lanes"])]
            for name in names
        ]
    if found := book.get("warm"):
        seconds = found["seconds"]
        rows += [
            [f"{name}, warm", bench.number(s), bench.number(s / seconds["lanes"])]
            for name, s in seconds.items()
        ]
        if found["why"]:
            rows.append(["diffusers, warm", "-", found["why"]])
    return rows


def main(argv: list[str] | None = None) -> int:
    args = bench.parser(__doc__).parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
