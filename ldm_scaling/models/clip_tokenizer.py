"""CLIP's tokens, as either of the two programs makes them that CLIP is used with.

The vocabulary is one: bytes, bytes that end a word, and 48,894 merges. What is done to a text
before it is looked up is not: see `BEHAVIOURS`.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of
from ldm_scaling.models import tokenizing
from ldm_scaling.models.clip_checkpoint import read_json

BEHAVIOURS = {
    "transformers": "as Hugging Face's CLIPTokenizer: NFC, lower case; special tokens in a text "
    "stay what they are; padded with the token that tokenizer_config.json names",
    "open_clip": "as OpenAI's and OpenCLIP's: ftfy, HTML entities replaced, lower case; padded "
    "with zeros",
}
FILE = "bpe_simple_vocab_16e6.txt.gz"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGES = 48894
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Vocabulary(NamedTuple):
    """Ids by token, those of tokens added beyond them, merges in order of rank, the four special
    tokens, and those that a text may hold as such."""

    ids: dict[str, int]
    beyond: dict[str, int]
    merges: list[tuple[str, str]]
    special: dict[str, str]
    added: list[tokenizers.AddedToken]


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Texts to rows of `context` token ids, which are below `size`; make one with `load`. Equal
    hashes, equal tokens."""

    behaviour: str
    context: int
    hash: str
    bos: int
    eos: int
    pad: int
    size: int
    _encode: Callable[[Sequence[str]], list[Sequence[int]]] = dataclasses.field(repr=False)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL int32: start, text, end, padding; and mask_BL bool, true up to the end. A text
        that is too long loses its last tokens, never the end.

        Raises:
          UserError: for what is no list of Unicode texts.
        """
        tokenizing.check(texts)
        ids_BL = np.full((len(texts), self.context), self.pad, np.int32)
        mask_BL = np.zeros(ids_BL.shape, bool)
        for i, ids in enumerate(self._encode(texts)):
            row = [self.bos, *ids[: self.context - 2], self.eos]
            ids_BL[i, : len(row)], mask_BL[i, : len(row)] = row, True
        return ids_BL, mask_BL

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with its start and end, before any is lost."""
        return [len(ids) + 2 for ids in self._encode(texts)]


def load(path: str | os.PathLike[str], behaviour: str, context: int = 77) -> ClipTokenizer:
    """The tokenizer of a vocabulary on disk.

    Args:
      path: OpenAI's bpe_simple_vocab_16e6.txt.gz, a tokenizer.json, or a folder with that or with
        vocab.json and merges.txt, e.g. the `tokenizer` of a Stable Diffusion. Tokens added to it,
        as textual inversion does, have the ids that its tables give them.
      behaviour: one of `BEHAVIOURS`.
      context: tokens of a row, start and end among them.

    Raises:
      UserError: for an unknown behaviour, a file that is missing or broken, a special token without
        an id, two of one id, a context below 2.
    """
    if behaviour not in BEHAVIOURS:
        raise UserError(f"CLIP's texts are read as by {' or '.join(BEHAVIOURS)}, not {behaviour!r}")
    if context < 2:
        raise UserError(f"a row holds start and end at least: context = {context}, give 2 or more")
    path = Path(path)
    vocabulary = _of_openai(path) if path.suffix == ".gz" else _of_transformers(path)
    ids, beyond, merges, special, added = vocabulary
    every = ids | beyond
    try:
        bpe = models.BPE(every, merges, end_of_word_suffix="</w>", unk_token=special["unk_token"])
        bos, eos, pad = (every[special[f"{name}_token"]] for name in ("bos", "eos", "pad"))
    except Exception as e:  # the library has no class of its own for a merge of unknown tokens
        raise UserError(f"{path} does not hold together ({e}): fetch it again") from e
    if behaviour == "transformers":
        encode, ids = _transformers(bpe, added), every
        flags = [(t.content, t.single_word, t.lstrip, t.rstrip, t.normalized) for t in added]
    else:
        encode, pad, flags = _open_clip(bpe, bos, eos), 0, []
    decides = [behaviour, context, ids, merges, bos, eos, pad, flags]
    size = max(ids.values()) + 1
    return ClipTokenizer(behaviour, context, sha256_of(decides), bos, eos, pad, size, encode)


