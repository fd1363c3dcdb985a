"""DiS's blocks (Fei et al. 2024, arXiv 2402.05608) against DiT's, by the TPU's own compiler: does a
selective scan compile well?

    pip install -e '.[tpu-plan]'
    python benchmarks/state_space.py [--width=768 --side=32 --batch=8 --topology=v5e:2x2]

Two blocks of DiS, each a Mamba layer (Gu & Dao 2023, arXiv 2312.00752) in both directions, have the
products of one block of DiT of the same width: the paper's depths are twice DiT's. A row is the
gradient of one such pair, or block, on each chip: what it moves, holds beside its arguments and
needs at least. The scan of each direction is written in several ways:

- tokens: `lax.scan`, a token at a time;
- unrolled: a `lax.scan` over chunks of 16 tokens, a token at a time within each without a loop,
  computed again in the backward pass;
- associative: `lax.associative_scan` over all tokens;
- chunks: a `lax.scan` over chunks of 16 tokens, each an associative scan, computed again in the
  backward pass;
- matrices: chunks of 128 tokens as products of matrices (Mamba-2's, Dao & Gu 2024, arXiv
  2405.21060). It needs one decay a head where DiS has one for every channel and state: another
  network, for comparison;
- no scan: a product in its place, for what all around it needs.

Nothing runs: these are the compiler's figures.
"""

from __future__ import annotations

import argparse
import math
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.parallel import aot

STATES, TAPS, HEAD = 16, 4, 64
CHUNK, MATRIX = 16, 128


def combine(one: tuple, two: tuple) -> tuple:
    """h -> a h + b, one after the other."""
    return two[0] * one[0], two[0] * one[1] + two[1]


