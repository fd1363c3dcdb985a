"""Train steps of the paper's family on one GPU: images/s, FLOP utilisation, against diffusers.

    python benchmarks/gpu/train_step.py --to=runs/gpu [--ladder] [--no-peer]
    python benchmarks/gpu/train_step.py --toy --to=/tmp/toy

The 866M network (SD v1.5's shape, context 1024 wide) at 64x64 latents, bfloat16, on latents and
text states that are there: `training.step` as `ldm-scaling train` runs it, the optimiser, clipping
and the average included, without reading files. First parity (loss and gradient of the same noise),
then each side goes up in batch until its memory is full, then both run in turns at their best, and
ours for `--seconds`. `--ladder` goes on with the family: each member at the largest of its batches
that fits. FLOPs of a step are three forward passes as XLA counts them, whatever is recomputed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from typing import Any

import bench
import group_norm
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import peers
from bench import Book, Piece

from ldm_scaling.config import Diffusion, Train
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import cost, unet
from ldm_scaling.parallel import leafwise, placing
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.tasks import drawing, text_to_image
from ldm_scaling.training import step as step_lib
from ldm_scaling.training.state import TrainState

SCALE = 0.18215
BATCHES = (32, 64, 96, 128)
TOY_BATCHES = (2,)
# Member, batches to try from the largest on, what is recomputed, first moment.
LADDER = (
    ("39m", (512, 256, 128), "none", "float32"), ("83m", (384, 192, 96), "none", "float32"),
    ("145m", (256, 128, 64), "none", "float32"), ("223m", (224, 128, 64), "none", "float32"),
    ("318m", (192, 128, 64), "none", "float32"), ("430m", (160, 96, 48), "none", "float32"),
    ("558m", (144, 80, 40), "none", "float32"), ("704m", (112, 64, 32), "none", "float32"),
    ("2b", (64, 48, 32, 16), "none", "float32"), ("5b", (48, 32, 16, 8), "block", "bfloat16"),
)
# Those of configs/h200_ladder.py and wider ones, at half its batch.
LADDER += tuple(
    (f"c{c}_s16", (256,), "none", "float32") for c in (16, 24, 32, 48, 64, 96, 128, 192, 256)
)
TOY_LADDER = (("toy", (4, 2), "block", "bfloat16"),)


def batches_of(spec: unet.UNetSpec, batch: int, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Random latents and text states, as caches keep them."""
    rng = np.random.default_rng(0)
    latent = (batch, *spec.latent_shape)
    text = (batch, spec.context_length, spec.context_dim)
    return [
        {"mean": rng.standard_normal(latent, np.float32).astype(np.float16) * 4,
         "logvar": (rng.standard_normal(latent, np.float32) - 8).astype(np.float16),
         "context": rng.standard_normal(text, np.float32).astype(np.float16)}
        for _ in range(count)
    ]


