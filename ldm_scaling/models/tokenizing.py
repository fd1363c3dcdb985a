"""Texts to rows of token ids: what all text encoders do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers

from ldm_scaling.errors import UserError


def check(texts: Sequence[str]) -> None:
    """Raises `UserError` for what is no list of Unicode texts."""
    if isinstance(texts, str):
        raise UserError(f"a list of texts is needed, not the single text {texts[:40]!r}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"text {i} of {len(texts)} is not Unicode text: {text!r:.60}")


def rows(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids_BL int32 and mask_BL bool by a tokenizer that cuts and pads to `length` tokens. Raises
    `UserError` as `check`."""
    check(texts)
    encodings = tokenizer.encode_batch(list(texts))
    shape = (len(texts), length)
    ids_BL = np.array([e.ids for e in encodings], np.int32).reshape(shape)
    mask_BL = np.array([e.attention_mask for e in encodings], bool).reshape(shape)
    return ids_BL, mask_BL
