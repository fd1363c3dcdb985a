"""Group normalisation with SiLU on one GPU: as the networks have it, and by Triton kernels.

    python benchmarks/gpu/group_norm.py --to=runs/gpu
    python benchmarks/gpu/group_norm.py --toy --to=/tmp/toy

Two passes read features for sums over their pixels: forward, and with the gradient that comes in.
XLA's reductions took 16% of a train step of 866M at a third of the bandwidth
(results/2026-11-26_h200.md); here Pallas kernels take them, each program some channels of some rows
of one image, and XLA joins what they leave and does what is left, element by element. Forward, and
forward with gradients, in bfloat16, in turns; first both must agree. A toy interprets the kernels
on a CPU. `in_networks` has networks take them, as train_step.py's piece `kernels_032` does; they
move into `models` when they are seen to pay.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import bench
import jax
import jax.numpy as jnp
from bench import Book, Piece
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ldm_scaling.models import blocks

GROUPS, EPSILON = 32, 1e-5
# Side and channels of a map: of 866M at 64x64 latents, those joined with a skip too.
SHAPES = ((64, 320), (64, 640), (64, 960), (32, 640), (32, 1280), (16, 1280), (8, 2560))
TOY_SHAPES = ((8, 64),)
_IMAGES = 16
# Of a program: its channels (128 bytes of bfloat16 side by side), the pixels that it adds up, and
# those that it holds at a time.
CHANNELS, PIXELS, ROWS = 64, 512, 32


def _rows(ref: Any, start: Any) -> jax.Array:
    return ref[0, pl.ds(start, ROWS), :].astype(jnp.float32)


def _forward_kernel(x_ref, sum_ref, square_ref):
    def body(i, carry):
        x_PC = _rows(x_ref, i * ROWS)
        return carry[0] + x_PC.sum(0), carry[1] + (x_PC * x_PC).sum(0)

    nothing = jnp.zeros((CHANNELS,), jnp.float32)
    count = x_ref.shape[1] // ROWS
    sum_ref[0, 0], square_ref[0, 0] = jax.lax.fori_loop(0, count, body, (nothing, nothing))


def _backward_kernel(x_ref, dy_ref, rate_ref, shift_ref, sum_ref, product_ref):
    rate_C, shift_C = rate_ref[0], shift_ref[0]

    def body(i, carry):
        x_PC, dy_PC = _rows(x_ref, i * ROWS), _rows(dy_ref, i * ROWS)
        g_PC = _through_silu(x_PC * rate_C + shift_C, dy_PC)
        return carry[0] + g_PC.sum(0), carry[1] + (g_PC * x_PC).sum(0)

    nothing = jnp.zeros((CHANNELS,), jnp.float32)
    count = x_ref.shape[1] // ROWS
    sum_ref[0, 0], product_ref[0, 0] = jax.lax.fori_loop(0, count, body, (nothing, nothing))


def _through_silu(z: jax.Array, dy: jax.Array) -> jax.Array:
    """SiLU's gradient at z, times what comes in."""
    weight = 1.0 / (1.0 + jnp.exp(-z))
    return dy * weight * (1.0 + z * (1.0 - weight))


