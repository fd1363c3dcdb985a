"""Packing a sweep's samples into lanes: who runs where and when, known before anything runs.

Every (configuration, sample) is a job of a known number of rows. Jobs lie back to back in B lanes,
the longest first, each in the lane that is free first (LPT, Graham 1969), so that lanes end within
one short job of each other. Jobs of one length keep the order of their configurations: a
configuration is finished soon after it is begun, and few are under way at a time.
"""

from __future__ import annotations

import array
import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.guidance import Correction
from ldm_scaling.sampling.table import COLUMNS, SamplerTable

_G = COLUMNS.index("g")
_EMPTY = "nothing to draw: every configuration is empty"


@dataclasses.dataclass(frozen=True, eq=False)
class Configuration:
    """Samples drawn with one table at one guidance rate.

    Attributes:
        table: the sampler.
        guidance: the rate w; 1 is none.
        index_N: (N,) int, the samples' numbers: each decides its noise, see `sampler.normal`.
        prompt_N: (N,) int, the samples' prompts, as the caller numbers them; `index_N` if not
            given.

    Raises:
        UserError: for lists that are not of one length or not of whole numbers of 32 bits, or a
            rate that is not finite.
    """

    table: SamplerTable
    guidance: float
    index_N: np.ndarray
    prompt_N: np.ndarray | None = None

    def __post_init__(self):
        for field in ("index_N", "prompt_N"):
            value = getattr(self, field)
            array = np.asarray(self.index_N if value is None else value)
            most = np.iinfo(np.int32)
            if array.size and array.dtype.kind not in "iu":
                raise UserError(
                    f"configuration {self.table.name!r}: {field} holds {array.dtype}: give whole "
                    "numbers"
                )
            if array.size and (array.min() < most.min or array.max() > most.max):
                raise UserError(
                    f"configuration {self.table.name!r}: {field} holds numbers from {array.min()} "
                    f"to {array.max()}: give them within 32 bits, at most {most.max}"
                )
            if array.ndim != 1 or array.shape != np.shape(self.index_N):
                raise UserError(
                    f"configuration {self.table.name!r}: index_N {np.shape(self.index_N)} and "
                    f"prompt_N {array.shape} must be two lists of one length"
                )
            object.__setattr__(self, field, array.astype(np.int32))
        if not np.isfinite(self.guidance):
            raise UserError(f"configuration {self.table.name!r}: guidance={self.guidance}")


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """A stretch of the timeline, as the compiled program takes it: S rows, K jobs a lane.

    Attributes:
        n: rows that run, of the S there is room for.
        rows_BSC: each lane's rows of its tables, zero beyond n and in idle lanes.
        stream_BS: int32, the row's number in its table, which its noise is drawn by.
        start_BS: int32, which of the chunk's new jobs begins before the row, or K.
        end_BS: int32, as which of the chunk's finished jobs one ends after the row, or K.
        guidance_BK: float32 guidance rate of the new jobs.
        index_BK: int32 sample number of the new jobs.
        prompt_BK: int32 prompt of the new jobs.
        starts_S, ends_S, noisy_S: bool, whether any lane begins, ends or draws noise in the row.
        started: (lane, k) of each job that begins, (J, 2) int.
        finished: (lane, k, configuration, position in it) of each job that ends, (J, 4) int.
        useful_rows: rows that a sample needs, of the n B that run.
        pairs_S: bool, whether any lane takes guidance in the row.
        unguided_rows: useful rows whose table takes no guidance there.
    """

    n: int
    rows_BSC: np.ndarray
    stream_BS: np.ndarray
    start_BS: np.ndarray
    end_BS: np.ndarray
    guidance_BK: np.ndarray
    index_BK: np.ndarray
    prompt_BK: np.ndarray
    starts_S: np.ndarray
    ends_S: np.ndarray
    noisy_S: np.ndarray
    started: np.ndarray
    finished: np.ndarray
    useful_rows: int
    pairs_S: np.ndarray
    unguided_rows: int


