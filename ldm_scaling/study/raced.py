"""Racing sweeps: which guidance rates draw how many pictures next, read off the records.

Each (sampler, steps) of a member is a race of its guidance rates on the selection block. A round's
record is of the first n pictures of the block, n in its identity; its distance is foretold for all
of them, so that rates that stopped early can be compared with others. The same records give the
same next round, so that a sweep that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from ldm_scaling.config import Sweep
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.parallel import processes
from ldm_scaling.study import records
from ldm_scaling.study.records import Identity, Record
from ldm_scaling.study.statistics import racing
from ldm_scaling.study.statistics.racing import Race, Score

_KIND = "features of a race's round"


@dataclasses.dataclass(frozen=True)
class Round:
    """What all races of a member draw next.

    Attributes:
      number: counted from 1.
      identities: of the records that it makes.
      start, stop: numbers of the block's pictures that are drawn; those before `start` are there.
    """

    number: int
    identities: tuple[Identity, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One race and the records of its finished rounds."""

    race: Race
    identities: dict[float, Identity]
    rounds: tuple[tuple[Record, ...], ...]


def rounds(sweep: Sweep) -> tuple[int, ...]:
    """Pictures of a rate after each round."""
    return racing.schedule(len(sweep.guidance), sweep.num_images, sweep.saving)


def _cells(
    sweep: Sweep, grid: Sequence[Identity], directory: epath.PathLike, metric: str
) -> list[_Cell]:
    """Every race as far as its records go.

    Args:
      sweep: the grid.
      grid: the identities of the full grid on the selection block.
      directory: where records lie.
      metric: a distance: what the race is about.
    """
    cells: dict[tuple[str, int], dict[float, Identity]] = {}
    for i in grid:
        cells.setdefault((i.sampler, i.steps), {})[i.guidance] = i
    return [_replay(sweep, found, directory, metric) for found in cells.values()]


def _replay(
    sweep: Sweep, identities: dict[float, Identity], directory: epath.PathLike, metric: str
) -> _Cell:
    race, told = Race(tuple(sorted(identities)), rounds(sweep)), []
    while not race.over:
        wanted = [_at(identities[rate], race.span[1]) for rate in race.live]
        if records.missing(directory, wanted):
            break
        found = tuple(records.read(records.path_of(directory, i.key)) for i in wanted)
        race = race.tell({r.identity.guidance: _score(r, metric) for r in found})
        told.append(found)
    return _Cell(race, identities, tuple(told))


def _at(identity: Identity, images: int) -> Identity:
    """A rate of the full grid after so many pictures."""
    return dataclasses.replace(
        identity, num_images=images, reference_hash=records.raced_reference(identity)
    )


def _score(record: Record, metric: str) -> Score:
    drawn_R = np.asarray(record.replicates.get(metric, ()), np.float64)
    if drawn_R.size < 2:
        raise UserError(
            f"the record {record.identity.key}.json holds no replicates of {metric}, which a race "
            "is decided by: delete it and run the same command again to have it measured anew"
        )
    return Score(record.metrics[metric], drawn_R)


def next_round(
    sweep: Sweep, grid: Sequence[Identity], directory: epath.PathLike, metric: str
) -> Round | None:
    """The earliest round that some race still has to run; None when all are over.

    Races run side by side, round by round, so that all of a round's pictures share the lanes.
    """
    cells = _cells(sweep, grid, directory, metric)
    number = min(len(c.rounds) for c in cells)
    now = [c for c in cells if len(c.rounds) == number and not c.race.over]
    if not now:
        return None
    start, stop = now[0].race.span
    wanted = tuple(_at(c.identities[rate], stop) for c in now for rate in c.race.live)
    return Round(number + 1, wanted, start, stop)


def agreed_round(
    sweep: Sweep, grid: Sequence[Identity], directory: epath.PathLike, metric: str
) -> Round | None:
    """`next_round` as the lead sees it, in all processes: a shared folder may look different
    elsewhere for a moment."""
    def told() -> dict | None:
        now = next_round(sweep, grid, directory, metric)
        return None if now is None else dataclasses.asdict(now)

    now = processes.from_lead("round", told)
    if now is None:
        return None
    identities = tuple(Identity(**identity) for identity in now.pop("identities"))
    return Round(identities=identities, **now)


def last_rounds(
    sweep: Sweep, grid: Sequence[Identity], directory: epath.PathLike, metric: str
) -> tuple[list[Record], bool]:
    """The last record of every rate that has one, and whether all races are over.

    Its number of pictures is what was drawn for the rate in all.
    """
    cells = _cells(sweep, grid, directory, metric)
    last: dict[tuple[str, int, float], Record] = {}
    for r in (r for c in cells for told in c.rounds for r in told):
        last[r.identity.sampler, r.identity.steps, r.identity.guidance] = r
    return list(last.values()), all(c.race.over for c in cells)


def planned(sweep: Sweep, grid: Sequence[Identity]) -> list[Identity]:
    """The most that the races can draw: each rate with its last number of pictures, where every
    round drops half. Which rates go on is a guess."""
    after, out = rounds(sweep), []
    cells: dict[tuple[str, int], list[Identity]] = {}
    for i in grid:
        cells.setdefault((i.sampler, i.steps), []).append(i)
    for found in cells.values():
        live = len(found)
        for k, images in enumerate(after):
            stay = -(-live // 2) if k + 1 < len(after) else 0
            out += [_at(i, images) for i in found[stay:live]]
            live = stay
    return out


def forget(
    directory: epath.PathLike, record_folder: epath.PathLike, grid: Sequence[Identity]
) -> None:
    """Removes the features that lie between rounds of the grid's cells, of whatever rates, rounds
    and config; for races that are over. What has no record goes too: no race takes it up.

    Args:
      directory: of the features.
      record_folder: where records lie.
      grid: what has been measured on the selection block.
    """
    over = {_cell_of(i) for i in grid}
    for path in epath.Path(directory).glob("*.npz"):
        record = records.path_of(record_folder, path.stem)
        if not record.exists() or _cell_of(records.read(record).identity) in over:
            path.unlink(missing_ok=True)


def _cell_of(identity: Identity) -> Identity:
    return dataclasses.replace(
        identity, guidance=0.0, num_images=0, reference_hash="", version="")


def before(directory: epath.PathLike, identity: Identity, images: int) -> epath.Path:
    """Where the features of a rate's first pictures lie between two rounds.

    Args:
      directory: of the features.
      identity: of one of its rounds.
      images: how many.
    """
    return epath.Path(directory) / f"{dataclasses.replace(identity, num_images=images).key}.npz"


def keep(path: epath.PathLike, features_ND: np.ndarray) -> None:
    """Writes features for the next round."""
    arrays.save(path, _KIND, {"features_ND": features_ND}, {})


def kept(path: epath.PathLike) -> np.ndarray:
    """Features of the round before. Raises `UserError` where the file is damaged."""
    return arrays.load(path, _KIND)[0]["features_ND"]