class Ours:
    """Our train step.

    Args:
      member: its name in the zoo.
      batch: examples a step.
      remat, moments: see `config.Train`.
      kernels: whether group norms take those of group_norm.py.
      layout: whether convolutions' kernels are held as in layouts.py.
    """

    def __init__(
        self, member: str, batch: int, remat: str = "none", moments: str = "float32",
        kernels: bool = False, layout: bool = False,
    ):
        spec = self.spec = bench.spec_of(member)
        self.train = Train(
            batch_size=batch, learning_rate=1e-4, warmup_steps=0, remat=remat, moment_dtype=moments
        )
        mesh = mesh_lib.make(devices=jax.local_devices()[:1])
        denoise = drawing.denoiser(spec, mesh, remat=remat)
        null = np.zeros((spec.context_length, spec.context_dim), np.float32)
        loss = text_to_image.loss_fn(denoise, spec, self.train, Diffusion(), SCALE, null)
        init = functools.partial(unet.init, spec)
        abstract = step_lib.abstract_state(init, self.train, mesh)
        self.key = placing.replicate(mesh, jax.random.key(1))
        self.batches = [placing.put_batch(mesh, b) for b in batches_of(spec, batch)]
        step = step_lib.make(loss, self.train, mesh, abstract)
        shape = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.batches[0]
        )
        # Where a step has layouts of its own, shapes do not say where they are.
        given, self._held = abstract, None
        if layout:
            self._held = layouts.formats(abstract)
            step, given = layouts.jitted(step, abstract, mesh), layouts.unplaced(abstract)
        start = time.perf_counter()
        with group_norm.in_networks() if kernels else contextlib.nullcontext():
            lowered = step.lower(given, shape, self.key)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        # Memory is taken with the first step: until then others may use it.
        self.state, self.number, self._abstract = None, 0, abstract
        self.flops = step_flops(member, batch)

    def __call__(self, calls: int) -> float:
        """So many steps; the last loss."""
        if self.state is None:
            params = bench.filled(self._abstract.params)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding),
                                 (self._abstract.step, self._abstract.opt_state))
            state = TrainState(zeros[0], params, zeros[1], jax.tree.map(jnp.copy, params))
            self.state = state if self._held is None else jax.device_put(state, self._held)
        for _ in range(calls):
            batch = self.batches[self.number % len(self.batches)]
            self.state, values = self.compiled(self.state, batch, self.key)
            self.number += 1
        return float(values["loss"])

    def memory(self) -> float:
        """Bytes that the compiler laid out."""
        found = self.compiled.memory_analysis()
        return float(
            found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
            - found.alias_size_in_bytes
        )


# The pieces of a toy are one process, and share what is compiled; others are alone on the card.
_made = functools.cache(Ours)


def ours_of(member: str, batch: int, args: Any) -> Ours:
    """Our train step, made anew but for a toy's."""
    return (_made if args.toy else Ours)(member, batch)


def step_flops(member: str, batch: int) -> float:
    """Three forward passes, as `training.meter` counts."""
    return 3e9 * cost.of(bench.spec_of(member)).gflops * batch


# --- pieces -----------------------------------------------------------------------------------


def parity(member: str, args: Any, book: Book) -> dict[str, Any]:
    """Loss and gradient of two examples in the type that is trained in, against float32 with plain
    attention and, where it is here, against the peer on the same weights."""
    spec, batch = bench.spec_of(member), 2
    why = bench.no_peer(args, "diffusers")
    peer = None
    if why:
        params = leafwise.run(functools.partial(unet.init, spec), jax.random.key(0))
    else:
        peer = peers.TrainStep(spec, Train(batch_size=batch), SCALE, batches_of(spec, batch, 1))
        params = peers.weights(peer.model)
    given = batches_of(spec, batch, 1)[0]
    z = SCALE * given["mean"].astype(np.float32)
    ctx = given["context"].astype(np.float32)
    steps = np.array([100, 700], np.int32)
    noise = np.random.default_rng(1).standard_normal(z.shape, np.float32)
    mesh = mesh_lib.make(devices=jax.local_devices()[:1])

    def gradient(dtype: str, attention: str):
        denoise = drawing.denoiser(spec, mesh, dtype, attention=attention)

        @jax.jit
        def run(params):
            return jnp.mean(loss_lib.loss_at(
                denoise, params, z, {"context": ctx}, steps, noise, schedule_lib.get("sd"),
                "epsilon",
            ))

        loss, grads = jax.jit(jax.value_and_grad(run))(params)
        found = [grads["conv_in"]["kernel"], grads["conv_out"]["kernel"],
                 grads["mid_attn"]["block"]["attn1"]["to_q"]["kernel"]]
        return float(loss), [np.asarray(g, np.float64) for g in found]

    with jax.default_matmul_precision("highest"):
        exact = gradient("float32", "plain")
    half = gradient("auto", "auto")
    loss_error = abs(half[0] / exact[0] - 1)
    # In bfloat16 a gradient is off by a tenth of its size and more; its direction is not.
    limit, apart = (5e-2, bench.relative) if args.toy else (0.1, bench.turned)
    errors = {f"gradient {i}": apart(a, b) for i, (a, b) in enumerate(zip(*(
        half[1], exact[1])))}
    out = {"loss": bench.check("loss", loss_error, 1e-2), "peer": why or "diffusers"}
    out["gradients"] = max(bench.check(k, v, limit) for k, v in errors.items())
    if peer is not None:
        t = peer.t
        loss = peer.loss(peers.tensor(z), t.from_numpy(ctx).to(peers.where()),
                         t.from_numpy(steps).long().to(peers.where()), peers.tensor(noise))
        loss.backward()
        m = peer.model
        there = [m.conv_in.weight.grad, m.conv_out.weight.grad]
        wanted = [g.float().cpu().permute(2, 3, 1, 0).numpy() for g in there]
        out["peer_loss"] = bench.check(
            "the peer's loss", abs(loss.item() / exact[0] - 1), 1e-2
        )
        out["peer_gradients"] = max(
            bench.check(f"the peer's gradient {i}", apart(a, b), limit)
            for i, (a, b) in enumerate(zip(wanted, exact[1]))
        )
    return out


