"""CLIP's text tower: captions to the states that condition a diffusion model, and to embeddings.

ViT-L/14's conditions Stable Diffusion 1, OpenCLIP ViT-H/14's without its last layer version 2.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import clip, clip_checkpoint, clip_tokenizer, pretrained, spread
from ldm_scaling.models.clip import TextSpec
from ldm_scaling.models.pretrained import Rule, linear

LAYERS = ("last", "penultimate")


class TextTower(nn.Module):
    """ids_BL int32 to a dict, in `dtype`:

    `last` [B, L, D]: the states after the last block and the final norm;
    `penultimate` [B, L, D]: those after the last block but one, and the same norm (OpenCLIP's
    states for Stable Diffusion 2; transformers has them as `last` of a config of 23 layers);
    `pooled` [B, D]: `last` at the end of the text;
    `projected` [B, P], where the spec has a projection: the embedding, of any length.

    Attention is causal and sees the padding, as Stable Diffusion has it: what stands up to the end
    of a text does not depend on it.
    """

    spec: TextSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BL: jax.Array) -> dict[str, jax.Array]:
        s = self.spec
        tokens = nn.Embed(s.vocabulary, s.width, dtype=self.dtype, name="tokens")
        positions_LD = self.param(
            "positions", nn.initializers.normal(0.02), (s.positions, s.width), jnp.float32
        )
        x_BLD = tokens(ids_BL) + positions_LD[: ids_BL.shape[1]].astype(self.dtype)
        before_BLD = x_BLD
        for i in range(s.layers):
            before_BLD = x_BLD
            x_BLD = clip.Block(s, causal=True, dtype=self.dtype, name=f"block_{i}")(x_BLD)
        norm = clip.layer_norm(s.eps, self.dtype, "norm")
        out = {"last": norm(x_BLD), "penultimate": norm(before_BLD)}
        end_B = jnp.argmax(ids_BL if s.eot is None else ids_BL == s.eot, axis=1)
        out["pooled"] = jnp.take_along_axis(out["last"], end_B[:, None, None], axis=1)[:, 0]
        if s.projection is not None:
            project = nn.Dense(
                s.projection, use_bias=False, dtype=self.dtype, precision="highest",
                name="projection",
            )  # fmt: skip
            out["projected"] = project(out["pooled"])
        return out


_EMBEDDINGS = r"(?:text_model\.)?embeddings\."
RULES = (
    Rule(rf"(?:{_EMBEDDINGS})?token_embedding\.weight", "tokens/embedding"),
    Rule(rf"{_EMBEDDINGS}position_embedding\.weight|positional_embedding", "positions"),
    *clip.block_rules(r"(?:text_model\.)?encoder\.layers|transformer\.resblocks"),
    *clip.norm_rules(r"(?:text_model\.)?final_layer_norm|ln_final", "norm"),
    Rule(r"text_projection\.weight", "projection/kernel", linear),
    Rule(r"text_projection", "projection/kernel"),
)
IGNORE = (*clip.IGNORE, r"vision_model\..*", r"visual_projection\..*", r"visual\..*")


@dataclasses.dataclass(frozen=True, eq=False)
class ClipText:
    """Captions to states and embeddings, in batches spread over devices; make one with `load_text`.

    `hash` is that of all that decides the numbers: weights, sizes, tokenizer, layer, type.
    """

    spec: TextSpec
    layer: str
    spread: spread.Spread
    hash: str
    tokenizer: clip_tokenizer.ClipTokenizer
    _params: Any = dataclasses.field(repr=False)
    _apply: Callable = dataclasses.field(repr=False)

    @property
    def max_length(self) -> int:
        """Tokens of every row."""
        return self.tokenizer.context

    @property
    def width(self) -> int:
        """Width of a state."""
        return self.spec.width

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL and mask_BL of the texts, see `ClipTokenizer`."""
        return self.tokenizer(texts)

    def outputs(self, texts: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Those outputs of `TextTower` that `names` lists, float32.

        Raises:
          UserError: for texts that are none, and for "projected" without a projection.
        """
        if "projected" in names and self.spec.projection is None:
            raise UserError(
                "this CLIP text tower was saved without its projection, as in Stable Diffusion's "
                "folders: its embeddings need the whole checkpoint, such as "
                + clip.PUBLISHED["ViT-L/14"].repository
            )
        return self._run(self.tokenizer(texts)[0], tuple(names))

    def _run(self, ids_BL, names):
        def some(rows):
            fill = ((0, self.spread.batch - (rows.stop - rows.start)), (0, 0))
            return np.pad(ids_BL[rows], fill, constant_values=self.tokenizer.eos)

        def run(ids_BL):
            return self._apply(self._params, ids_BL, names)

        return clip.in_batches(run, some, len(ids_BL), self.spread)

    @property
    def _embedding(self):
        return "pooled" if self.spec.projection is None else "projected"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ctx_BLD of `layer`; mask_BL, true up to the end of a text (Stable Diffusion attends to
        the whole row all the same); e_BP of `sentence`; all from one pass.
        """
        ids_BL, mask_BL = self.tokenizer(texts)
        out = self._run(ids_BL, (self.layer, self._embedding))
        return out[self.layer], mask_BL, clip.unit(out[self._embedding])

    def states(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ctx_BLD float32 of `layer`, padding and all, and mask_BL as `encode` has it."""
        ids_BL, mask_BL = self.tokenizer(texts)
        return self._run(ids_BL, (self.layer,))[self.layer], mask_BL

    def sentence(self, texts: Sequence[str]) -> np.ndarray:
        """e_BP float32 of unit length: the projected embedding, or the pooled state of a tower
        that has no projection.
        """
        return clip.unit(self.outputs(texts, (self._embedding,))[self._embedding])


def load_text(
    path: str | os.PathLike[str],
    *,
    behaviour: str,
    vocabulary: str | os.PathLike[str] | None = None,
    model: str | None = None,
    layer: str = "last",
    dtype: Any = jnp.float32,
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> ClipText:
    """A pretrained text tower.

    Args:
      path: a folder of transformers or diffusers (Stable Diffusion's `text_encoder`), one of
        OpenCLIP, or the file of weights in it.
      behaviour: how texts become tokens, see `clip_tokenizer.BEHAVIOURS`.
      vocabulary: what `clip_tokenizer.load` takes; if None, what lies beside the weights or in a
        folder `tokenizer` beside theirs.
      model: one of `clip.PUBLISHED`, needed where no config lies beside the weights.
      layer: which states `encode` and `states` give, one of `LAYERS`.
      dtype: of the computation; the outputs are float32.
      batch: texts in one pass, a multiple of the devices; by default 4 for each CPU device, where
        more are no faster and leave more rows empty, and 32 for each accelerator.
      devices: what to spread each pass over, by default all of this process.

    Raises:
      UserError: for a batch that does not divide; for files that are missing, broken or of
        something else, with what to fetch from where; for tensors that do not fit, with a diff.
    """
    checkpoint = clip_checkpoint.read(path, "text", IGNORE, model)
    spec = clip_checkpoint.spec_of(checkpoint, "text", model)
    params = pretrained.fill(
        abstract_params(spec), checkpoint.tensors, RULES, source=checkpoint.path
    )
    vocabulary = vocabulary or _vocabulary(checkpoint.folder)
    tokenizer = clip_tokenizer.load(vocabulary, behaviour, spec.positions)
    return assemble(
        spec, params, tokenizer, layer=layer, dtype=dtype, batch=batch, devices=devices
    )


def abstract_params(spec: TextSpec) -> Any:
    """Shapes of a tower's parameters."""
    ids = jax.ShapeDtypeStruct((1, spec.positions), jnp.int32)
    return jax.eval_shape(TextTower(spec).init, jax.random.key(0), ids)["params"]


def assemble(
    spec: TextSpec, params: Any, tokenizer: clip_tokenizer.ClipTokenizer, *, layer: str = "last",
    dtype: Any = jnp.float32, batch: int | None = None, devices: Sequence[jax.Device] | None = None,
) -> ClipText:  # fmt: skip
    """A text tower of its parts; the other arguments are `load_text`'s.

    Raises:
      UserError: for a layer that is none of `LAYERS`, a batch that does not divide, and a tokenizer
        of more tokens than the tower has embeddings.
    """
    spread_ = spread.over(devices, batch, cpu=4, accelerator=32)
    if layer not in LAYERS:
        raise UserError(f"a text's states are those of layer {' or '.join(LAYERS)}, not {layer!r}")
    if tokenizer.size > spec.vocabulary:
        raise UserError(
            f"the CLIP tokenizer has ids up to {tokenizer.size - 1}, and its text tower embeddings "
            f"of {spec.vocabulary} tokens only: put weights and vocabulary of one model together "
            "(tokens that were added to the vocabulary have theirs in the weights saved with it)"
        )
    tower = TextTower(spec, dtype)

    def apply(params, ids_BL, names):
        out = tower.apply({"params": params}, ids_BL)
        return {name: out[name].astype(jnp.float32) for name in names}

    decides = [pretrained.hash_of(params), spec, tokenizer.hash, layer, jnp.dtype(dtype).name]
    return ClipText(
        spec=spec,
        layer=layer,
        spread=spread_,
        hash=sha256_of(decides),
        tokenizer=tokenizer,
        _params=spread_.everywhere(params),
        _apply=spread_.jit(apply, static_argnums=2),
    )


def _vocabulary(folder: Path) -> Path:
    """Where the vocabulary lies that belongs to the weights in `folder`."""
    aside = folder.parent / "tokenizer"
    places = {
        folder / "tokenizer.json": folder,
        folder / "vocab.json": folder,
        folder / clip_tokenizer.FILE: folder / clip_tokenizer.FILE,
        aside / "tokenizer.json": aside,
        aside / "vocab.json": aside,
    }
    return next((place for file, place in places.items() if file.is_file()), folder)