def _transformers(bpe: models.BPE, added: Sequence[tokenizers.AddedToken]) -> Callable:
    """transformers 5's CLIPTokenizer, part by part (tokenization_clip.py)."""
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = tokenizers.Regex(r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_tokens(list(added))

    def encode(texts):
        return [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return encode


def _open_clip(bpe: models.BPE, bos: int, eos: int) -> Callable:
    """open_clip's SimpleTokenizer (tokenizer.py): `regex` and Python's own lower case, whose
    tables of Unicode differ from those of the library of tokenizers.
    """
    special = {"<start_of_text>": bos, "<end_of_text>": eos}
    words = regex.compile("|".join([*special, _WORDS]), regex.IGNORECASE)
    letters = _byte_letters()

    @functools.lru_cache(1 << 16)
    def word_ids(word):
        if word in special:
            return (special[word],)
        return tuple(t.id for t in bpe.tokenize("".join(letters[b] for b in word.encode())))

    def encode(texts):
        rows = []
        for text in texts:
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
            text = " ".join(text.split()).lower()
            rows.append([i for word in words.findall(text) for i in word_ids(word)])
        return rows

    return encode


def _byte_letters() -> list[str]:
    """A printable letter for each byte: itself where it is one, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


# --- files ------------------------------------------------------------------------------------

# transformers' own, for what tokenizer_config.json leaves out.
_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}


def _of_openai(file: Path) -> Vocabulary:
    """OpenAI's file: a line of its version, then merges by rank, of which the first are used."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : _MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line)]
    except (OSError, EOFError, ValueError) as e:
        raise UserError(
            f"cannot read the CLIP vocabulary {file} ({e}): fetch {FILE} from "
            f"https://github.com/openai/CLIP, folder clip, and put it in {file.parent}"
        ) from e
    letters = sorted(_byte_letters())
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), BOS, EOS]
    ids = {token: i for i, token in enumerate(tokens)}
    added = [tokenizing.added_token(token) for token in (BOS, EOS)]
    return Vocabulary(ids, {}, merges, _SPECIAL, added)


def _of_transformers(path: Path) -> Vocabulary:
    """A folder that transformers wrote, in any of its versions, or the tokenizer.json in it."""
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json" if path.is_dir() else path
    table = read_json(file) if file.is_file() else {}
    try:
        if table:
            ids, merges = table["model"]["vocab"], table["model"]["merges"]
        else:
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"no CLIP vocabulary in {path} ({e!r}): it takes tokenizer.json, or vocab.json and "
            "merges.txt, which lie beside the weights on https://huggingface.co (in a repository "
            f"of Stable Diffusion in the folder tokenizer), or OpenAI's {FILE}"
        ) from e
    config, stored = tokenizing.tables(folder, table)
    config = _SPECIAL | {name: of for name, of in config.items() if of is not None}
    named = {name: tokenizing.added_token(config[name]) for name in _SPECIAL}
    others = map(tokenizing.added_token, config.get("additional_special_tokens") or ())
    # Where two names share a text the last counts, and what is stored counts more.
    added = {t.content: t for t in (*named.values(), *others)}
    added |= {text: token for text, (_, token) in stored.items()}
    beyond = {text: i for text, (i, _) in stored.items() if text not in ids}
    if unknown := [text for text in added if text not in ids and text not in beyond]:
        raise UserError(
            f"{folder}: the tokens {unknown} are not in the vocabulary beside them, nor among the "
            "tokens added to it with an id: fetch all its tables"
        )
    if len({*ids.values(), *beyond.values()}) < len(ids) + len(beyond):
        raise UserError(f"{folder}: two tokens have one id; added are {beyond}: fetch it again")
    special = {name: token.content for name, token in named.items()}
    return Vocabulary(ids, beyond, merges, special, list(added.values()))