def sums(kernel: Any, maps: tuple[jax.Array, ...], rows: tuple[jax.Array, ...], interpret: bool):
    """A kernel's two sums over pixels, float32 (B, C).

    Args:
      kernel: one of the above.
      maps: (B, P, C), read once; P a multiple of `ROWS`, C of `CHANNELS`.
      rows: (B, C), of each image's channels.
      interpret: runs the kernel's steps as ordinary operations.
    """
    images, pixels, channels = maps[0].shape
    part = math.gcd(PIXELS, pixels)
    if not fits(pixels, channels):
        raise ValueError(
            f"{pixels} pixels of {channels} channels: the kernels take multiples of {ROWS} and "
            f"{CHANNELS}"
        )
    parts = pixels // part
    out = jax.ShapeDtypeStruct((images, parts, channels), jnp.float32)
    one = pl.BlockSpec((1, 1, CHANNELS), lambda b, p, c: (b, p, c))
    found = pl.pallas_call(
        kernel,
        grid=(images, parts, channels // CHANNELS),
        in_specs=[
            *[pl.BlockSpec((1, part, CHANNELS), lambda b, p, c: (b, p, c)) for _ in maps],
            *[pl.BlockSpec((1, CHANNELS), lambda b, p, c: (b, c)) for _ in rows],
        ],
        out_specs=[one, one], out_shape=[out, out], interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
    )(*maps, *rows)
    return tuple(partial.sum(1) for partial in found)


def fits(pixels: int, channels: int) -> bool:
    """Whether the kernels take such maps."""
    return math.gcd(PIXELS, pixels) % ROWS == 0 and channels % CHANNELS == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def fused(
    x_BPC: jax.Array, scale_C: jax.Array, bias_C: jax.Array, groups: int = GROUPS,
    epsilon: float = EPSILON, interpret: bool = False,
) -> jax.Array:
    """silu(group norm of x), in x's type; the gradients of all three."""
    return _fused(x_BPC, scale_C, bias_C, groups, epsilon, interpret)[0]


def _fused(x_BPC, scale_C, bias_C, groups, epsilon, interpret):
    sum_BC, square_BC = sums(_forward_kernel, (x_BPC,), (), interpret)
    count = x_BPC.shape[1] * x_BPC.shape[2] // groups
    mean_BC = _of_groups(sum_BC, groups) / count
    variance_BC = jnp.maximum(_of_groups(square_BC, groups) / count - mean_BC**2, 0.0)
    inverse_BC = jax.lax.rsqrt(variance_BC + epsilon)
    rate_BC = inverse_BC * scale_C
    shift_BC = bias_C - mean_BC * rate_BC
    z_BPC = x_BPC.astype(jnp.float32) * rate_BC[:, None] + shift_BC[:, None]
    y_BPC = (z_BPC * jax.nn.sigmoid(z_BPC)).astype(x_BPC.dtype)
    return y_BPC, (x_BPC, scale_C, mean_BC, inverse_BC, rate_BC, shift_BC)


def _of_groups(y_BC: jax.Array, groups: int) -> jax.Array:
    """Sums over groups of channels, for each channel its group's."""
    images, channels = y_BC.shape
    sum_BG = y_BC.reshape(images, groups, channels // groups).sum(-1)
    return jnp.repeat(sum_BG, channels // groups, axis=1)


def _backward(groups, epsilon, interpret, kept, dy_BPC):
    x_BPC, scale_C, mean_BC, inverse_BC, rate_BC, shift_BC = kept
    sum_BC, product_BC = sums(_backward_kernel, (x_BPC, dy_BPC), (rate_BC, shift_BC), interpret)
    # Of the normalised features x' = (x - mean) / deviation: what comes in, with and without them.
    normal_BC = (product_BC - mean_BC * sum_BC) * inverse_BC
    count = x_BPC.shape[1] * x_BPC.shape[2] // groups
    plain_BC, along_BC = (
        _of_groups(scale_C * y_BC, groups) / count for y_BC in (sum_BC, normal_BC)
    )
    # dx = (scale g - mean(scale g) - x' mean(scale g x')) / deviation
    by_x_BC = -(inverse_BC**2) * along_BC
    fixed_BC = -inverse_BC * plain_BC - by_x_BC * mean_BC
    x, dy = x_BPC.astype(jnp.float32), dy_BPC.astype(jnp.float32)
    g_BPC = _through_silu(x * rate_BC[:, None] + shift_BC[:, None], dy)
    dx_BPC = g_BPC * rate_BC[:, None] + x * by_x_BC[:, None] + fixed_BC[:, None]
    return dx_BPC.astype(x_BPC.dtype), normal_BC.sum(0), sum_BC.sum(0)


fused.defvjp(_fused, _backward)


def plain(x_BPC: jax.Array, scale_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    """The same as the networks have it."""
    return blocks.group_norm(
        x_BPC, scale_C, bias_C, GROUPS, EPSILON, x_BPC.dtype, activated=True
    )


@contextlib.contextmanager
def in_networks(interpret: bool | None = None) -> Iterator[None]:
    """What is traced within takes the kernels wherever SiLU follows a norm and shapes fit;
    interpreted on a CPU unless that is given."""
    if interpret is None:
        interpret = jax.default_backend() == "cpu"
    before = blocks.group_norm

    def instead(x_BHWC, scale_C, bias_C, groups, epsilon, dtype, activated=False):
        x_BPC = x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1])
        if not activated or x_BPC.dtype != dtype or not fits(*x_BPC.shape[1:]):
            return before(x_BHWC, scale_C, bias_C, groups, epsilon, dtype, activated)
        y_BPC = fused(x_BPC, scale_C, bias_C, groups, epsilon, interpret)
        return y_BPC.reshape(x_BHWC.shape)

    blocks.group_norm = instead
    try:
        yield
    finally:
        blocks.group_norm = before


def compared(shape: tuple[int, int], args: Any, book: Book) -> dict[str, Any]:
    """Seconds of each form, and how far the kernels' is from the other."""
    side, channels = shape
    images = 2 if args.toy else _IMAGES
    seeds = jax.random.split(jax.random.key(0), 4)
    x_BPC, dy_BPC = (
        jax.random.normal(seed, (images, side * side, channels), jnp.bfloat16)
        for seed in seeds[:2]
    )
    scale_C, bias_C = (1 + 0.1 * jax.random.normal(seed, (channels,)) for seed in seeds[2:])
    operands = (x_BPC, scale_C, bias_C)
    interpret = jax.default_backend() == "cpu"
    forms = {
        "kernels": lambda *three: fused(*three, GROUPS, EPSILON, interpret), "plain": plain
    }
    runs, outputs = {}, {}
    for name, form in forms.items():
        forward = jax.jit(form)

        def gradients(operands, dy_BPC, form=form):
            y_BPC, back = jax.vjp(form, *operands)
            return y_BPC, back(dy_BPC)

        both = jax.jit(gradients)
        outputs[name] = (forward(*operands), *both(operands, dy_BPC)[1])
        runs[f"{name} forward"] = bench.several(
            functools.partial(forward, *operands), args.toy)
        runs[f"{name} gradient"] = bench.several(
            functools.partial(both, operands, dy_BPC), args.toy)
    (got, *grads), (wanted, *wanted_grads) = outputs.values()
    error = bench.check("forward", bench.relative(got, wanted), 1e-2)
    of_gradients = max(
        bench.check("gradient", bench.relative(a, b), 1e-2)
        for a, b in zip(grads, wanted_grads, strict=True)
    )
    found = bench.interleaved(runs, args.toy)
    calls = 1 if args.toy else bench.CALLS
    ceilings = bench.ceilings()
    # Forward x twice and y; backward x and what comes in twice, and dx.
    passes = {"forward": 3, "gradient": 3 + 5}
    return {
        "shape": list(shape), "images": images, "error": error, "gradient_error": of_gradients,
        "seconds": {name: one["median"] / calls for name, one in found.items()},
        "bound_seconds": ceilings and {
            what: many * x_BPC.nbytes / ceilings.bandwidth for what, many in passes.items()
        },
    }


def pieces(args: Any) -> list[Piece]:
    """In order."""
    return [
        Piece("_".join(map(str, shape)), functools.partial(compared, shape, args), 0.5)
        for shape in (TOY_SHAPES if args.toy else SHAPES)
    ]


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["map, channels", "form", "ms forward", "ms with gradient", "bound", "error"]]
    for r in book.all().values():
        side, channels = r["shape"]
        for name in ("kernels", "plain"):
            times = [1e3 * r["seconds"][f"{name} {what}"] for what in ("forward", "gradient")]
            bound = r["bound_seconds"]
            least = ", ".join(bench.number(1e3 * b) for b in bound.values()) if bound else "-"
            rows.append([f"{side}x{side}, {channels}", name, *map(bench.number, times), least,
                         bench.number(r["error"])])
    return rows


def main(argv: list[str] | None = None) -> int:
    args = bench.parser(__doc__).parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
