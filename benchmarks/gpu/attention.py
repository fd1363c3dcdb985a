"""Attention's forms on one GPU, at the shapes of the paper's U-Nets: cuDNN's kernel, and plain.

    python benchmarks/gpu/attention.py --to=runs/gpu
    python benchmarks/gpu/attention.py --toy --to=/tmp/toy

Forward, and forward with the gradient of all operands, of 16 images and 8 heads in bfloat16, in
turns; first both must agree. A toy compares the forms that a CPU has.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import bench
import jax
import jax.numpy as jnp
from bench import Book, Piece

from ldm_scaling.models import attention

# Queries, keys, a head's width: of 866M at 64x64 latents, to itself and to 77 tokens.
SHAPES = ((4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (1024, 77, 80), (256, 256, 160))
TOY_SHAPES = ((16, 7, 8),)
_IMAGES, _HEADS = 16, 8


def compared(shape: tuple[int, int, int], args: Any, book: Book) -> dict[str, Any]:
    """Seconds of each form, and how far the first is from the last."""
    queries, keys, width = shape
    images = 2 if args.toy else _IMAGES
    seeds = jax.random.split(jax.random.key(0), 3)
    operands = [
        jax.random.normal(seed, (images, _HEADS, n, width), jnp.bfloat16)
        for seed, n in zip(seeds, (queries, keys, keys))
    ]
    forms = {"chunked" if args.toy else "cudnn": None, "plain": None}
    runs, outputs = {}, {}
    for name in forms:
        form = getattr(attention, name)
        forward = jax.jit(form)
        both = jax.jit(jax.grad(
            lambda qkv, form=form: jnp.sum(form(*qkv).astype(jnp.float32) ** 2)
        ))
        outputs[name] = (forward(*operands), *both(operands))
        runs[f"{name} forward"] = bench.several(
            functools.partial(forward, *operands), args.toy)
        runs[f"{name} gradient"] = bench.several(functools.partial(both, operands), args.toy)
    (got, *grads), (wanted, *wanted_grads) = outputs.values()
    error = bench.check("forward", bench.relative(got, wanted), 2e-2)
    of_gradients = max(
        bench.check("gradient", bench.relative(a, b), 2e-2)
        for a, b in zip(grads, wanted_grads, strict=True)
    )
    found = bench.interleaved(runs, args.toy)
    calls = 1 if args.toy else bench.CALLS
    return {
        "shape": list(shape), "images": images, "heads": _HEADS, "error": error,
        "gradient_error": of_gradients,
        "seconds": {name: one["median"] / calls for name, one in found.items()},
    }


def pieces(args: Any) -> list[Piece]:
    """In order."""
    return [
        Piece("_".join(map(str, shape)), functools.partial(compared, shape, args), 0.7)
        for shape in (TOY_SHAPES if args.toy else SHAPES)
    ]


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["queries x keys, width", "form", "ms forward", "ms with gradient", "error"]]
    for r in book.all().values():
        queries, keys, width = r["shape"]
        for name in dict.fromkeys(key.split()[0] for key in r["seconds"]):
            times = [1e3 * r["seconds"][f"{name} {what}"] for what in ("forward", "gradient")]
            rows.append([f"{queries} x {keys}, {width}", name, *map(bench.number, times),
                         bench.number(r["error"])])
    return rows


def main(argv: list[str] | None = None) -> int:
    args = bench.parser(__doc__).parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
