"""CLIP (arXiv 2103.00020): the sizes of its two towers and the block that they share.

The towers are in `clip_text` and `clip_image`, their files are read by `clip_checkpoint`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models.pretrained import Rule, linear
from ldm_scaling.models.spread import Spread

# OpenAI trained with the first, OpenCLIP mostly with the second; tensors do not tell which.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """Sizes of a text tower.

    `hidden` is the MLP's width; `projection` that of the embedding shared with pictures, None
    where a checkpoint has none. The vector of a text is read at its first token `eot`, or at the
    token of its highest id where `eot` is None (as OpenAI and OpenCLIP do).
    """

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    projection: int | None
    eot: int | None = None
    vocabulary: int = 49408
    positions: int = 77
    eps: float = 1e-5

    def __post_init__(self):
        _check(self, "width", "layers", "heads", "hidden", "vocabulary", "positions")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Sizes of an image tower for square pictures of `side` pixels in patches of `patch`."""

    side: int
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    projection: int | None
    eps: float = 1e-5

    def __post_init__(self):
        _check(self, "side", "patch", "width", "layers", "heads", "hidden")
        if self.side % self.patch:
            raise UserError(f"a side of {self.side} does not divide into patches of {self.patch}")


def _check(spec: TextSpec | ImageSpec, *sizes: str) -> None:
    for name in (*sizes, "projection"):
        n = getattr(spec, name)
        if not (type(n) is int and n > 0 or name == "projection" and n is None):
            raise UserError(f"a CLIP tower's {name} is a whole number above 0, not {n!r}")
    if spec.width % spec.heads:
        raise UserError(f"a CLIP tower's width {spec.width} does not divide by {spec.heads} heads")
    if spec.activation not in ACTIVATIONS:
        raise UserError(
            f"a CLIP tower's activation is one of {', '.join(ACTIVATIONS)}, not {spec.activation!r}"
        )


class Clip(NamedTuple):
    """Both towers of a published model, and the repository of huggingface.co that holds it."""

    repository: str
    text: TextSpec
    image: ImageSpec


def _published(repository, activation, projection, text, image) -> Clip:
    text, image = TextSpec(*text, activation, projection), ImageSpec(*image, activation, projection)
    return Clip(repository, text, image)


# Text: width, layers, heads, MLP. Image: side, patch, width, layers, heads, MLP.
PUBLISHED = {
    "ViT-B/32": _published(
        "openai/clip-vit-base-patch32", "quick_gelu", 512,
        (512, 12, 8, 2048), (224, 32, 768, 12, 12, 3072),
    ),
    "ViT-L/14": _published(
        "openai/clip-vit-large-patch14", "quick_gelu", 768,
        (768, 12, 12, 3072), (224, 14, 1024, 24, 16, 4096),
    ),
    "ViT-L/14@336": _published(
        "openai/clip-vit-large-patch14-336", "quick_gelu", 768,
        (768, 12, 12, 3072), (336, 14, 1024, 24, 16, 4096),
    ),
    "ViT-H/14": _published(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "gelu", 1024,
        (1024, 24, 16, 4096), (224, 14, 1280, 32, 16, 5120),
    ),
    "ViT-g/14": _published(
        "laion/CLIP-ViT-g-14-laion2B-s34B-b88K", "gelu", 1024,
        (1024, 24, 16, 4096), (224, 14, 1408, 40, 16, 6144),
    ),
}  # fmt: skip