def by_tokens(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, for each channel."""
    told = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x_BLE, dt_BLE, b_BLN, c_BLN))
    start = jnp.zeros((x_BLE.shape[0], *a_EN.shape))
    return jnp.moveaxis(jax.lax.scan(_token(a_EN), start, told)[1], 0, 1)


def _token(a_EN):
    def step(h_BEN, told):
        x_BE, dt_BE, b_BN, c_BN = told
        h_BEN = jnp.exp(dt_BE[..., None] * a_EN) * h_BEN + (dt_BE * x_BE)[..., None] * b_BN[:, None]
        return h_BEN, jnp.einsum("ben,bn->be", h_BEN, c_BN)

    return step


def unrolled(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """The same."""
    @jax.checkpoint
    def chunk(h_BEN, told):
        return jax.lax.scan(_token(a_EN), h_BEN, told, unroll=CHUNK)

    def split(v):
        return jnp.moveaxis(v, 1, 0).reshape(-1, CHUNK, v.shape[0], v.shape[-1])

    told = tuple(map(split, (x_BLE, dt_BLE, b_BLN, c_BLN)))
    start = jnp.zeros((x_BLE.shape[0], *a_EN.shape))
    y = jax.lax.scan(chunk, start, told)[1]
    return jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, 1)


def _maps(x_BLE, dt_BLE, a_EN, b_BLN):
    return (jnp.exp(dt_BLE[..., None] * a_EN), (dt_BLE * x_BLE)[..., None] * b_BLN[:, :, None])


def associative(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """The same."""
    _, h_BLEN = jax.lax.associative_scan(combine, _maps(x_BLE, dt_BLE, a_EN, b_BLN), axis=1)
    return jnp.einsum("blen,bln->ble", h_BLEN, c_BLN)


def by_chunks(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """The same."""
    @jax.checkpoint
    def step(h_BEN, told):
        x, dt, b, c = told
        decay, h = jax.lax.associative_scan(combine, _maps(x, dt, a_EN, b), axis=1)
        h = h + decay * h_BEN[:, None]
        return h[:, -1], jnp.einsum("blen,bln->ble", h, c)

    def split(v):
        return jnp.moveaxis(v.reshape(v.shape[0], -1, CHUNK, v.shape[-1]), 1, 0)

    told = tuple(map(split, (x_BLE, dt_BLE, b_BLN, c_BLN)))
    start = jnp.zeros((x_BLE.shape[0], *a_EN.shape))
    return jnp.moveaxis(jax.lax.scan(step, start, told)[1], 0, 1).reshape(x_BLE.shape)


def by_matrices(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """With one decay a head, and bfloat16 products."""
    batch, length, e = x_BLE.shape
    heads, q = e // HEAD, min(MATRIX, length)
    dt_BLH = dt_BLE.reshape(batch, length, heads, HEAD).mean(-1)
    a_H = a_EN.reshape(heads, -1).mean(-1)

    def split(v):
        return v.reshape(batch, length // q, q, *v.shape[2:])

    half = jnp.bfloat16
    x = split(x_BLE.reshape(batch, length, heads, HEAD) * dt_BLH[..., None]).astype(half)
    b, c, log = split(b_BLN).astype(half), split(c_BLN).astype(half), split(dt_BLH * a_H)
    total = jnp.cumsum(log, axis=2)
    gap = total[:, :, :, None] - total[:, :, None]  # (B, chunks, to, from, heads)
    seen = np.tril(np.ones((q, q), bool))[..., None]
    decay = jnp.exp(jnp.where(seen, gap, -jnp.inf)).astype(half)
    inside = jnp.einsum("bgqn,bgsn->bgqs", c, b)[..., None] * decay
    y = jnp.einsum("bgqsh,bgshp->bgqhp", inside, x)
    left = jnp.exp(total[:, :, -1:] - total).astype(half)
    made = jnp.einsum("bgsn,bgsh,bgshp->bghpn", b, left, x).astype(jnp.float32)

    def step(h, told):
        decay, new = told
        return decay[..., None, None] * h + new, h

    over = jnp.moveaxis(jnp.exp(total[:, :, -1]), 1, 0)
    start = jnp.zeros((batch, heads, HEAD, STATES))
    _, before = jax.lax.scan(step, start, (over, jnp.moveaxis(made, 1, 0)))
    before = jnp.moveaxis(before, 0, 1).astype(half)
    y = y + jnp.einsum("bgqn,bghpn,bgqh->bgqhp", c, before, jnp.exp(total).astype(half))
    return y.reshape(batch, length, e).astype(jnp.float32)


def without(x_BLE, dt_BLE, a_EN, b_BLN, c_BLN):
    """No scan: what all around it needs."""
    return dt_BLE * x_BLE * jnp.sum(b_BLN * c_BLN, axis=-1, keepdims=True)


FORMS = {
    "no scan": without, "tokens": by_tokens, "unrolled": unrolled, "associative": associative,
    "chunks": by_chunks, "matrices": by_matrices,
}


def mamba_shapes(d: int) -> dict[str, tuple[int, ...]]:
    """Of one layer's weights; of the directions each has its own."""
    e, rank = 2 * d, math.ceil(d / 16)
    return {
        "in": (d, 2 * e), "taps": (2, TAPS, e), "x": (2, e, rank + 2 * STATES), "dt": (2, rank, e),
        "bias": (2, e), "a": (2, e, STATES), "skip": (2, e), "out": (e, d),
    }


def mamba(w: dict, x_BLD: jax.Array, scan) -> jax.Array:
    """A block: layer norm, a Mamba layer in both directions, a residual."""
    half, rank = jnp.bfloat16, w["dt"].shape[1]
    y = normed(x_BLD).astype(half) @ w["in"].astype(half)
    x, z = jnp.split(y, 2, axis=-1)
    total = 0.0
    for k in range(2):
        u = x[:, ::-1] if k else x
        padded = jnp.pad(u, ((0, 0), (TAPS - 1, 0), (0, 0)))
        taps = w["taps"][k].astype(half)
        u = jax.nn.silu(sum(padded[:, i : i + u.shape[1]] * taps[i] for i in range(TAPS)))
        told = u @ w["x"][k].astype(half)
        dt = told[..., :rank] @ w["dt"][k].astype(half)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + w["bias"][k])
        b, c = (v.astype(jnp.float32) for v in jnp.split(told[..., rank:], 2, axis=-1))
        u32 = u.astype(jnp.float32)
        out = scan(u32, dt, -jnp.exp(w["a"][k]), b, c) + w["skip"][k] * u32
        total += (out[:, ::-1] if k else out) * 0.5
    out = (total.astype(half) * jax.nn.silu(z)) @ w["out"].astype(half)
    return x_BLD + out.astype(jnp.float32)


