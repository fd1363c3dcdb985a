"""What becomes of every pair of a collection, on one machine: filters, keys, duplicates, limit.

`beam` comes to the same with many machines.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from ldm_scaling.data.preparing import duplicates
from ldm_scaling.data.preparing.filters import CODE, KEPT
from ldm_scaling.data.preparing.options import Options
from ldm_scaling.data.preparing.preparation import Preparation, Verdict

_MOST_OTHERS = 32  # A picture that says "not found" would have those of thousands.
_COLUMNS = ("key", "width", "height", "pixels", "perceptual")


def decide(job: Preparation) -> None:
    """Writes the verdict on every part, from the facts of all."""
    reasons, places, columns = [], [], {name: [] for name in _COLUMNS}
    for i in range(len(job.parts)):
        facts = job.facts(i)
        reason = job.options.filters.examine(facts)
        left = np.flatnonzero(reason == KEPT)
        reasons.append(reason)
        places.append(np.stack([np.full(len(left), i), left], axis=1).astype(np.int32))
        for name in _COLUMNS:
            columns[name].append(facts[name][left])
    place = np.concatenate(places)
    rows = {name: np.concatenate(parts) for name, parts in columns.items()}
    reason, keeper = _judge(job, place, **rows)
    taken = _others(job, place, reason, keeper, rows["key"])
    start = 0
    for i, of_part in enumerate(reasons):
        better = np.full((len(of_part), 2), -1, np.int32)
        here = places[i][:, 1]
        of_part[here] = reason[start : start + len(here)]
        better[here] = keeper[start : start + len(here)]
        start += len(here)
        job.save_verdict(i, Verdict(of_part, better, taken[i]))


def _judge(
    job: Preparation, place: np.ndarray, key: np.ndarray, width: np.ndarray, height: np.ndarray,
    pixels: np.ndarray, perceptual: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Reason int8 [N] and keeper's place int32 [N, 2] of rows that pass the filters, in order."""
    options = job.options
    reason = np.full(len(place), KEPT, np.int8)
    keeper = np.full((len(place), 2), -1, np.int32)
    number = np.arange(len(place))

    once = duplicates.first(_numbered(key), number)
    reason[once < number] = CODE["key"]
    keeper[once < number] = place[once[once < number]]

    left = np.flatnonzero(reason == KEPT)
    best = left[_best_first(width[left].astype(np.int64) * height[left], key[left])]
    rank = np.empty(len(place), np.int64)
    rank[best] = np.arange(len(best))

    def drop(name: str, better: np.ndarray) -> None:
        gone = better < rank[left]
        reason[left[gone]] = CODE[name]
        keeper[left[gone]] = place[best[better[gone]]]

    if options.duplicates.exact:
        drop("duplicate", duplicates.first(_numbered(pixels[left]), rank[left]))
        left = left[reason[left] == KEPT]
    if options.duplicates.perceptual is not None:
        bits = options.duplicates.perceptual
        drop("near-duplicate", duplicates.near(perceptual[left], rank[left], bits))
        left = left[reason[left] == KEPT]
    if options.limit is not None and len(left) > options.limit:
        order = np.array([options.order(k) for k in key[left]])
        reason[left[np.argsort(order, kind="stable")[options.limit :]]] = CODE["limit"]
    return reason, keeper


def others(
    options: Options, best: Sequence[str], duplicates: Iterable[Sequence[str]]
) -> tuple[str, ...]:
    """Captions that exact duplicates have beyond those of the best, `_MOST_OTHERS` at most.

    Of tiles there are none: those that are alike, of a clear sky, are of different photographs.

    Args:
      options: of the preparation.
      best: the captions of the one that is kept.
      duplicates: those of each of the others, the better first.
    """
    if options.tile is not None:
        return ()
    texts = dict.fromkeys(text for captions in duplicates for text in captions)
    more = (t for t in texts if t not in best and options.filters.keeps(t))
    return tuple(itertools.islice(more, _MOST_OTHERS))


def _others(
    job: Preparation, place: np.ndarray, reason: np.ndarray, keeper: np.ndarray, key: np.ndarray
) -> dict[int, dict[int, tuple[str, ...]]]:
    """`Verdict.others` of each part."""
    gone = np.flatnonzero(reason == CODE["duplicate"])
    gone = gone[np.argsort(key[gone], kind="stable")]  # as large as each other: the better first
    wanted = np.unique(np.concatenate([place[gone], keeper[gone]]), axis=0)
    parts, starts = np.unique(wanted[:, 0], return_index=True)
    captions = {}
    for i, rows in zip(parts.tolist(), np.split(wanted[:, 1], starts[1:])):
        texts = job.facts(i).captions(rows)
        captions.update(zip(((i, row) for row in rows.tolist()), texts))
    of_keeper = collections.defaultdict(list)
    for one, best in zip(place[gone].tolist(), keeper[gone].tolist()):
        of_keeper[tuple(best)].append(captions[tuple(one)])
    found: dict[int, dict[int, tuple[str, ...]]] = collections.defaultdict(dict)
    for (i, row), worse in of_keeper.items():
        if texts := others(job.options, captions[i, row], worse):
            found[i][row] = texts
    return found


def _numbered(texts: np.ndarray) -> np.ndarray:
    """A number for each different text, from 0."""
    import pyarrow as pa

    # Large ones: all together may be more than 2^31 bytes.
    return pa.array(texts, pa.large_string()).dictionary_encode().indices.to_numpy()


def _best_first(pixels: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Their order by the rule in `duplicates`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.table({"pixels": pixels, "key": pa.array(key, pa.large_string())})
    order = [("pixels", "descending"), ("key", "ascending")]
    return pc.sort_indices(table, sort_keys=order).to_numpy().astype(np.int64)