class Plan:
    """Jobs in lanes.

    Args:
        configurations: what to draw.
        lanes: B, how many samples are under way at a time.
        told: whether the network is told its rate, see `split`.

    Attributes:
        jobs: for every lane its jobs in order, (2, J) int32: configurations, places in them.
        rows: R, the length of the longest lane.
        useful_rows: rows that a sample needs; the rest of the B R are run by idle lanes.

    Raises:
        UserError: if there is nothing to draw or no lane.
    """

    def __init__(
        self, configurations: Sequence[Configuration], lanes: int, told: bool = False
    ):
        self.configurations, self.lanes, self.told = tuple(configurations), lanes, told
        if lanes < 1:
            raise UserError(f"lanes={lanes}: give 1 or more")
        order = sorted(
            range(len(self.configurations)), key=lambda i: -self.configurations[i].table.calls
        )
        free = [(0, lane) for lane in range(lanes)]
        jobs = [array.array("i") for _ in range(lanes)]
        for i in order:
            configuration = self.configurations[i]
            for j in range(len(configuration.index_N)):
                start, lane = free[0]
                jobs[lane].extend((i, j))
                heapq.heapreplace(free, (start + configuration.table.calls, lane))
        self.jobs = [np.array(some, np.int32).reshape(-1, 2).T for some in jobs]
        self.rows = max(end for end, _ in free)
        self.useful_rows = sum(c.table.calls * len(c.index_N) for c in self.configurations)
        if not self.rows:
            raise UserError(_EMPTY)

    @property
    def useful(self) -> float:
        """The share of the B R rows that a sample needs."""
        return self.useful_rows / (self.lanes * self.rows)

    @property
    def correction(self) -> Correction:
        """What the plan's program is compiled for."""
        return _program(self.configurations[0], self.told)[1]

    @property
    def partly(self) -> bool:
        """Whether its rows are guided in part, which is compiled in too."""
        return _program(self.configurations[0], self.told)[2]

    @property
    def samples(self) -> int:
        """How many samples the plan draws."""
        return sum(len(c.index_N) for c in self.configurations)

    def chunks(self, max_rows: int, max_jobs: int) -> Iterator[Chunk]:
        """The timeline in stretches of at most S = max_rows rows and K = max_jobs jobs a lane."""
        tables = [c.table.rows() for c in self.configurations]
        calls = np.array([len(rows) for rows in tables])
        at = [[0, 0] for _ in self.jobs]  # in each lane: the job under way, its rows done

        def until(lane: int) -> int:
            """Rows until as many jobs of a lane have ended as a chunk has room for."""
            job, done = at[lane]
            some = self.jobs[lane][0, job : job + max_jobs]
            return int(calls[some].sum()) - done if len(some) == max_jobs else max_rows

        left = self.rows
        while left:
            n = min(left, max_rows, *(until(lane) for lane in range(self.lanes)))
            yield self._chunk(tables, calls, at, n, max_rows, max_jobs)
            left -= n

    def _chunk(self, tables, calls, at, n: int, max_rows: int, max_jobs: int) -> Chunk:
        """The next n rows; moves `at` on."""
        B, S, K = self.lanes, max_rows, max_jobs
        rows_BSC = np.zeros((B, S, len(COLUMNS)), np.float32)
        stream_BS = np.zeros((B, S), np.int32)
        start_BS, end_BS = np.full((2, B, S), K, np.int32)
        guidance_BK = np.ones((B, K), np.float32)
        index_BK, prompt_BK = np.zeros((2, B, K), np.int32)
        started, finished, useful, guided = [], [], 0, 0
        for lane, jobs in enumerate(self.jobs):
            job, done = at[lane]
            s = new = ended = 0
            while s < n and job < jobs.shape[1]:
                i, j = jobs[:, job].tolist()
                if done == 0:
                    configuration = self.configurations[i]
                    start_BS[lane, s] = new
                    guidance_BK[lane, new] = configuration.guidance
                    index_BK[lane, new] = configuration.index_N[j]
                    prompt_BK[lane, new] = configuration.prompt_N[j]
                    started.append((lane, new))
                    new += 1
                take = min(n - s, int(calls[i]) - done)
                rows_BSC[lane, s : s + take] = tables[i][done : done + take]
                stream_BS[lane, s : s + take] = np.arange(done, done + take)
                s, done = s + take, done + take
                if done == calls[i]:
                    end_BS[lane, s - 1] = ended
                    finished.append((lane, ended, i, j))
                    ended += 1
                    job, done = job + 1, 0
            at[lane] = [job, done]
            useful += s
            guided += int(np.count_nonzero(rows_BSC[lane, :s, _G]))
        return Chunk(
            n=n, rows_BSC=rows_BSC, stream_BS=stream_BS, start_BS=start_BS, end_BS=end_BS,
            guidance_BK=guidance_BK, index_BK=index_BK, prompt_BK=prompt_BK,
            starts_S=(start_BS < K).any(0), ends_S=(end_BS < K).any(0),
            noisy_S=(rows_BSC[..., COLUMNS.index("c")] != 0).any(0),
            started=np.array(started, np.int64).reshape(-1, 2),
            finished=np.array(finished, np.int64).reshape(-1, 4), useful_rows=useful,
            pairs_S=(rows_BSC[..., _G] != 0).any(0), unguided_rows=useful - guided,
        )


def _program(c: Configuration, told: bool) -> tuple[bool, Correction, bool]:
    """What a configuration must be compiled for."""
    guided = c.guidance != 1 and bool(c.table.g.any()) and not told
    correction = c.table.correction
    # Only a guided output is rescaled.
    correction = correction if guided else dataclasses.replace(correction, rescale=0.0)
    return guided, correction, guided and c.table.partly


def split(
    configurations: Sequence[Configuration], told: bool = False
) -> list[tuple[bool, list[int]]]:
    """What one program can run together: (whether guided, the configurations' numbers).

    Guidance costs a second evaluation and a `Correction` is compiled in, so these part, and so do
    tables some of whose rows take no guidance: rows in which no lane does are evaluated once. A
    network that is told its rate, as after guided distillation, is never evaluated twice.
    Configurations without samples are left out.

    Raises:
        UserError: if all are without.
    """
    groups: dict[tuple[bool, Correction, bool], list[int]] = {}
    for i, c in enumerate(configurations):
        if len(c.index_N):
            groups.setdefault(_program(c, told), []).append(i)
    if configurations and not groups:
        raise UserError(_EMPTY)
    return [(guided, members) for (guided, *_), members in groups.items()]
