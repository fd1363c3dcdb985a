"""Packing: every sample runs once, whole and in order, and lanes end together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import packing, solvers
from ldm_scaling.sampling.packing import Configuration, Plan
from ldm_scaling.sampling.table import COLUMNS

SD = schedule.get("sd")
TABLES = [solvers.make("ddim", SD, n) for n in (1, 2, 3, 4, 7, 20)]
TABLES += [solvers.make("ddpm", SD, n) for n in (1, 5)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(TABLES) - 1), st.integers(0, 9)), min_size=1,
             max_size=6).filter(lambda some: any(n for _, n in some)),
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 4),
)
def test_chunks_replay_every_table_once(wanted, lanes, max_rows, max_jobs):
    """Read back lane by lane, the chunks hold each job's rows, whole, in order and only once."""
    configurations = [
        Configuration(TABLES[i], 2.0 + k, 100 * k + np.arange(n), 7 * k + np.arange(n))
        for k, (i, n) in enumerate(wanted)
    ]
    plan = Plan(configurations, lanes)
    under_way = [None] * lanes  # (configuration, position, rows done)
    seen, rows, useful = set(), 0, 0
    for chunk in plan.chunks(max_rows, max_jobs):
        assert 1 <= chunk.n <= max_rows
        ended = {(lane, k): (i, j) for lane, k, i, j in chunk.finished.tolist()}
        assert not chunk.rows_BSC[:, chunk.n :].any()
        for lane in range(lanes):
            for s in range(chunk.n):
                k = chunk.start_BS[lane, s]
                assert chunk.starts_S[s] >= (k < max_jobs)
                if k < max_jobs:
                    assert under_way[lane] is None
                    assert [lane, k] in chunk.started.tolist()
                    c = round(float(chunk.guidance_BK[lane, k]) - 2)
                    j = chunk.index_BK[lane, k] - 100 * c
                    assert chunk.prompt_BK[lane, k] == 7 * c + j
                    under_way[lane] = (c, j, 0)
                row = chunk.rows_BSC[lane, s]
                if under_way[lane] is None:
                    assert not row.any()
                    continue
                c, j, done = under_way[lane]
                np.testing.assert_array_equal(row, configurations[c].table.rows()[done])
                assert chunk.stream_BS[lane, s] == done
                assert chunk.noisy_S[s] >= (row[COLUMNS.index("c")] != 0)
                under_way[lane] = (c, j, done + 1)
                if (k := chunk.end_BS[lane, s]) < max_jobs:
                    assert ended.pop((lane, k)) == (c, j) and chunk.ends_S[s]
                    assert done + 1 == configurations[c].table.calls and (c, j) not in seen
                    seen.add((c, j))
                    under_way[lane] = None
        assert not ended
        rows, useful = rows + chunk.n, useful + chunk.useful_rows
    assert seen == {(c, j) for c, (_, n) in enumerate(wanted) for j in range(n)}
    assert rows == plan.rows and useful == plan.useful_rows and plan.samples == len(seen)
    # Longest first in the lane that is free first: lanes end within the longest job.
    longest = max(configurations[c].table.calls for c, (_, n) in enumerate(wanted) if n)
    assert plan.rows <= plan.useful_rows / lanes + longest


@pytest.mark.parametrize("samples, least", [(2000, 0.98), (64, 0.95)])
@pytest.mark.parametrize("lanes", [64, 256, 512, 1024])
def test_useful_rows_of_the_papers_grid(samples, least, lanes):
    configurations = [
        Configuration(solvers.make(name, SD, steps), w, np.arange(samples))
        for name in ("ddim", "ddpm", "dpmpp_2m") for steps in (4, 6, 8, 10, 20, 50)
        for w in (1.5, 2, 3, 4, 5, 6, 7, 8)
    ]
    assert packing.split(configurations) == [(True, list(range(len(configurations))))]
    assert Plan(configurations, lanes).useful >= least


def test_few_configurations_are_under_way_at_a_time():
    """What is gathered behind the sampler is bounded by the lanes, not by the sweep."""
    configurations = [
        Configuration(TABLES[1 + k % 4], 1.0, np.arange(16)) for k in range(200)
    ]
    begun, left, most = set(), dict.fromkeys(range(200), 16), 0
    plan = Plan(configurations, 32)
    for chunk in plan.chunks(8, 4):
        for i in chunk.finished[:, 2].tolist():
            begun.add(i)
            left[i] -= 1
        most = max(most, sum(left[i] > 0 for i in begun))
    assert not any(left.values()) and most <= 2 * 32 / 16 + 2


def test_guided_and_unguided_part():
    """Rescaling is of guided outputs only, a table without guidance is not guided, and one with
    guidance in some rows is a program of its own."""
    rescaled = solvers.make("ddim", SD, 3, rescale=0.7)
    nowhere = solvers.make("ddim", SD, 3, guidance_low=100.0)
    some = [Configuration(TABLES[0], w, np.arange(2)) for w in (1.0, 2.0, 0.0, 1)]
    some += [Configuration(rescaled, w, np.arange(2)) for w in (2.0, 1.0)]
    some.append(Configuration(nowhere, 3.0, np.arange(2)))
    partly = solvers.make("ddim", SD, 3, guidance_low=1.0)
    some += [Configuration(partly, w, np.arange(2)) for w in (3.0, 1.0)]
    assert packing.split(some) == [
        (False, [0, 3, 5, 6, 8]), (True, [1, 2]), (True, [4]), (True, [7])
    ]
    assert packing.split(some[-2:], told=True) == [(False, [0, 1])]
    empty = Configuration(TABLES[0], 1.0, [])
    assert packing.split([empty, some[1], empty]) == [(True, [1])] and packing.split([]) == []


def test_errors():
    with pytest.raises(UserError, match="two lists of one length"):
        Configuration(TABLES[0], 1.0, np.arange(3), np.arange(2))
    for field, numbers, told in (
        ("index_N", [0.5, 1.5], "float64: give whole numbers"),
        ("prompt_N", [2**32 + 5, 0], "numbers from 0 to 4294967301: .* at most 2147483647"),
    ):
        given = {"index_N": np.arange(2), field: np.array(numbers)}
        with pytest.raises(UserError, match=f"{field} holds {told}"):
            Configuration(TABLES[0], 1.0, **given)
    with pytest.raises(UserError, match="guidance=nan"):
        Configuration(TABLES[0], float("nan"), np.arange(3))
    with pytest.raises(UserError, match="lanes=0"):
        Plan([Configuration(TABLES[0], 1.0, np.arange(3))], 0)
    with pytest.raises(UserError, match="nothing to draw"):
        Plan([Configuration(TABLES[0], 1.0, [])], 2)
    with pytest.raises(UserError, match="nothing to draw"):
        packing.split([Configuration(TABLES[0], w, []) for w in (1.0, 2.0)])
