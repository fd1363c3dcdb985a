"""A text encoder as a function of its parameters, to be trained along with what it conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models import clip_text, text_encoder


@dataclasses.dataclass(frozen=True, eq=False)
class TextNetwork:
    """Make one with `of`.

    Attributes:
      params: as they were published.
      apply: `apply(params, ids_BL, mask_BL) -> ctx_BLD` float32, the states that condition a
        network; traced.
      tokenize: texts -> ids_BL int32, mask_BL bool.
    """

    params: Any
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

    def states(self, params: Any, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """ctx_BLD of texts under other parameters, in batches of one size."""
        ids_BL, mask_BL = self.tokenize(list(texts))
        run, out = jax.jit(self.apply), []
        for start in range(0, len(ids_BL), batch):
            some = [a[start : start + batch] for a in (ids_BL, mask_BL)]
            fill = ((0, min(batch, len(ids_BL)) - len(some[0])), (0, 0))
            ctx = run(params, *(np.pad(a, fill, mode="edge") for a in some))
            out.append(np.asarray(ctx)[: len(some[0])])
        return np.concatenate(out)


def of(encoder: Any) -> TextNetwork:
    """MiniLM or a CLIP as a network that can be trained.

    Args:
      encoder: a `text_encoder.TextEncoder` or a `clip_text.ClipText`.
    Raises:
      UserError: for another encoder.
    """
    if isinstance(encoder, text_encoder.TextEncoder):

        def states(params, ids_BL, mask_BL):
            return encoder._encode(params, ids_BL, mask_BL)[0]

        params = encoder._params
    elif isinstance(encoder, clip_text.ClipText):

        tower = clip_text.TextTower(encoder.spec)

        def states(params, ids_BL, mask_BL):
            out = tower.apply({"params": params}, ids_BL)
            return out[encoder.layer].astype(jnp.float32)

        params = encoder._params
    else:
        raise UserError(
            "the text encoder that is trained along is MiniLM or a CLIP: this study's is a "
            f"{type(encoder).__name__}; set train_text_encoder=False, or change data.text_weights"
        )
    return TextNetwork(jax.device_get(params), states, encoder.tokenize)
