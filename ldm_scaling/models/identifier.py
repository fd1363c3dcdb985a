"""DreamBooth's identifier: a word that means nothing yet to a text encoder (arXiv 2208.12242, 3.2).

It should be rare, so that there is no meaning to be unlearnt, and of few tokens, so that it can be
learnt. How rare a token is shows in its number: the vocabularies of BERT and of CLIP are ordered by
how often their pieces were met. "sks", the customary choice, is CLIP's token 48136 of 49408; to
BERT's WordPiece it is two pieces, `sk` and `##s`, no word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ldm_scaling.errors import UserError

# A single token among this share of a vocabulary, the commonest, is an ordinary word.
_COMMON = 0.8
# The paper takes words of up to 3 letters: more pieces are harder to bind together.
MOST_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Identifier:
    """What an encoder makes of a word.

    Attributes:
      word: the identifier.
      ids: its tokens, without those for start and end.
      doubt: why it may serve badly, for a warning; empty where it serves.
    """

    word: str
    ids: tuple[int, ...]
    doubt: str


def read(
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]], word: str,
    vocabulary: int, unknown: int | None = None,
) -> Identifier:
    """What a tokenizer makes of an identifier.

    Args:
      tokenize: texts -> ids_BL and mask_BL, a token for start and one for end among them.
      word: the identifier.
      vocabulary: tokens that there are.
      unknown: the token of what it does not know; None where it knows every text.
    Raises:
      UserError: for a word that is empty, or of which nothing or the unknown token is left: it
        could not be told from others.
    """
    ids_BL, mask_BL = tokenize([word])
    ids = tuple(int(i) for i in ids_BL[0, : int(mask_BL[0].sum())][1:-1])
    if not ids or unknown in ids:
        what = "no tokens" if not ids else "a character it does not know"
        raise UserError(
            f"identifier {word!r}: to the text encoder it is {what}, so it can mean nothing; "
            "choose a short word that is none, such as 'sks'"
        )
    doubt = ""
    if len(ids) == 1 and ids[0] < _COMMON * vocabulary:
        doubt = (
            f"{word!r} is an ordinary word to the text encoder (token {ids[0]} of {vocabulary}), "
            "and what it means already will show in the pictures"
        )
    elif len(ids) > MOST_TOKENS:
        doubt = (
            f"{word!r} is {len(ids)} tokens to the text encoder, more than {MOST_TOKENS}: they "
            "are harder to bind to one subject"
        )
    if doubt:
        doubt += "; a rare word of up to 3 letters, such as 'sks', serves better"
    return Identifier(word, ids, doubt)