def attempt(member: str, batch: int, args: Any, book: Book, remat: str = "none",
            moments: str = "float32", alone: bool = True, **own: bool) -> dict[str, Any]:
    """Our images/s at a batch, or that it does not fit. Alone, it has the card from its first byte
    to its last; else it takes turns with others, each keeping what it holds. `own` is `Ours`'s
    `kernels` and `layout`."""
    try:
        plain = remat == "none" and moments == "float32" and not own
        ours = ours_of(member, batch, args) if plain else Ours(
            member, batch, remat, moments, **own)
        with bench.turn() if alone else contextlib.nullcontext():
            found = bench.sustained(ours, batch, args.window, args.toy)
            loss = ours(1)
    except Exception as e:
        if not bench.out_of_memory(e):
            raise
        return {"member": member, "batch": batch, "fits": False}
    assert math.isfinite(loss), f"the loss is {loss}"
    rate = found["per_second"]
    return {
        "member": member, "batch": batch, "fits": True, **found, "remat": remat,
        "utilisation": bench.share(ours.flops, batch / rate),
        "gigabytes": ours.memory() / 1e9, "compile_seconds": ours.compile_seconds,
    }


def attempt_peer(
    member: str, batch: int, args: Any, book: Book, eager: bool = False
) -> dict[str, Any]:
    """The peer's."""
    if why := bench.no_peer(args, "diffusers"):
        return {"member": member, "batch": batch, "fits": False, "why": why}
    spec = bench.spec_of(member)
    try:
        peer = peers.TrainStep(
            spec, Train(batch_size=batch), SCALE, batches_of(spec, batch), eager
        )
        begin = time.perf_counter()
        peer(1)
        first = time.perf_counter() - begin
        found = bench.sustained(peer, batch, args.window, args.toy)
    except Exception as e:
        if not bench.out_of_memory(e):
            raise
        return {"member": member, "batch": batch, "fits": False}
    rate = found["per_second"]
    return {
        "member": member, "batch": batch, "fits": True, **found, "first_seconds": first,
        "utilisation": bench.share(step_flops(member, batch), batch / rate),
        "gigabytes": peer.memory() / 1e9,
    }


def up(side: str, number: int, tried: tuple[int, ...], run: Any, book: Book) -> dict[str, Any]:
    """A batch, unless the one before it did not fit."""
    if number:
        before = book.get(f"{side}_{tried[number - 1]:03d}")
        if before is not None and not before["fits"]:
            return {"batch": tried[number], "fits": False, "why": before.get("why", "as before")}
    return run(book)


def best(book: Book, side: str, tried: tuple[int, ...]) -> int | None:
    """The batch of the highest rate."""
    found = [book.get(f"{side}_{b:03d}") for b in tried]
    fitting = [r for r in found if r and r["fits"]]
    return max(fitting, key=lambda r: r["per_second"])["batch"] if fitting else None


