"""How the files of a collection are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ldm_scaling.data.collection import SCORES
from ldm_scaling.errors import UserError
from ldm_scaling.files import sha256_of

NO_CAPTIONS = (
    "name them by data.prepare.caption_columns, or ask for none by data.prepare.captions=False"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is said about a collection's files beyond where they are.

    Attributes:
      caption_columns: columns that hold captions, all of which are taken; empty means the first of
        `CAPTION_COLUMNS` that is there.
      caption_encoding: of captions and tables without a byte order mark.
      score_columns: name in `SCORES` to the column that holds it; other names as in `SCORES`.
      part_size: most pairs of a part, but for tars, which are read whole.
      captions: whether a table without captions is refused; if not, its images are read alone.
    """

    caption_columns: tuple[str, ...] = ()
    caption_encoding: str = "utf-8"
    score_columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    part_size: int = 1000
    captions: bool = True

    def __post_init__(self):
        if isinstance(self.caption_columns, str):
            raise UserError(
                "data.prepare.caption_columns is a list of names, not the text "
                f"{self.caption_columns!r}: write ({self.caption_columns!r},)"
            )
        try:
            "".encode(self.caption_encoding)
        except LookupError as e:
            raise UserError(
                f"data.prepare.caption_encoding {self.caption_encoding!r} is no encoding of texts "
                "that Python knows: use utf-8, latin-1, cp1252, shift_jis, gb18030, ..."
            ) from e
        unknown = sorted(set(self.score_columns) - set(SCORES))
        if unknown:
            raise UserError(f"score_columns names {unknown[0]!r}: scores are {', '.join(SCORES)}")
        if self.part_size < 1:
            raise UserError(f"a part holds at least 1 pair: part_size is {self.part_size}")
        object.__setattr__(self, "caption_columns", tuple(self.caption_columns))
        object.__setattr__(self, "score_columns", dict(self.score_columns))

    @property
    def hash(self) -> str:
        """Hash of all of them: other options give other pairs of the same files."""
        return sha256_of(dataclasses.asdict(self))

    def names_of(self, score: str) -> tuple[str, ...]:
        """The columns that may hold a score."""
        return (self.score_columns[score],) if score in self.score_columns else SCORES[score]
