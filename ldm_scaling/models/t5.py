"""The T5 encoder (arXiv 1910.10683) of any size: T5, T5 v1.1, Flan-T5; its files and tokens.

It has no absolute positions: attention adds a learned bias that depends on the distance of two
tokens alone, so it takes texts of any length.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import pretrained, t5_tokenizer, tokenizing
from ldm_scaling.models.pretrained import FlatTensors, Rule, linear

# The configs' names: an activation, and whether it gates a second product. The GELU is the one by
# tanh where it gates (transformers, configuration_t5.py) and the exact one where it does not.
FEED_FORWARDS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), False),
    "gated-gelu": (lambda x: jax.nn.gelu(x, approximate=True), True),
    "gated-relu": (jax.nn.relu, True),
    "gated-silu": (jax.nn.silu, True),
}
# In float16 the residuals of the larger ones overflow.
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class T5Spec:
    """Sizes of an encoder; the heads together need not be as wide as the tokens.

    `buckets` and `max_distance` decide which distances share a bias, see `position_buckets`.
    """

    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int
    feed_forward: str = "gated-gelu"
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (type(value) is int and value > 0):
                raise UserError(f"T5: {field.name} is a whole number above 0, not {value!r}")
        if self.feed_forward not in FEED_FORWARDS:
            raise UserError(
                f"T5: the feed-forward {self.feed_forward!r} is none of {', '.join(FEED_FORWARDS)}"
            )
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError(
                f"T5: {self.buckets} buckets must divide by 4, and the distance {self.max_distance}"
                f" that they reach be above {self.buckets // 4}"
            )


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """buckets_LM int32: the bucket of the distance from token l to token m.

    Half of the buckets are for m after l. Of a half, the first half holds one distance each, the
    others grow by a constant factor up to `max_distance`; the last one takes all beyond it. In
    float32 as the peers compute it, for on a bucket's border rounding decides. Source: mesh
    TensorFlow's `relative_position_bucket`, by way of transformers.
    """
    distance_LM = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far_LM = np.abs(distance_LM)
    ratio = np.log(np.maximum(far_LM, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    log_LM = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (np.where(distance_LM > 0, half, 0) + np.where(far_LM < exact, far_LM, log_LM)).astype(
        np.int32
    )


class RmsNorm(nn.Module):
    """Scales by the root mean square in float32; no mean is taken off and no bias added."""

    eps: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, x_BLD.shape[-1:])
        mean = jnp.mean(jnp.square(x_BLD), axis=-1, keepdims=True)
        return x_BLD * jax.lax.rsqrt(mean + self.eps) * scale_D


class T5Layer(nn.Module):
    """Self-attention without a scale of its logits, and MLP; each after a norm and around a
    residual. The residual, the norms and the softmax are float32, the products in `dtype`.
    """

    spec: T5Spec
    dtype: Any

    @nn.compact
    def __call__(self, x_BLD: jax.Array, bias_BNLM: jax.Array) -> jax.Array:
        s = self.spec
        batch, length, _ = x_BLD.shape
        activation, gated = FEED_FORWARDS[s.feed_forward]

        def dense(name, features, y):
            return nn.Dense(
                features, use_bias=False, dtype=self.dtype, param_dtype=self.dtype,
                precision="highest", name=name,
            )(y)  # fmt: skip

        def heads(name, y):
            y = dense(name, s.heads * s.head_width, y)
            return y.reshape(batch, length, s.heads, s.head_width).swapaxes(1, 2)

        y_BLD = RmsNorm(s.eps, name="norm_attention")(x_BLD).astype(self.dtype)
        q_BNLK, k_BNLK, v_BNLK = heads("query", y_BLD), heads("key", y_BLD), heads("value", y_BLD)
        # Heads before tokens and plain batched products: on XLA:CPU faster than einsum.
        logits_BNLM = jnp.matmul(
            q_BNLK, k_BNLK.swapaxes(2, 3), precision="highest", preferred_element_type=jnp.float32
        )
        weights_BNLM = jax.nn.softmax(logits_BNLM + bias_BNLM).astype(self.dtype)
        y_BNLK = jnp.matmul(weights_BNLM, v_BNLK, precision="highest")
        y_BLE = y_BNLK.swapaxes(1, 2).reshape(batch, length, -1)
        x_BLD = x_BLD + dense("out", s.width, y_BLE)
        y_BLD = RmsNorm(s.eps, name="norm_mlp")(x_BLD).astype(self.dtype)
        y_BLF = activation(dense("up", s.hidden, y_BLD))
        if gated:
            y_BLF = y_BLF * dense("linear", s.hidden, y_BLD)
        return x_BLD + dense("down", s.width, y_BLF)


class T5Encoder(nn.Module):
    """ids_BL and mask_BL (True where a token is) to states [B, L, D], float32.

    Frozen: matrices are kept in `dtype`, the compute type; the norms' scales and the position
    biases in float32.
    """

    spec: T5Spec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        s = self.spec
        tokens = nn.Embed(s.vocabulary, s.width, param_dtype=self.dtype, name="tokens")
        x_BLD = tokens(ids_BL).astype(jnp.float32)
        # One table, that of the first layer, serves all of them.
        biases = nn.Embed(s.buckets, s.heads, name="positions")
        buckets_LM = position_buckets(ids_BL.shape[1], s.buckets, s.max_distance)
        bias_NLM = biases(buckets_LM).transpose(2, 0, 1)
        least = jnp.finfo(jnp.float32).min
        bias_BNLM = jnp.where(mask_BL[:, None, None, :], bias_NLM[None], least)
        for i in range(s.layers):
            x_BLD = T5Layer(s, self.dtype, name=f"layer_{i}")(x_BLD, bias_BNLM)
        return RmsNorm(s.eps, name="norm")(x_BLD)


# --- tensors ----------------------------------------------------------------------------------


def _rules() -> list[Rule]:
    """transformers' names to ours."""
    layer = r"encoder\.block\.(\d+)\.layer\."
    attention, mlp = layer + r"0\.SelfAttention\.", layer + r"1\.DenseReluDense\."
    dense = {
        attention + "q": "query", attention + "k": "key", attention + "v": "value",
        attention + "o": "out", mlp + "wi(?:_0)?": "up", mlp + "wi_1": "linear",
        mlp + "wo": "down",
    }  # fmt: skip
    return [
        *(Rule(rf"{a}\.weight", rf"layer_\1/{b}/kernel", linear) for a, b in dense.items()),
        Rule(layer + r"0\.layer_norm\.weight", r"layer_\1/norm_attention/scale"),
        Rule(layer + r"1\.layer_norm\.weight", r"layer_\1/norm_mlp/scale"),
        Rule(
            r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            "positions/embedding",
        ),
        Rule(r"encoder\.final_layer_norm\.weight", "norm/scale"),
        Rule(r"shared\.weight|encoder\.embed_tokens\.weight", "tokens/embedding"),
    ]