def at_best(side: str, member: str, tried: tuple[int, ...], seconds: float, args: Any,
            book: Book) -> dict[str, Any]:
    """A side's images/s at its best batch for so long."""
    batch = best(book, side, tried)
    if batch is None:
        why = bench.no_peer(args, "diffusers") if side == "peer" else None
        return {"member": member, "fits": False, "why": why or "no batch fits"}
    spec = bench.spec_of(member)
    run = ours_of(member, batch, args) if side == "ours" else peers.TrainStep(
        spec, Train(batch_size=batch), SCALE, batches_of(spec, batch)
    )
    found = bench.sustained(run, batch, seconds, args.toy)
    return {
        "member": member, "batch": batch, "fits": True, **found,
        "utilisation": bench.share(step_flops(member, batch), batch / found["per_second"]),
    }


def largest(row: tuple, number: int, args: Any, book: Book) -> dict[str, Any]:
    """A member at a batch, unless a larger one fits."""
    member, batches, remat, moments = row
    for batch in batches[:number]:
        before = book.get(f"z_{member}_{batch:03d}")
        if before is not None and before["fits"]:
            return {"member": member, "batch": batches[number], "fits": False,
                    "why": f"{batch} fits"}
    return attempt(member, batches[number], args, book, remat, moments)


def pieces(args: Any) -> list[Piece]:
    """In order."""
    member, tried = ("toy", TOY_BATCHES) if args.toy else ("866m", BATCHES)
    out = [
        Piece("ceilings", lambda book: bench.measured_ceilings(args.toy), 1.0),
        Piece("parity", functools.partial(parity, member, args), 3.0, first=True),
    ]
    for number, batch in enumerate(tried):
        for side, run in (("ours", attempt), ("peer", attempt_peer)):
            # The first batch fits both sides at once: there they take turns.
            more = {"alone": number > 0} if side == "ours" else {}
            one = functools.partial(run, member, batch, args, **more)
            out.append(Piece(
                f"{side}_{batch:03d}", functools.partial(up, side, number, tried, one), 2.5
            ))
    out.append(Piece(
        f"eager_{tried[-1] if args.toy else 64:03d}",
        functools.partial(attempt_peer, member, tried[-1] if args.toy else 64, args, eager=True),
        1.5,
    ))
    out += [
        Piece(
            f"{name}_{tried[0]:03d}",
            functools.partial(attempt, member, tried[0], args, alone=False, **{name: True}), 2.5,
        )
        for name in ("kernels", "layout")[: 1 if args.toy else 2]  # a test has the other's toy
    ]
    for turn in (1, 2):
        out += [
            Piece(f"turn{turn}_{side}",
                  functools.partial(at_best, side, member, tried, 60.0, args), 3.0)
            for side in ("ours", "peer")
        ]
    out.append(Piece(
        "sustained", functools.partial(at_best, "ours", member, tried, args.seconds, args),
        args.seconds / 60 + 2,
    ))
    if args.ladder or (args.piece or "").startswith("z_"):
        rows = TOY_LADDER if args.toy else LADDER
        out += [
            Piece(f"z_{row[0]}_{batch:03d}", functools.partial(largest, row, number, args), 4.0)
            for row in rows for number, batch in enumerate(row[1])
        ]
    return out


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["", "member", "batch", "images/s", "slowest", "of peak", "GB"]]
    for name, r in book.all().items():
        if "per_second" in r:
            rows.append([
                name, r["member"], str(r["batch"]), bench.number(r["per_second"]),
                bench.number(r["slowest_window"]), bench.percent(r["utilisation"]),
                bench.number(r.get("gigabytes")),
            ])
        elif "batch" in r or "why" in r:
            rows.append([name, r.get("member", ""), str(r.get("batch", "")), "-", "-", "-",
                         r.get("why") or "does not fit"])
    turns = [[book.get(f"turn{k}_{side}") for k in (1, 2)] for side in ("ours", "peer")]
    if all(r and r.get("fits") for side in turns for r in side):
        ours, theirs = (sum(r["per_second"] for r in side) / 2 for side in turns)
        rows.append(["ours / peer", "", "", bench.number(ours / theirs), "", "", ""])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the sustained run")
    parser.add_argument("--ladder", action="store_true", help="the rest of the family too")
    args = parser.parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
