"""What a reader raises for damaged records, so that a loader may count and skip them."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_scaling.errors import UserError


class CorruptRecords(UserError):
    """Some of the records that were asked for are damaged; the others can be read.

    Attributes:
      failures: index within the split to one line that names the record and says what is wrong.
    """

    def __init__(self, failures: Mapping[int, str]):
        super().__init__(dict(failures))  # as its one argument: errors travel between processes
        self.failures: dict[int, str] = dict(failures)

    def __str__(self) -> str:
        lines = list(self.failures.values())
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        return "; ".join(lines[:3]) + more