def normed(x_BLD: jax.Array) -> jax.Array:
    """Layer norm without weights."""
    return jax.nn.standardize(x_BLD, axis=-1, epsilon=1e-6)


def transformer_shapes(d: int) -> dict[str, tuple[int, ...]]:
    """Of one block's weights."""
    return {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}


def transformer(w: dict, x_BLD: jax.Array) -> jax.Array:
    """A block of DiT without what modulates it."""
    half, (batch, length, d) = jnp.bfloat16, x_BLD.shape
    qkv = normed(x_BLD).astype(half) @ w["qkv"].astype(half)
    q, k, v = jnp.split(qkv.reshape(batch, length, 3 * d // HEAD, HEAD), 3, axis=2)
    found = jax.nn.dot_product_attention(q, k, v).reshape(batch, length, d)
    x = x_BLD + (found @ w["out"].astype(half)).astype(jnp.float32)
    up = jax.nn.gelu(normed(x).astype(half) @ w["up"].astype(half))
    return x + (up @ w["down"].astype(half)).astype(jnp.float32)


def agree() -> None:
    """The forms of one scan give the same; that by matrices where its decays are one a head."""
    rng = np.random.default_rng(0)
    batch, length, e = 2, 4 * CHUNK, HEAD
    x, b, c = (jnp.asarray(rng.normal(size=(batch, length, n))) for n in (e, STATES, STATES))
    dt = jnp.asarray(rng.uniform(0.01, 0.3, (batch, length, e)))
    a = -jnp.asarray(rng.uniform(0.5, STATES, (e, STATES)))
    want = by_tokens(x, dt, a, b, c)
    for form in (unrolled, associative, by_chunks):
        np.testing.assert_allclose(form(x, dt, a, b, c), want, atol=1e-4)
    dt, a = jnp.broadcast_to(dt[..., :1], dt.shape), jnp.full_like(a, -2.0)
    want = by_tokens(x, dt, a, b, c)
    np.testing.assert_allclose(by_matrices(x, dt, a, b, c), want, atol=0.02 * jnp.abs(want).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--side", type=int, default=32, help="of the latents, in patches of 2")
    parser.add_argument("--batch", type=int, default=8, help="on each chip")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--only", default="", help="one of the rows")
    args = parser.parse_args()
    agree()
    devices = aot.topology(args.topology)
    chip, shared = aot.chip_of(devices)
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = (NamedSharding(mesh, PartitionSpec(*p)) for p in ((), ("data",)))
    length = (args.side // 2) ** 2
    x = jax.ShapeDtypeStruct(
        (args.batch * len(devices), length, args.width), jnp.float32, sharding=split
    )

    def gradient(block, shapes, count):
        def loss(weights, x):
            for w in weights:
                x = block(w, x)
            return jnp.mean(x**2)

        weights = [
            {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for n, s in shapes.items()}
        ] * count
        run = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(whole, split))
        return aot.compile(run, weights, x, mesh=mesh)

    rows = {"attention": (transformer, transformer_shapes(args.width), 1)}
    for name, scan in FORMS.items():
        def block(w, x, scan=scan):
            return mamba(w, x, scan)

        rows[name] = (block, mamba_shapes(args.width), 2)
    print(f"{args.topology}, width {args.width}, {length} tokens, {args.batch} examples a chip")
    print(f"{'':12}    GFLOP  GB moved  GB held compiler ms  bound ms")
    for name, row in rows.items():
        if args.only in ("", name):
            found = gradient(*row)
            bound = max(aot.roofline(found.work, chip, shared).values())
            seconds = max(bound, found.work.optimistic_seconds)
            print(
                f"{name:12} {found.work.flops / 1e9:8.1f} {found.work.bytes / 1e9:9.2f} "
                f"{found.memory.temporaries / 1e9:8.2f} "
                f"{1e3 * found.work.optimistic_seconds:11.2f} {1e3 * seconds:9.2f}", flush=True,
            )


if __name__ == "__main__":
    main()