RULES = tuple(_rules())
# A whole T5 has a decoder too.
IGNORE = (r"decoder\..*", r"lm_head\..*")


def params_of(
    spec: T5Spec,
    tensors: Mapping[str, np.ndarray],
    source: str | os.PathLike[str],
    dtype: str = "float32",
) -> dict:
    """Parameters from the state dict of a `T5EncoderModel` or a whole T5.

    Raises:
      UserError: with a diff, unless every tensor and every parameter finds its partner.
    """
    encoder = T5Encoder(spec, jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), bool)
    expected = jax.eval_shape(encoder.init, jax.random.key(0), ids, mask)["params"]
    return pretrained.fill(expected, _tied(tensors), RULES, source=source, ignore=IGNORE)


def _tied(tensors: Mapping[str, np.ndarray]) -> FlatTensors:
    """The embedding is stored under one name or, the same, under both."""
    tensors = dict(tensors)
    one, other = tensors.get("shared.weight"), tensors.get("encoder.embed_tokens.weight")
    if one is not None and other is not None and np.array_equal(one, other):
        del tensors["encoder.embed_tokens.weight"]
    return tensors


def spec_of(config: Mapping[str, Any], source: str | os.PathLike[str] = "config") -> T5Spec:
    """The spec in the table of a config.json.

    Raises:
      UserError: for a config of something else, or of a T5 that the encoder here is not.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind != "t5":
        raise UserError(f"{source} describes no T5: its model_type is {kind!r}, not 't5'")
    names = {
        "width": "d_model", "layers": "num_layers", "heads": "num_heads", "head_width": "d_kv",
        "hidden": "d_ff", "feed_forward": "feed_forward_proj", "vocabulary": "vocab_size",
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon",
    }  # fmt: skip
    # What transformers' own class takes for an option that is left out.
    defaults = {
        "feed_forward_proj": "relu", "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    }  # fmt: skip
    table = {**defaults, **config}
    if missing := [name for name in names.values() if name not in table]:
        raise UserError(f"{source} lacks {', '.join(missing)}: fetch it again")
    try:
        return T5Spec(**{ours: table[theirs] for ours, theirs in names.items()})
    except UserError as e:
        raise UserError(f"{source}: {e}") from e


# --- the frozen encoder -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class T5TextEncoder:
    """Captions to per-token states; make one with `load`.

    Every call runs in batches of `batch` rows of `max_length` tokens, so it compiles once. `hash`
    is that of the weights, the tokenizer, `max_length` and the compute type: equal hashes give
    equal states.
    """

    max_length: int
    batch: int
    hash: str
    width: int
    spec: T5Spec
    _tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
    _params: Any = dataclasses.field(repr=False)
    _encode: Any = dataclasses.field(repr=False)

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL int32 and mask_BL bool, cut to `max_length` tokens (</s> among them) and padded
        to it.

        Raises:
          UserError: for what is no list of Unicode texts.
        """
        return tokenizing.rows(self._tokenizer, texts, self.max_length)

    def states(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ctx_BLD float32, the normed states of the last layer, zero at padding; and mask_BL bool.

        Raises:
          UserError: as `tokenize`.
        """
        ids_BL, mask_BL = self.tokenize(texts)
        ctx_BLD = np.empty((*ids_BL.shape, self.width), np.float32)
        for i in range(0, len(texts), self.batch):
            rows = slice(i, min(i + self.batch, len(texts)))
            fill = ((0, self.batch - (rows.stop - i)), (0, 0))
            some = [np.pad(a[rows], fill, mode="edge") for a in (ids_BL, mask_BL)]
            ctx_BLD[rows] = np.asarray(self._encode(self._params, *some))[: rows.stop - i]
        return ctx_BLD, mask_BL


def load(
    folder: str | os.PathLike[str],
    max_length: int,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    batch: int = 32,
    dtype: str = "float32",
) -> T5TextEncoder:
    """The encoder in a folder of transformers: of its config.json, its model.safetensors (else its
    pytorch_model.bin), whole or in parts, and its spiece.model or tokenizer.json.

    Args:
      folder: of a T5EncoderModel or of a whole T5, whose decoder is not read.
      max_length: tokens of a text, </s> among them; 2 or more.
      tokenizer: the vocabulary's folder where it is another, as in diffusers' pipelines.
      batch: texts in one pass.
      dtype: one of `DTYPES`, that of the matrices and of products; norms are float32.

    Raises:
      UserError: for files that are missing or do not fit, with words on what to fetch.
    """
    if max_length < 2:
        raise UserError(f"a text is a token and </s> at least: max_length = {max_length}")
    if dtype not in DTYPES:
        raise UserError(f"T5 runs in {' or '.join(DTYPES)}, not in {dtype!r}")
    folder = Path(folder)
    config = folder / "config.json"
    try:
        table = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot read {config} ({e}): fetch config.json, model.safetensors and spiece.model of "
            "a T5 from https://huggingface.co, e.g. of google/t5-v1_1-large or google/flan-t5-large"
            f", into {folder}"
        ) from e
    spec = spec_of(table, config)
    tokens = t5_tokenizer.load(folder if tokenizer is None else tokenizer)
    if tokens.get_vocab_size() > spec.vocabulary:
        raise UserError(
            f"the tokenizer in {tokenizer or folder} has {tokens.get_vocab_size()} tokens, but "
            f"{config} only {spec.vocabulary}: they are not of one model"
        )
    params = params_of(spec, pretrained.read_weights(folder, IGNORE), folder, dtype)
    tokens.enable_truncation(max_length)
    tokens.enable_padding(length=max_length, pad_id=tokens.token_to_id("<pad>"), pad_token="<pad>")
    encoder = T5Encoder(spec, jnp.dtype(dtype))

    @jax.jit
    def encode(params, ids_BL, mask_BL):
        return encoder.apply({"params": params}, ids_BL, mask_BL) * mask_BL[..., None]

    return T5TextEncoder(
        max_length=max_length,
        batch=batch,
        hash=sha256_of([spec, pretrained.hash_of(params), tokens.to_str(), max_length, dtype]),
        width=spec.width,
        spec=spec,
        _tokenizer=tokens,
        _params=jax.device_put(params),
        _encode=encode,
    )
