"""A sweep in lanes against one configuration at a time: ours, and diffusers' on the same weights.

    python benchmarks/sampling.py [--channels=8 --side=16 --samples=24 --lanes=64 ...]

Needs the `parity` extra. Float32, every core of the machine. The network is a member of the small
family (two levels of one block; c24 is --channels=24). The sweep is 5 step counts x 7
guidance rates x 2 solvers with `--samples` each:

- lanes: one program for all of it (`sampling.lanes`);
- loop, fixed batch: a jitted sampler, one configuration at a time, at the batch size of the lanes;
  what the samples do not fill idles, as in a script with a fixed batch;
- loop, exact batch: the same with a batch that just holds the samples;
- diffusers: `UNet2DConditionModel` and its schedulers, eager torch, exact batch; one guidance rate
  of the 7, for they cost the same, and its time times 7.

Samples of all are compared first. Cold is the first sweep of a process, compilation included: the
lanes' against a loop that compiles a scan for each configuration, its steps and guidance rate
constants. `--cold-configurations` of the 70 are compiled, which takes long, and scaled up; 0 runs
them all. Warm is a sweep with everything compiled; there the loops run our own plain sampler, one
program for all tables, which is the fastest loop we know.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler

from ldm_scaling.diffusion.schedule import variance_preserving
from ldm_scaling.models import convert, unet
from ldm_scaling.parallel import hosts, placing
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import guidance, sampler, solvers
from ldm_scaling.sampling.lanes import Lanes
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.sampler import State

STEPS = (4, 6, 8, 10, 20)
GUIDANCE = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5)
SOLVERS = ("ddim", "dpmpp_2m")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "steps_offset": 1, "timestep_spacing": "leading"}
LENGTH, WIDTH = 16, 64


def peer_scheduler(name: str):
    if name == "ddim":
        return DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    return DPMSolverMultistepScheduler(**SD, solver_order=2)


class Sweep:
    """The same sweep, run in each of the ways."""

    def __init__(self, args):
        torch.set_num_threads(os.cpu_count())
        torch.manual_seed(0)
        c = args.channels
        self.peer = UNet2DConditionModel(
            sample_size=args.side, block_out_channels=(c, 2 * c), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=args.heads, cross_attention_dim=WIDTH, norm_num_groups=args.groups,
        ).eval().to(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as folder:
            self.peer.save_pretrained(folder)
            spec, params = convert.load_unet(folder)
        self.mesh = mesh_lib.make()
        self.params = jax.device_put(params, mesh_lib.replicated(self.mesh))
        self.denoise, self.shape = unet.denoise_fn(spec), (args.side, args.side, 4)
        rng = np.random.default_rng(0)
        self.context = rng.normal(size=(args.samples, LENGTH, WIDTH)).astype(np.float32)
        self.empty = rng.normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
        self.key, self.index = jax.random.key(0), np.arange(args.samples, dtype=np.int32)
        self.size, self.samples = args.lanes, args.samples
        schedule = variance_preserving("sd", peer_scheduler("ddim").alphas_cumprod.double().numpy())
        self.configurations = [
            Configuration(solvers.make(name, schedule, steps), w, self.index)
            for name, steps, w in itertools.product(SOLVERS, STEPS, GUIDANCE)
        ]
        self.names = list(itertools.product(SOLVERS, STEPS, GUIDANCE))
        self.noise = np.asarray(sampler.initial_noise(self.key, self.index, self.shape))
        self.engine = Lanes(self.denoise, self.shape, self.size, self.mesh)
        self.plain = sampler.make_sampler(self.denoise, self.shape)

    def lanes(self):
        out = np.zeros((len(self.configurations), self.samples, *self.shape), np.float32)
        for finished in self.engine.run(
            self.params, self.configurations, lambda prompt: {"context": self.context[prompt]},
            {"context": self.empty}, self.key,
        ):
            out[finished.configuration, finished.position] = finished.latents_JHWC
        return out

    def _static(self, configuration: Configuration):
        """A scan over one table's rows at one guidance rate, compiled for these alone."""
        rows = configuration.table.rows()

        def sample(params, context, index_B):
            both = guidance.with_unconditional({"context": context}, {"context": self.empty})
            w_B = jnp.full(len(index_B), configuration.guidance)

            def step(state, row):
                row = sampler.columns(row)
                t_B = jnp.broadcast_to(row["t"], index_B.shape)
                F = guidance.guided(self.denoise, params, state.x, t_B, both, w_B)
                return sampler.update(row, state, F, 0.0), None

            start = State.start(sampler.initial_noise(self.key, index_B, self.shape))
            return jax.lax.scan(step, start, rows)[0].x

        return jax.jit(sample)

    def _batch(self, fill: bool):
        """Prompts and numbers, repeated up to the batch size, on the devices."""
        width = self.size if fill else -(-self.samples // self.mesh.size) * self.mesh.size
        context = np.resize(self.context, (width, LENGTH, WIDTH))
        return placing.put_batch(self.mesh, (context, np.resize(self.index, width)))

    def cold_loop(self, some: int):
        context, index = self._batch(fill=False)
        for configuration in self.configurations[:some]:
            np.asarray(self._static(configuration)(self.params, context, index))

    def loop(self, fill: bool):
        context, index = self._batch(fill)
        out = []
        for c in self.configurations:
            x = self.plain(
                self.params, c.table.padded(max(STEPS)), jnp.full(len(index), c.guidance),
                {"context": context}, {"context": self.empty}, self.key, index,
            )
            out.append(np.asarray(x)[: self.samples])
        return np.stack(out)

    def diffusers(self):
        context = torch.from_numpy(self.context)
        both = torch.cat([torch.from_numpy(self.empty).expand_as(context), context])
        out = []
        for name, steps, w in self.names[:: len(GUIDANCE)]:
            scheduler = peer_scheduler(name)
            scheduler.set_timesteps(steps)
            x = torch.from_numpy(self.noise.copy()).permute(0, 3, 1, 2)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                for t in scheduler.timesteps:
                    empty, full = self.peer(torch.cat([x, x]), t, both).sample.chunk(2)
                    x = scheduler.step(empty + w * (full - empty), t, x).prev_sample
            out.append(x.permute(0, 2, 3, 1).numpy())
        return np.stack(out)


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def line(name: str, times: list[float], base: float | None) -> None:
    median = statistics.median(times)
    spread = f"{min(times):.2f} to {max(times):.2f}"
    against = "" if base is None else f"   lanes are {median / base:.2f} times as fast"
    print(f"  {name:28s} median {median:8.2f} s  ({spread}){against}", flush=True)


def share_of_the_row_step(sweep: Sweep, repeats: int) -> None:
    """Everything but the network: the same sweep with a network that returns its input."""
    def free(params, x_BHWC, t_B, cond):
        return x_BHWC

    engine = Lanes(free, sweep.shape, sweep.size, sweep.mesh)
    real, sweep.engine = sweep.engine, engine
    sweep.lanes()
    without = statistics.median(timed(sweep.lanes) for _ in range(repeats))
    sweep.engine = real
    whole = statistics.median(timed(sweep.lanes) for _ in range(repeats))
    rows = sum(p.rows for p in real.plans(sweep.configurations))
    print(f"\na row of {sweep.size} lanes: {1e3 * whole / rows:.2f} ms, without the network "
          f"{1e3 * without / rows:.3f} ms, {100 * without / whole:.2f}%")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in (("channels", 16), ("heads", 4), ("groups", 4), ("side", 8),
                          ("samples", 24), ("lanes", 64), ("repeats", 3),
                          ("cold-configurations", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    hosts.use_cpu_cores()
    sweep = Sweep(args)
    count = len(sweep.configurations)
    (plan,) = sweep.engine.plans(sweep.configurations)
    print(f"{hosts.describe()}; U-Net c={args.channels}, side {args.side}; {count} configurations "
          f"of {args.samples} samples; {args.lanes} lanes, {100 * plan.useful:.2f}% useful rows",
          flush=True)

    some = args.cold_configurations or count
    cold = {"lanes": timed(sweep.lanes)}
    cold["loop"] = timed(functools.partial(sweep.cold_loop, some)) * count / some
    scaled = "" if some == count else f" (of {some} configurations, scaled to {count})"
    print(f"\ncold sweep; the loop{scaled}")
    for name, seconds in cold.items():
        line(name, [seconds], None if name == "lanes" else cold["lanes"])

    runs = {
        "lanes": sweep.lanes,
        "loop, fixed batch": functools.partial(sweep.loop, True),
        "loop, exact batch": functools.partial(sweep.loop, False),
        "diffusers": sweep.diffusers,
    }
    print()
    ours = sweep.lanes()
    for name, run in list(runs.items())[1:]:
        theirs = run()
        wanted = ours[:: len(ours) // len(theirs)]
        error = np.abs(theirs - wanted).max() / np.abs(wanted).max()
        assert error < 1e-3, f"{name}: samples differ by {error}"
        print(f"  samples of {name!r} and of the lanes differ by {error:.1e}, relative", flush=True)

    print("\nwarm sweep, interleaved")
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            scale = len(GUIDANCE) if name == "diffusers" else 1
            times[name].append(scale * timed(run))
    base = statistics.median(times["lanes"])
    for name, values in times.items():
        line(name, values, None if name == "lanes" else base)
    share_of_the_row_step(sweep, args.repeats)


if __name__ == "__main__":
    main()
