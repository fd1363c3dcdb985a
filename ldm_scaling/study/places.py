"""Where records lie: the places that `--records` and `--workdir` name, one or several, and what the
workdirs among them say of theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.study import curves, reported
from ldm_scaling.study import records as records_lib
from ldm_scaling.study.arguments import pieces
from ldm_scaling.study.records import FROM_TEXT, Record

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Some places, read.

    Attributes:
      folders: that hold the records, each once.
      settings: of the workdirs' last configs, see `curves.one_setting`.
      records: each once; of workdirs see `reported.last_measured`.
      folder_of: a record's key -> the folder that it lies in.
    """

    folders: tuple[epath.Path, ...]
    settings: tuple[str, ...]
    records: list[Record]
    folder_of: Mapping[str, epath.Path]

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Within it `curves.Clash` names both places, where the two records are of two."""
        try:
            yield
        except curves.Clash as e:
            folders = [self.folder_of.get(key) for key in e.keys]
            if None in folders or folders[0] == folders[1]:
                raise
            one, two = (os.fspath(records_lib.path_of(folder, key))
                        for folder, key in zip(folders, e.keys, strict=True))
            how_many = "1 configuration clashes" if e.count == 1 else (
                f"{e.count:,} configurations clash")
            raise UserError(
                f"{e.what}: {one} and {two}; {how_many} so. The places hold two networks or "
                "measurements under one name, which nothing tells apart: ask for each place alone"
            ) from e

    @property
    def homes(self) -> list[epath.Path]:
        """The workdirs, or the folders that are none; each once."""
        return _homes(self.folders)

    def blocks(
        self, select: int | None = None, report: Sequence[int] | None = None
    ) -> tuple[int, list[int]]:
        """The seed blocks that choose and are reported: those given, else the workdirs' own.

        Raises:
          UserError: where these name different ones.
        """
        own = {home: reported.of_workdir(home, select, report) for home in self.homes}
        first, *others = own
        for other in others:
            if own[other] != own[first]:
                one, two = (f"{home} on {own[home][0]} and {own[home][1]}"
                            for home in (first, other))
                raise UserError(
                    f"the places choose and report on other seed blocks, {one}, {two}: give "
                    "--select-block=N and --report-blocks=N,M"
                )
        return own[first]

    @property
    def metric(self) -> str | None:
        """The measure that all workdirs' configs choose by, where records hold it, see
        `reported.metric_of`."""
        own = {reported.metric_of(home, self.records) for home in self.homes}
        metric = own.pop() if len(own) == 1 else None
        return metric if any(metric in r.metrics for r in self.records) else None

    @property
    def spacing(self) -> str:
        """See `reported.spacing_of`; empty where workdirs name different ones."""
        own = {spacing for home in self.homes if (spacing := reported.spacing_of(home))}
        return own.pop() if len(own) == 1 else ""


def _homes(folders: Iterable[epath.Path]) -> list[epath.Path]:
    return list(dict.fromkeys(map(reported.home_of, folders)))


def read(places: Iterable[str], flag: str = "--records") -> Places:
    """The records of folders, of workdirs and of files.

    Args:
      places: with commas, or given several times; a text that names a place as it stands is that
        place, whatever commas it has.
      flag: that names them.

    Raises:
      UserError: where there is no such place, none beside a comma, or no record in all of them.
    """
    several = [piece for text in places
               for piece in ([text] if "," in text and _exists(text) else pieces(flag, [text]))]
    paths = {piece: _place(piece, flag) for piece in several}
    folders = tuple(dict.fromkeys(
        path if path.is_dir() else path.parent for path in paths.values()))
    # Configs come first: their plugins may name what records hold.
    settings = tuple(s for home in _homes(folders) for s in reported.settings_of(home))
    found: dict[str, Record] = {}
    folder_of: dict[str, epath.Path] = {}
    references: dict[str, set[str]] = {}
    for piece, path in paths.items():
        if not path.is_dir():
            some = [records_lib.read(path)]
        else:  # A workdir before its sweep holds other JSON.
            there = any(records_lib.NAME.fullmatch(p.name) for p in path.glob("*.json"))
            home, some = reported.home_of(path), records_lib.read_all(path) if there else []
            some, told = reported.last_measured(home, some)
            for line in told:
                log.warning("%s", line)
        found |= {r.identity.key: r for r in some}
        folder_of |= dict.fromkeys((r.identity.key for r in some),
                                   path if path.is_dir() else path.parent)
        if not some:
            log.warning("%s: no records there", piece)
        references[piece] = {r.identity.reference_hash for r in some if r.task in FROM_TEXT}
    if not found:
        raise UserError(
            f"{flag}={','.join(several)}: no records there; ldm-scaling sweep  writes them, into "
            "records/ of its workdir"
        )
    told = [(piece, hashes) for piece, hashes in references.items() if hashes]
    apart = [piece for piece, hashes in told if not hashes & told[0][1]]
    if apart:
        log.warning(
            "%s: scored against another reference than %s: distances compare where it was made "
            "of the same pictures by the same network", ", ".join(apart), told[0][0])
    return Places(folders, settings, list(found.values()), folder_of)


def _exists(text: str) -> bool:
    try:
        return epath.Path(text).expanduser().exists()
    except OSError:  # Longer than a name may be.
        return False


def _place(piece: str, flag: str) -> epath.Path:
    """The folder of records, or the record, that a piece names."""
    path = epath.Path(piece).expanduser()
    if not path.exists():
        raise UserError(f"{flag}={piece}: there is no such folder or file")
    if path.is_dir():
        return path / "records" if (path / "records").is_dir() else path
    if not records_lib.NAME.fullmatch(path.name):
        raise UserError(f"{flag}={piece} is no record: their names are 16 hex digits and .json")
    return path
