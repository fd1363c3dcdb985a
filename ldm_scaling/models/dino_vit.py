"""The vision transformer of DINO and DINOv2 (ViT, arXiv 2010.11929), its configs and tensors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained
from ldm_scaling.models.pretrained import FlatTensors, Rule, conv, linear


@dataclasses.dataclass(frozen=True)
class VitSpec:
    """Sizes of a vision transformer.

    Attributes:
      patch: side of a patch in pixels.
      side: side of the pictures that the positions were learned for.
      hidden: width of the MLP.
      layer_scale: whether each residual is scaled by channel (DINOv2).
      gated: whether the MLP is a SwiGLU.
    """

    patch: int
    width: int
    layers: int
    heads: int
    hidden: int
    side: int
    layer_scale: bool = False
    gated: bool = False
    eps: float = 1e-6

    def __post_init__(self):
        for name in ("patch", "width", "layers", "heads", "hidden", "side"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(
                    f"a vision transformer's {name} is a whole number above 0, not {value!r}"
                )
        if self.width % self.heads or self.side % self.patch:
            raise UserError(
                f"a width of {self.width} must divide by {self.heads} heads, and a side of "
                f"{self.side} by patches of {self.patch}"
            )


def resampling(n: int, out: int, offset: float) -> np.ndarray:
    """Weights [out, n] that resample `n` positions to `out`: torch's bicubic (a = -3/4, half-pixel
    centres, repeated borders, not antialiased when shrinking).

    `offset` is what the authors' code adds to `out` before it divides by it, 0.1, which moves all
    centres a little (vision_transformer.py, `interpolate_pos_encoding`); transformers adds nothing.
    """
    x_O = (np.arange(out) + 0.5) * n / (out + offset) - 0.5
    first_O = np.floor(x_O).astype(int)
    w_ON = np.zeros((out, n))
    for tap in (-1, 0, 1, 2):
        d = np.abs(x_O - first_O - tap)
        near = (1.25 * d - 2.25) * d**2 + 1
        far = -0.75 * (((d - 5) * d + 8) * d - 4)
        w_O = np.where(d <= 1, near, far)
        np.add.at(w_ON, (np.arange(out), np.clip(first_O + tap, 0, n - 1)), w_O)
    return w_ON.astype(np.float32)


class VitBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm and around a residual."""

    spec: VitSpec

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        s = self.spec
        batch, length, width = x_BLD.shape

        def dense(name, features, y):
            return nn.Dense(features, precision="highest", name=name)(y)

        def heads(name, y):
            return dense(name, width, y).reshape(batch, length, s.heads, -1).swapaxes(1, 2)

        def scaled(name, y):
            return y * self.param(name, nn.initializers.ones, (width,)) if s.layer_scale else y

        y_BLD = _norm(s, "norm_attention")(x_BLD)
        q_BNLK, k_BNLK, v_BNLK = heads("query", y_BLD), heads("key", y_BLD), heads("value", y_BLD)
        # Heads before tokens and plain batched products: on XLA:CPU faster than einsum.
        logits_BNLM = jnp.matmul(q_BNLK, k_BNLK.swapaxes(2, 3), precision="highest")
        weights_BNLM = jax.nn.softmax(logits_BNLM * (width // s.heads) ** -0.5)
        y_BNLK = jnp.matmul(weights_BNLM, v_BNLK, precision="highest")
        y_BLD = dense("out", width, y_BNLK.swapaxes(1, 2).reshape(x_BLD.shape))
        x_BLD = x_BLD + scaled("scale_attention", y_BLD)
        y_BLD = _norm(s, "norm_mlp")(x_BLD)
        y_BLF = dense("up", s.hidden, y_BLD)
        if s.gated:
            y_BLF = nn.silu(dense("gate", s.hidden, y_BLD)) * y_BLF
        else:
            y_BLF = nn.gelu(y_BLF, approximate=False)
        return x_BLD + scaled("scale_mlp", dense("down", width, y_BLF))


def _norm(spec: VitSpec, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(spec.eps, use_fast_variance=False, name=name)


class Vit(nn.Module):
    """Scaled pictures [B, H, W, 3] to the normed last states: `class` [B, D] and `patches`
    [B, P, D], row by row.

    Sides that the patch does not divide lose what is left over, at the right and below. Where the
    picture is not of the spec's side, positions are resampled with `offset`, see `resampling`.
    """

    spec: VitSpec
    offset: float = 0.1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
        s = self.spec
        n, init = s.side // s.patch, nn.initializers.normal(0.02)
        x_BHWD = nn.Conv(
            s.width, (s.patch, s.patch), s.patch, padding="VALID", precision="highest",
            name="patches",
        )(x_BHWC)  # fmt: skip
        batch, height, width, _ = x_BHWD.shape
        positions_PD = self.param("positions", init, (1 + n * n, s.width))
        first_D, grid_NMD = positions_PD[0], positions_PD[1:].reshape(n, n, s.width)
        if (height, width) != (n, n):
            rows, cols = (resampling(n, out, self.offset) for out in (height, width))
            grid_NMD = jnp.einsum("hn,wm,nmd->hwd", rows, cols, grid_NMD, precision="highest")
        first_D = first_D + self.param("class", init, (s.width,))
        x_BLD = (x_BHWD + grid_NMD).reshape(batch, -1, s.width)
        first_B1D = jnp.broadcast_to(first_D, (batch, 1, s.width))
        x_BLD = jnp.concatenate([first_B1D, x_BLD], axis=1)
        for i in range(s.layers):
            x_BLD = VitBlock(s, name=f"block_{i}")(x_BLD)
        x_BLD = _norm(s, "norm")(x_BLD)
        return {"class": x_BLD[:, 0], "patches": x_BLD[:, 1:]}


# --- tensors ----------------------------------------------------------------------------------

# Ours, and the names of the authors and of transformers (packed products split by then).
_DENSE = {
    "query": r"attn\.query|attention\.attention\.query",
    "key": r"attn\.key|attention\.attention\.key",
    "value": r"attn\.value|attention\.attention\.value",
    "out": r"attn\.proj|attention\.output\.dense",
    "gate": r"mlp\.gate",
    "up": r"mlp\.fc1|mlp\.up|intermediate\.dense",
    "down": r"mlp\.fc2|mlp\.w3|mlp\.weights_out|output\.dense",
}
_NORMS = {"norm_attention": r"norm1|layernorm_before", "norm_mlp": r"norm2|layernorm_after"}
_SCALES = {
    "scale_attention": r"ls1\.gamma|layer_scale1\.lambda1",
    "scale_mlp": r"ls2\.gamma|layer_scale2\.lambda1",
}
_PACKED = {"qkv": ("query", "key", "value"), "w12": ("gate", "up"), "weights_in": ("gate", "up")}


def _rules() -> list[Rule]:
    block = r"(?:blocks|encoder\.layer)\.(\d+)\."
    rules = [
        Rule(r"(?:embeddings\.)?cls_token", "class", lambda t: t.squeeze((0, 1))),
        Rule(r"pos_embed|embeddings\.position_embeddings", "positions", lambda t: t.squeeze(0)),
        Rule(r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight",
             "patches/kernel", conv),
        Rule(r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.bias",
             "patches/bias"),
        Rule(r"(?:norm|layernorm)\.weight", "norm/scale"),
        Rule(r"(?:norm|layernorm)\.bias", "norm/bias"),
    ]  # fmt: skip
    for ours, theirs in _DENSE.items():
        rules.append(Rule(rf"{block}(?:{theirs})\.weight", rf"block_\1/{ours}/kernel", linear))
        rules.append(Rule(rf"{block}(?:{theirs})\.bias", rf"block_\1/{ours}/bias"))
    for ours, theirs in _NORMS.items():
        rules.append(Rule(rf"{block}(?:{theirs})\.weight", rf"block_\1/{ours}/scale"))
        rules.append(Rule(rf"{block}(?:{theirs})\.bias", rf"block_\1/{ours}/bias"))
    return rules + [Rule(rf"{block}(?:{a})", rf"block_\1/{b}") for b, a in _SCALES.items()]


RULES = tuple(_rules())
# What only training needs: masked patches, heads, transformers' untrained pooler.
IGNORE = (r"(?:embeddings\.)?mask_token", r"(?:dino_|ibot_)?head\..*", r"pooler\..*")


def params_of(
    spec: VitSpec, tensors: Mapping[str, np.ndarray], source: str | os.PathLike[str]
) -> dict:
    """Float32 parameters from a state dict in the authors' layout or transformers'.

    Raises:
      UserError: with a diff, unless every tensor and every parameter finds its partner.
    """
    picture = jax.ShapeDtypeStruct((1, spec.side, spec.side, 3), jnp.float32)
    expected = jax.eval_shape(Vit(spec).init, jax.random.key(0), picture)["params"]
    return pretrained.fill(expected, _split(tensors), RULES, source=source, ignore=IGNORE)


def _split(tensors: Mapping[str, np.ndarray]) -> FlatTensors:
    """Packed products each by name, and names without what a training program put before them."""
    split = {}
    for name, t in tensors.items():
        name = re.sub(r"^(?:module\.|backbone\.)+", "", name)
        stem, _, leaf = name.rpartition(".")
        stem, _, kind = stem.rpartition(".")
        parts = _PACKED.get(kind, ())
        if parts and t.ndim and t.shape[0] % len(parts) == 0:
            for part, tensor in zip(parts, np.split(t, len(parts)), strict=True):
                split[f"{stem}.{part}.{leaf}"] = tensor
        else:
            split[name] = t
    return split


def spec_of(config: Mapping[str, Any], source: str | os.PathLike[str] = "config") -> VitSpec:
    """The spec in the table of a config.json of transformers' `ViTModel` or `Dinov2Model`.

    Raises:
      UserError: for a config of something else, or of a network that is not here.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in ("vit", "dinov2"):
        raise UserError(f"{source} describes neither DINO nor DINOv2: model_type is {kind!r}")
    fixed = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(f"{source}: {key}={config[key]!r} is not supported: {value!r} is")
    second, gated = kind == "dinov2", bool(config.get("use_swiglu_ffn"))
    try:
        if second:
            hidden = int(config["hidden_size"] * config["mlp_ratio"])
            # A SwiGLU has two thirds of the width, in steps of 8.
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
        return VitSpec(
            config["patch_size"], config["hidden_size"], config["num_hidden_layers"],
            config["num_attention_heads"], hidden if second else config["intermediate_size"],
            config["image_size"], layer_scale=second, gated=gated, eps=config["layer_norm_eps"],
        )  # fmt: skip
    except KeyError as e:
        raise UserError(f"{source} lacks {e}: fetch it again") from e
