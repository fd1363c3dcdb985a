"""Texts to rows of token ids: what all text encoders do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ldm_scaling.errors import UserError
from ldm_scaling.models.clip_checkpoint import read_json


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


def lengths(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones among them, by a tokenizer that cuts and pads: before."""
    return [
        sum(e.attention_mask) + sum(more.special_tokens_mask.count(0) for more in e.overflowing)
        for e in tokenizer.encode_batch(list(texts))
    ]


def tables(
    folder: Path, table: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[int, tokenizers.AddedToken]]]:
    """What lies beside a vocabulary of transformers, as any of its versions wrote it.

    Args:
      folder: of tokenizer_config.json, special_tokens_map.json and added_tokens.json, where it has
        them.
      table: of the tokenizer.json; empty without one.

    Returns:
      The config with the map's special tokens, and id and flags of each added token by its text.

    Raises:
      UserError: for tables that cannot be read.
    """
    config, stored = _optional(folder / "tokenizer_config.json"), []
    try:
        if "added_tokens_decoder" in config:
            stored = [t | {"id": i} for i, t in config["added_tokens_decoder"].items()]
        else:  # as transformers wrote it before 4.34: the map has the last word
            config |= _optional(folder / "special_tokens_map.json")
            named = [t for name, t in config.items() if name.endswith("_token")]
            named += config.get("additional_special_tokens") or ()
            special = {t["content"] if isinstance(t, dict) else t for t in named if t}
            stored = [
                {"content": text, "id": i, "normalized": text not in special}
                for text, i in _optional(folder / "added_tokens.json").items()
            ]
            stored += table.get("added_tokens", [])
        return config, {t["content"]: (int(t["id"]), added_token(t)) for t in stored}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder}: cannot read its added tokens ({e!r}): fetch it again") from e


def added_token(token: str | dict[str, Any]) -> tokenizers.AddedToken:
    """A special token as JSON has it. A bare text is looked for before lower case."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized") if k in token}
    return tokenizers.AddedToken(token["content"], special=True, **flags)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
