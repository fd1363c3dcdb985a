"""Sampling on one GPU: guided DDIM with its pictures, a small member against its roofline, the
decoder; against diffusers under torch.compile.

    python benchmarks/gpu/sampling.py --to=runs/gpu [--no-peer]
    python benchmarks/gpu/sampling.py --toy --to=/tmp/toy

The 866M network draws 512 px pictures: 50 steps of DDIM, guidance 7.5, decoded by SD's autoencoder,
bfloat16, latents and pictures left on the device. Each side goes up in batch, then both run in
turns at their best. 39M runs guided pairs of calls against the bound that roofline.py states. The
decoder is timed in float32, as `tasks.drawing` runs it, and in bfloat16, as the peer's.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np
import peers
import roofline
from bench import Book, Piece

from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, cost, unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.tasks import drawing

SCALE, GUIDANCE = 0.18215, 7.5
DECODER = autoencoder.AutoencoderSpec()
TOY_DECODER = autoencoder.AutoencoderSpec(8, (1, 1), 1, groups=4, mid_attention=False)
BATCHES, SMALL_BATCHES, DECODED = (8, 16), (16, 128), (8, 32)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is drawn.

    Attributes:
      member: the network.
      decoder: the autoencoder.
      steps: of DDIM.
    """

    member: str
    decoder: autoencoder.AutoencoderSpec
    steps: int

    @property
    def spec(self) -> unet.UNetSpec:
        """The network's."""
        return bench.spec_of(self.member)

    def inputs(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts' states and the empty one's."""
        rng = np.random.default_rng(0)
        shape = (batch + 1, self.spec.context_length, self.spec.context_dim)
        states = rng.standard_normal(shape, np.float32)
        return states[1:], states[:1]


JOB, TOY_JOB = Job("866m", DECODER, 50), Job("toy", TOY_DECODER, 3)


class Ours:
    """Our sampler and decoder, parameters on the device.

    Args:
      job: what is drawn.
      params: of the network; random ones if None.
      dtype, attention: see `config.Train`.
      decoder_dtype: of the decoder; None for none.
    """

    def __init__(self, job: Job, params: Any = None, dtype: str = "auto", attention: str = "auto",
                 decoder_dtype: Any = None):
        mesh = mesh_lib.make(devices=jax.local_devices()[:1])
        self.job, self.spec = job, job.spec
        denoise = drawing.denoiser(self.spec, mesh, dtype, attention=attention)
        if params is None:
            params = bench.filled(unet.param_shapes(self.spec))
        self.params = jax.device_put(params)
        self.draw = sampler.make_sampler(
            denoise, self.spec.latent_shape, narrowed=drawing.narrowed(self.spec, mesh, dtype)
        )
        self.key, self._given = jax.random.key(0), {}
        if decoder_dtype is not None:
            shapes = jax.eval_shape(
                functools.partial(autoencoder.init, job.decoder), jax.random.key(1)
            )
            self.decoder = bench.filled({"decoder": shapes["decoder"]})
            self.decode = jax.jit(lambda p, z: autoencoder.decode(
                job.decoder, p, z / SCALE, decoder_dtype
            ))

    def latents(self, batch: int, steps: int | None = None) -> jax.Array:
        """Of numbers 0 .. batch - 1."""
        steps = steps or self.job.steps
        if (batch, steps) not in self._given:
            self._given[batch, steps] = self.given(batch, steps)
        return self.draw(self.params, *self._given[batch, steps])

    def given(self, batch: int, steps: int) -> tuple:
        """What the sampler takes behind its parameters, on the device."""
        ctx, null = jax.device_put(self.job.inputs(batch))
        table = solvers.make("ddim", schedule_lib.get("sd"), steps)
        return (
            jax.device_put(table.padded()), jnp.full(batch, GUIDANCE), {"context": ctx},
            {"context": null}, self.key, jnp.arange(batch, dtype=jnp.int32),
        )

    def pictures(self, batch: int) -> jax.Array:
        """The same, decoded; waits for them."""
        return jax.block_until_ready(self.decode(self.decoder, self.latents(batch)))


def noise(job: Job, batch: int) -> np.ndarray:
    """What our sampler starts from."""
    index = np.arange(batch, dtype=np.int32)
    return np.asarray(sampler.initial_noise(jax.random.key(0), index, job.spec.latent_shape))


# --- pieces -----------------------------------------------------------------------------------


def parity(job: Job, args: Any, book: Book) -> dict[str, Any]:
    """Two samples after few steps: in float32 as the peer's, and in the type that is timed near
    that."""
    batch, steps = 2, min(job.steps, 4)
    why = bench.no_peer(args, "diffusers")
    peer = None if why else peers.network(job.spec)
    ours = Ours(job, None if peer is None else peers.weights(peer), "float32", "plain")
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(ours.latents(batch, steps))
    out = {"peer": why or "diffusers"}
    quick = Ours(job, ours.params)
    found = np.asarray(quick.latents(batch, steps))
    out["timed_type"] = bench.check("the timed type", bench.relative(found, exact), 0.1)
    if peer is not None:
        t = peers.torch()
        t.set_float32_matmul_precision("highest")
        t.backends.cudnn.allow_tf32 = False
        ctx, null = job.inputs(batch)
        theirs = peers.Sampler(peer, None, SCALE, half=False)
        z = theirs.latents(*theirs.given(noise(job, batch), ctx, null), steps, GUIDANCE)
        z = z.float().cpu().permute(0, 2, 3, 1).numpy()
        out["peer_error"] = bench.check("the peer's samples", bench.relative(exact, z), 1e-3)
    return out


def drawn(
    job: Job, batch: int, args: Any, book: Book, seconds: float | None = None
) -> dict[str, Any]:
    """Our pictures a second."""
    seconds = seconds or args.window
    try:
        ours = Ours(job, decoder_dtype=jnp.float32 if args.toy else jnp.bfloat16)
        begin = time.perf_counter()
        ours.pictures(batch)
        first = time.perf_counter() - begin
        found = bench.interleaved({"ours": lambda: ours.pictures(batch)}, args.toy, seconds)["ours"]
    except Exception as e:
        if not bench.out_of_memory(e):
            raise
        return {"batch": batch, "fits": False}
    assert np.isfinite(np.asarray(ours.pictures(batch))).all(), "pictures are not finite"
    calls = 2e9 * cost.of(job.spec).gflops * job.steps * batch
    return {
        "batch": batch, "fits": True, **found, "per_second": batch / found["median"],
        "first_seconds": first, "utilisation_of_network_calls": bench.share(calls, found["median"]),
    }


def drawn_by_peer(
    job: Job, batch: int, args: Any, book: Book, seconds: float | None = None, eager: bool = False
) -> dict[str, Any]:
    """The peer's."""
    if why := bench.no_peer(args, "diffusers"):
        return {"batch": batch, "fits": False, "why": why}
    ctx, null = job.inputs(batch)
    start = noise(job, batch)
    try:
        peer = peers.Sampler(
            peers.network(job.spec), peers.picture_maker(job.decoder), SCALE, half=True,
            eager=eager,
        )

        given = peer.given(start, ctx, null)

        def run():
            peer.decode(peer.latents(*given, job.steps, GUIDANCE))
            peer.wait()

        begin = time.perf_counter()
        run()
        first = time.perf_counter() - begin
        found = bench.interleaved({"peer": run}, args.toy, seconds or args.window)["peer"]
    except Exception as e:
        if not bench.out_of_memory(e):
            raise
        return {"batch": batch, "fits": False}
    calls = 2e9 * cost.of(job.spec).gflops * job.steps * batch
    return {
        "batch": batch, "fits": True, **found, "per_second": batch / found["median"],
        "first_seconds": first, "utilisation_of_network_calls": bench.share(calls, found["median"]),
    }


def at_best(side: str, job: Job, tried: tuple[int, ...], args: Any, book: Book) -> dict[str, Any]:
    """A side at its best batch, for longer."""
    found = [book.get(f"{side}_{b:03d}") for b in tried]
    fitting = [r for r in found if r and r["fits"]]
    if not fitting:
        whys = [r["why"] for r in found if r and "why" in r]
        return {"fits": False, "why": whys[0] if whys else "none fits"}
    batch = max(fitting, key=lambda r: r["per_second"])["batch"]
    run = drawn if side == "ours" else drawn_by_peer
    return run(job, batch, args, book, 40.0)


def small(member: str, batch: int, args: Any, book: Book) -> dict[str, Any]:
    """Guided pairs of calls of a small member, in one program of many rows, and their bound."""
    job = Job(member, TOY_DECODER, 3 if args.toy else 50)
    ours = Ours(job)
    found = bench.interleaved(
        {"ours": lambda: jax.block_until_ready(ours.latents(batch))}, args.toy, args.window
    )["ours"]
    chip = bench.ceilings() or bench.Ceilings(1e12, 1e11, 1e11)
    bound = roofline.seconds(job.spec, 2 * batch, chip)
    row = found["median"] / job.steps
    return {
        "member": member, "batch": batch, "fits": True, **found,
        "rows_per_second": 1 / row, "calls_per_second": 2 * batch / row,
        "per_second": batch / found["median"],
        "bound": bound if bench.ceilings() else None,
        "share_of_bound": bound["bound"] / row if bench.ceilings() else None,
    }


def decoded(job: Job, batch: int, args: Any, book: Book) -> dict[str, Any]:
    """Pictures of latents: ours in float32 and bfloat16, and the peer's, in turns."""
    shape = (batch, *job.spec.latent_shape)
    z = np.random.default_rng(0).standard_normal(shape, np.float32)
    model = None if bench.no_peer(args, "diffusers") else peers.picture_maker(job.decoder)
    if model is None:
        params = bench.filled(jax.eval_shape(
            functools.partial(autoencoder.init, job.decoder), jax.random.key(0)
        ))
    else:
        params = peers.weights(model)
    params, runs, pictures = jax.device_put({"decoder": params["decoder"]}), {}, {}
    for dtype in (jnp.float32, jnp.bfloat16):
        decode = jax.jit(functools.partial(
            lambda p, z, dtype: autoencoder.decode(job.decoder, p, z, dtype), dtype=dtype
        ))
        name = f"ours_{jnp.dtype(dtype).name}"
        runs[name] = functools.partial(
            lambda decode, z: jax.block_until_ready(decode(params, z)), decode, jax.device_put(z)
        )
        pictures[name] = np.asarray(runs[name](), np.float32)
    exact = pictures["ours_float32"]
    out = {"batch": batch, "bfloat16_error": bench.check(
        "bfloat16", bench.relative(pictures["ours_bfloat16"], exact), 0.1
    )}
    if model is not None:
        peer = peers.Sampler(None, model, SCALE, half=True)
        latents = peers.tensor(z) * SCALE

        def run():
            found = peer.decode(latents)
            peer.wait()
            return found

        theirs = run().float().cpu().permute(0, 2, 3, 1).numpy()
        out["peer_error"] = bench.check("the peer's", bench.relative(theirs, exact), 0.1)
        runs["peer"] = run
    found = bench.interleaved(runs, args.toy, args.window)
    return out | {name: batch / one["median"] for name, one in found.items()}


def pieces(args: Any) -> list[Piece]:
    """In order."""
    toy = args.toy
    job, tried = (TOY_JOB, (2,)) if toy else (JOB, BATCHES)
    out = [
        Piece("ceilings", lambda book: bench.measured_ceilings(toy), 1.0),
        Piece("parity", functools.partial(parity, job, args), 4.0, first=True),
    ]
    for batch in (2,) if toy else DECODED:
        out.append(Piece(
            f"decoder_{batch:03d}", functools.partial(decoded, job, batch, args), 2.5
        ))
    for batch in (2,) if toy else SMALL_BATCHES:
        member = "toy" if toy else "39m"
        out.append(Piece(f"small_{batch:03d}", functools.partial(small, member, batch, args), 2.0))
    for batch in tried:
        for side, run in (("ours", drawn), ("peer", drawn_by_peer)):
            out.append(Piece(
                f"{side}_{batch:03d}", functools.partial(run, job, batch, args), 3.0
            ))
    out.append(Piece(
        f"eager_{tried[-1]:03d}",
        functools.partial(drawn_by_peer, job, tried[-1], args, eager=True), 1.5,
    ))
    for turn in (1,) if toy else (1, 2):
        out += [
            Piece(f"turn{turn}_{side}", functools.partial(at_best, side, job, tried, args), 3.5)
            for side in ("ours", "peer")
        ]
    return out


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["", "batch", "images/s", "of peak", "of bound"]]
    for name, r in book.all().items():
        if "per_second" in r:
            rows.append([
                name, str(r["batch"]), bench.number(r["per_second"]),
                bench.percent(r.get("utilisation_of_network_calls")),
                bench.percent(r.get("share_of_bound")),
            ])
        elif name.startswith("decoder"):
            rows += [
                [f"{name} {side}", str(r["batch"]), bench.number(r[side]), "-", "-"]
                for side in ("ours_float32", "ours_bfloat16", "peer") if side in r
            ]
        elif "why" in r:
            rows.append([name, str(r.get("batch", "")), "-", "-", r["why"]])
    turns = [[book.get(f"turn{k}_{side}") for k in (1, 2)] for side in ("ours", "peer")]
    if all(r and r.get("fits") for side in turns for r in side):
        ours, theirs = (sum(r["per_second"] for r in side) / 2 for side in turns)
        rows.append(["ours / peer", "", bench.number(ours / theirs), "", ""])
    return rows


def main(argv: list[str] | None = None) -> int:
    args = bench.parser(__doc__).parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
