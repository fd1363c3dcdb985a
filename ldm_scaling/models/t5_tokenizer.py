"""T5's tokens: a unigram model of SentencePiece (arXiv 1808.06226), as transformers runs it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from ldm_scaling.errors import UserError
from ldm_scaling.models import tokenizing


def load(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer in a folder of transformers: its tokenizer.json, else its spiece.model.

    Both give transformers' tokens (those of SentencePiece itself but for U+0085, combining marks
    beside what is normalised, and texts that spell out a special token), added ones among them.
    Each text ends in </s>.

    Raises:
      UserError: when there is no such file, it holds something else, or spiece.model is there and
        the package sentencepiece, which reads it, is not.
    """
    folder = Path(folder)
    if (file := folder / "tokenizer.json").is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
            tokenizer.no_padding()  # of the last call before it was saved, as the next
            tokenizer.no_truncation()
        except Exception as e:  # the library raises Exception itself
            raise UserError(f"{file} is not a whole tokenizer ({e}): fetch it again") from e
        _add(tokenizer, folder, tokenizing.tables(folder, {})[1])
    elif (file := folder / "spiece.model").is_file():
        tokenizer = _of_sentencepiece(file)
    else:
        raise UserError(
            f"no T5 vocabulary in {folder}: put spiece.model or tokenizer.json there, which lie "
            "beside the weights on https://huggingface.co (google/t5-v1_1-large)"
        )
    ids = [tokenizer.token_to_id(token) for token in ("<pad>", "</s>")]
    if None in ids or tokenizer.encode("").ids != ids[1:]:
        raise UserError(f"{file} is not T5's: it lacks <pad> or does not end a text in </s>")
    return tokenizer


def _of_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """As transformers builds its T5Tokenizer of spiece.model (tokenization_t5.py)."""
    try:
        format = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as e:
        raise UserError(
            f"{file} is read by the package sentencepiece: run  pip install sentencepiece protobuf"
            "  or put tokenizer.json beside it (that of google-t5/t5-base on "
            "https://huggingface.co is of the same vocabulary)"
        ) from e
    config, stored = tokenizing.tables(file.parent, {})
    try:
        model = format.ModelProto.FromString(file.read_bytes())
        extra = config.get("extra_ids", 100)
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        pieces += [(f"<extra_id_{i}>", 0.0) for i in range(extra - 1, -1, -1)]
        if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
            raise ValueError("its model is not of the kind unigram")
        unknown = model.trainer_spec.unk_id
        tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unknown, byte_fallback=False))
        end = next(i for i, (piece, _) in enumerate(pieces) if piece == "</s>")
    except Exception as e:  # protobuf and tokenizers raise classes of their own
        raise UserError(f"{file} is not the vocabulary of a T5 ({e!r}): fetch it again") from e
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(extra))]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    _add(tokenizer, file.parent, stored)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", end)]
    )
    return tokenizer


def _add(tokenizer: tokenizers.Tokenizer, folder: Path, stored: dict[str, Any]) -> None:
    """Adds the tokens of a folder's `tokenizing.tables` that a tokenizer lacks."""
    beyond = sorted(
        (i, text) for text, (i, _) in stored.items() if tokenizer.token_to_id(text) is None)
    tokenizer.add_tokens([stored[text][1] for _, text in beyond])
    for i, text in beyond:
        if tokenizer.token_to_id(text) != i:
            raise UserError(
                f"{folder}: the added token {text!r} has the id {i}, and what follows its "
                f"vocabulary is {tokenizer.token_to_id(text)}: fetch it again"
            )