def layer_norm(eps: float, dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm with float32 statistics, its variance that of centred values."""
    return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Self-attention and MLP, each after a layer norm and around a residual.

    Float32 products run at precision "highest"; the softmax is float32 whatever `dtype`.
    """

    spec: TextSpec | ImageSpec
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        s = self.spec
        batch, length, width = x_BLD.shape

        def dense(name, features, y):
            return nn.Dense(features, dtype=self.dtype, precision="highest", name=name)(y)

        def heads(name, y):
            return dense(name, width, y).reshape(batch, length, s.heads, -1).swapaxes(1, 2)

        y_BLD = layer_norm(s.eps, self.dtype, "norm_attention")(x_BLD)
        q_BNLK, k_BNLK, v_BNLK = heads("query", y_BLD), heads("key", y_BLD), heads("value", y_BLD)
        # Heads before tokens and plain batched products: on XLA:CPU faster than einsum.
        logits_BNLM = (width // s.heads) ** -0.5 * jnp.matmul(
            q_BNLK, k_BNLK.swapaxes(2, 3), precision="highest", preferred_element_type=jnp.float32
        )
        if self.causal:
            seen_LM = np.tril(np.ones((length, length), bool))
            logits_BNLM = jnp.where(seen_LM, logits_BNLM, jnp.finfo(jnp.float32).min)
        weights_BNLM = jax.nn.softmax(logits_BNLM).astype(self.dtype)
        y_BNLK = jnp.matmul(weights_BNLM, v_BNLK, precision="highest")
        x_BLD = x_BLD + dense("out", width, y_BNLK.swapaxes(1, 2).reshape(x_BLD.shape))
        y_BLF = dense("up", s.hidden, layer_norm(s.eps, self.dtype, "norm_mlp")(x_BLD))
        return x_BLD + dense("down", width, ACTIVATIONS[s.activation](y_BLF))


# --- tensors ----------------------------------------------------------------------------------

# Ours, and the names of transformers and of OpenCLIP (its packed products split by then).
_DENSE = {
    "query": r"self_attn\.q_proj|attn\.query",
    "key": r"self_attn\.k_proj|attn\.key",
    "value": r"self_attn\.v_proj|attn\.value",
    "out": r"self_attn\.out_proj|attn\.out_proj",
    "up": r"mlp\.fc1|mlp\.c_fc",
    "down": r"mlp\.fc2|mlp\.c_proj",
}
_NORMS = {"norm_attention": r"layer_norm1|ln_1", "norm_mlp": r"layer_norm2|ln_2"}
# Numbers beside the towers in a whole checkpoint, and indices.
IGNORE = (r".*position_ids", "logit_scale", "input_resolution", "context_length", "vocab_size")


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """Rules of a layer norm."""
    return [
        Rule(rf"(?:{theirs})\.weight", f"{ours}/scale"),
        Rule(rf"(?:{theirs})\.bias", f"{ours}/bias"),
    ]


def block_rules(blocks: str) -> list[Rule]:
    """Rules of every block of a tower; `blocks` is a pattern of what comes before the number."""
    rules = []
    for ours, theirs in _DENSE.items():
        stem = rf"(?:{blocks})\.(\d+)\.(?:{theirs})"
        rules.append(Rule(rf"{stem}\.weight", rf"block_\1/{ours}/kernel", linear))
        rules.append(Rule(rf"{stem}\.bias", rf"block_\1/{ours}/bias"))
    for ours, theirs in _NORMS.items():
        rules += norm_rules(rf"(?:{blocks})\.(\d+)\.(?:{theirs})", rf"block_\1/{ours}")
    return rules


def in_batches(
    run: Callable[[Any], dict[str, jax.Array]], inputs: Callable[[slice], Any], n: int,
    spread: Spread,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`run` over `n` rows in batches spread over devices; each output [n, ...].

    `inputs` prepares a batch, filled up to its size, on the host while the devices still work on
    the one before.
    """
    done: list[dict[str, Any]] = []
    for i in range(0, max(n, 1), spread.batch):
        done.append(run(spread.rows(inputs(slice(i, min(i + spread.batch, n))))))
        done[-2:-1] = jax.device_get(done[-2:-1])
    done[-1] = jax.device_get(done[-1])
    return {name: np.concatenate([d[name] for d in done])[:n] for name in done[0]}


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows scaled to length one."""
    return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True)
