"""Attention's forms, and the one function that chooses between them.

Shape legend: B batch, N heads, L queries, M keys, W width of a head.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ldm_scaling.errors import UserError

FORMS = ("auto", "plain", "chunked", "splash", "cudnn")
# Below so many queries, a TPU's fused kernel gains nothing over two products: its tiles are of 128.
_SPLASH_TOKENS = 256
# Above so many bytes of logits, plain attention on a device without a fused kernel is chunked.
_MOST_LOGITS = 2**30
_CHUNK_LOGITS = 2**26
_TILE = 128
_CUDNN = 8
_NO_WEIGHT = -1e4


def plain(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(W)) v with float32 logits, in the operands' type: (B, N, L, W).

    Heads before tokens, and plain batched products: on XLA:CPU the same sums written as one einsum
    over (b, l, n, w) run 6 times slower forward and 3 times slower backward.
    """
    scale = 1.0 / math.sqrt(q_BNLW.shape[-1])
    logits_BNLM = jnp.matmul(
        q_BNLW * scale, k_BNMW.swapaxes(2, 3), preferred_element_type=jnp.float32
    )
    # Softmax with its division after the second product (as flash attention does): one pass
    # less over (L, M), and backward 2.7 times faster than jax.nn.softmax on XLA:CPU.
    peak = lax.stop_gradient(jnp.max(logits_BNLM, axis=-1, keepdims=True))
    weights = jnp.exp(logits_BNLM - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v_BNMW.dtype), v_BNMW, preferred_element_type=jnp.float32)
    return (out / total).astype(v_BNMW.dtype)


def textbook(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """The same as `plain` (to rounding), as papers write it: the form that FLOPs are counted of, so
    that a faster one does not change a network's cost."""
    logits_BNLM = jnp.matmul(q_BNLW, k_BNMW.swapaxes(2, 3)) / math.sqrt(q_BNLW.shape[-1])
    return jnp.matmul(jax.nn.softmax(logits_BNLM, axis=-1), v_BNMW)


def chunked(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """`plain` over a part of the queries at a time, each recomputed in the backward pass: memory
    grows with the tokens, not with their square (Rabe & Staats 2021, arXiv 2112.05682, over
    queries alone)."""
    b, n, length, w = q_BNLW.shape
    most = max(1, _CHUNK_LOGITS // (4 * b * n * k_BNMW.shape[2]))
    size = next(size for size in range(min(length, most), 0, -1) if length % size == 0)
    if size == length:
        return plain(q_BNLW, k_BNMW, v_BNMW)
    parts = jnp.moveaxis(q_BNLW.reshape(b, n, length // size, size, w), 2, 0)
    part = jax.checkpoint(lambda q: plain(q, k_BNMW, v_BNMW))
    return jnp.moveaxis(lax.map(part, parts), 0, 2).reshape(b, n, length, w)


def splash(
    q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPUs (flash attention, Dao et al. 2022, arXiv 2205.14135).

    Args:
      interpret: runs the kernel's steps as ordinary operations, on any device, slowly.
    """
    q_BNLW = q_BNLW * (1.0 / math.sqrt(q_BNLW.shape[-1]))
    k, v, fill = k_BNMW, v_BNMW, -k_BNMW.shape[2] % _TILE
    if fill:
        # Keys that fill up the last tile get no weight, by one more channel: 1 in every query, far
        # below 0 in these keys. The kernel's widths are filled up to 128 anyway.
        below = jnp.where(jnp.arange(k.shape[2] + fill) < k.shape[2], 0.0, _NO_WEIGHT)
        k, v = (jnp.pad(a, [(0, 0), (0, 0), (0, fill), (0, 0)]) for a in (k, v))
        below = jnp.broadcast_to(below[:, None].astype(k.dtype), (*k.shape[:3], 1))
        one = jnp.ones_like(q_BNLW[..., :1])
        q_BNLW = jnp.concatenate([q_BNLW, one], axis=-1)
        k = jnp.concatenate([k, below], axis=-1)
    kernel = _splash_kernel(q_BNLW.shape[1:], k.shape[2], interpret)
    return jax.vmap(kernel)(q_BNLW, k, v).astype(v.dtype)


def splash_blocks(queries: int, keys: int, width: int) -> tuple[int, int, int]:
    """Tiles of the queries, of the keys, and of the keys within one product, by a head's width:
    what the kernel holds at once must fit 16 MiB of VMEM.

    Raises:
      UserError: when the queries do not split into tiles of 128.
    """
    if queries % _TILE:
        raise UserError(
            f"attention=splash takes multiples of {_TILE} queries, not {queries}: use auto or plain"
        )
    most = 1024 if width <= 128 else 512

    def tile(tokens):
        return next(size for size in (1024, 512, 256, 128) if size <= most and tokens % size == 0)

    return tile(queries), tile(keys), min(tile(keys), 512)


@functools.lru_cache
def _splash_kernel(shape_NLW: tuple[int, int, int], keys: int, interpret: bool):
    # Imported where it is used: a GPU's JAX may lack it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    heads, queries, width = shape_NLW
    block_q, block_kv, compute = splash_blocks(queries, keys, width)
    # Tokens last: with a head's width last, what is kept for the backward pass would be filled up
    # to 128 lanes.
    tokens_last = splash_attention_kernel.QKVLayout.SEQ_MINOR
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
        q_layout=tokens_last, k_layout=tokens_last, v_layout=tokens_last,
    )
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((queries, keys))] * heads
    )
    with jax.ensure_compile_time_eval():
        return splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )


def cudnn(q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
    """cuDNN's fused attention on NVIDIA GPUs; 16-bit operands, widths up to 256."""
    # In training jax refuses odd numbers of tokens, such as Stable Diffusion's 77: one more, of
    # which a key takes no part and a query's result is dropped. The kernel takes widths of
    # multiples of 8: channels of zeros change neither a logit nor the others' result.
    queries, width = q_BNLW.shape[2:]
    q, k, v = (
        jnp.pad(a, [(0, 0), (0, 0), (0, a.shape[2] % 2), (0, -width % _CUDNN)]).swapaxes(1, 2)
        for a in (q_BNLW, k_BNMW, v_BNMW)
    )
    keys = k_BNMW.shape[2]
    lengths_B = jnp.full(len(k), keys, jnp.int32) if keys % 2 else None
    out = jax.nn.dot_product_attention(
        q, k, v, scale=1.0 / math.sqrt(width), key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return out.swapaxes(1, 2)[:, :, :queries, :width]


@dataclasses.dataclass(frozen=True)
class Attention:
    """`Attention(how, platform)(q_BNLW, k_BNMW, v_BNMW) -> (B, N, L, W)`.

    Attributes:
      how: one of `FORMS`; `auto` chooses for each place by its shapes, see `choice`.
      platform: what the program is for: `cpu`, `gpu` or `tpu`.
      tensor: the mesh axis that heads are split over, if they are: the compiler cannot split the
        TPU's kernel itself, nor cuDNN's beside axes that are split by hand.
      cudnn_width: the widest head that the GPU's fused kernel takes.
    Raises:
      UserError: for a form that there is not, or that the platform does not have.
    """

    how: str = "auto"
    platform: str = "cpu"
    tensor: str = ""
    cudnn_width: int = 256

    def __post_init__(self):
        if self.how not in FORMS:
            raise UserError(f"attention={self.how!r}: choose one of {', '.join(FORMS)}")
        if self.how == "cudnn" and self.platform != "gpu":
            raise UserError(f"attention=cudnn runs on GPUs, and this is for a {self.platform}")
        if self.how == "splash" and self.platform == "gpu":
            raise UserError("attention=splash runs on TPUs, and this is for a gpu: use auto")

    def choice(self, q_BNLW: jax.ShapeDtypeStruct, k_BNMW: jax.ShapeDtypeStruct) -> str:
        """The form that these operands take.

        A forced form that cannot take a place's shapes leaves that place to `auto`'s choice.
        """
        b, n, length, width = q_BNLW.shape
        keys = k_BNMW.shape[2]
        tiles = length % _TILE == 0
        cudnn = width + -width % _CUDNN <= self.cudnn_width and q_BNLW.dtype.itemsize == 2
        fits = {"splash": tiles, "cudnn": cudnn, "plain": True, "chunked": True}
        if self.how != "auto" and fits[self.how]:
            return self.how
        if self.platform == "tpu" and tiles and length >= _SPLASH_TOKENS:
            return "splash"
        if self.platform == "gpu" and cudnn:
            return "cudnn"
        return "chunked" if 4 * b * n * length * keys > _MOST_LOGITS else "plain"

    def unfused(self) -> Attention:
        """The same without kernels that the compiler cannot split over devices."""
        return Attention(self.how if self.how in ("plain", "chunked") else "auto")

    def __call__(self, q_BNLW: jax.Array, k_BNMW: jax.Array, v_BNMW: jax.Array) -> jax.Array:
        """softmax(q k^T / sqrt(W)) v, in the operands' type."""
        form = self.choice(q_BNLW, k_BNMW)
        run = {
            "plain": plain, "chunked": chunked, "cudnn": cudnn,
            "splash": functools.partial(splash, interpret=self.platform != "tpu"),
        }[form]
        # cuDNN's the compiler can split itself, but not where other axes are split by hand.
        by_hand = form == "cudnn" and jax.sharding.get_abstract_mesh().manual_axes
        if self.tensor and (form == "splash" or by_hand):
            heads = PartitionSpec(None, self.tensor)
            run = jax.shard_map(
                run, in_specs=(heads, heads, heads), out_specs=heads,
                axis_names={self.tensor}, check_vma=False,
            )
        return run(q_BNLW, k_BNMW, v_BNMW)
