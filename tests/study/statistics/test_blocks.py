"""More than two seed blocks: choosing flatters where it chose, and more blocks say more."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import curves, findings
from ldm_scaling.study.statistics import blocks
from tests.study import fake_records as fake

FD = "fd_effnetlite0"


def _several(seed, report=3, **more):
    """Block 0 of one study, and the reported blocks of others as blocks 1, 2, ... of it."""
    out = []
    for k in range(report):
        for r in fake.make(seed=1000 * seed + k, **more):
            block = r.identity.seed_block
            if (block == 0) == (k == 0) or block == 1:
                identity = dataclasses.replace(r.identity, seed_block=block and k + 1)
                out += [dataclasses.replace(r, identity=identity)] if block or k == 0 else []
    return out


MODELS = ("c8", "c16")
FLAT = {"models": ("c8",), "samplers": ("ddim",), "noise": 1.0, "shared": 0.0}


def test_two_blocks_pooled_are_what_they_were():
    records = fake.make()
    place = {r.identity.key: r for r in records}
    for r in blocks.pooled(records, 0, [1]):
        old = place.pop(r.identity.key)
        assert r.metrics == pytest.approx(old.metrics)
        for name, drawn in r.replicates.items():
            np.testing.assert_allclose(drawn, old.replicates[name])
    assert place == {}


def test_pooled_blocks_are_more_precise_and_still_cover():
    truth, hit, width = fake.Truth(), [], {1: [], 3: []}
    for seed in range(50):
        # One rate, so that every block reports the same.
        records = _several(seed, models=("c8", "c24"), samplers=("ddim",), guidance=(3.0,))
        for k, report in ((1, [1]), (3, [1, 2, 3])):
            pooled = blocks.pooled(records, 0, report)
            assert blocks.blocks(pooled) == [0, 1]
            for curve in curves.quality_curves(pooled, FD).values():
                for p in curve:
                    width[k].append(p.high - p.low)
                    true = truth.distance(p.model, p.sampler, p.steps, p.guidance)
                    hit.append((k, p.low <= true <= p.high))
    assert np.mean(width[3]) / np.mean(width[1]) == pytest.approx(3**-0.5, rel=0.05)
    for k in (1, 3):
        assert np.mean([h for kind, h in hit if kind == k]) >= 0.9


@pytest.mark.parametrize(("name", "bounds", "raced"), [
    ("coverage", (0.0, 1.0), False), ("cmmd", (0.0, np.inf), False),
    ("cmmd", (-np.inf, np.inf), True), ("kid_tf2015", (-np.inf, np.inf), False),
    ("caption_agreement", (-np.inf, np.inf), False)])
def test_pooled_intervals_end_where_the_score_does(name, bounds, raced):
    """But what is foretold without bias may be below 0, and so may what has no bounds."""
    drawn = np.random.default_rng(0).uniform(-0.5, 1.5, (2, 200))
    records = [
        dataclasses.replace(r, metrics={name: 0.5}, intervals={}, round=int(raced),
                            replicates={name: drawn[r.identity.seed_block - 1].tolist()})
        for r in _several(0, report=2, models=("c8",), samplers=("ddim",), guidance=(3.0,))
        if r.identity.seed_block
    ]
    for r in blocks.pooled(records, 0, [1, 2]):
        ends = np.quantile(drawn.mean(axis=0), (0.025, 0.975))
        assert ends[0] < 0 and ends[1] > 1
        assert r.intervals[name] == pytest.approx(tuple(np.clip(ends, *bounds)))


def test_optimism_is_what_choosing_flatters_by():
    """Four equally good rates: the best of four standard normals is 1.03 below their mean."""
    flattery, covered = [], []
    for seed in range(60):
        records = []
        for block in range(4):
            for r in fake.make(fake.flat_truth(("c8",)), replicates=0,
                               seed=97 * seed + block, **FLAT):
                if r.identity.seed_block == 0:
                    identity = dataclasses.replace(r.identity, seed_block=block)
                    records.append(dataclasses.replace(r, identity=identity))
        found = blocks.optimism(records, FD, 0, [1, 2, 3])
        assert len(found) == 5
        flattery += [o.flattery for o in found]
        covered += [o.low <= 40 <= o.high for o in found]
    assert np.mean(flattery) == pytest.approx(1.03, abs=0.15)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)


def test_flattery_tells_choosing_from_a_blocks_own_luck():
    """Choosing the best of four equal rates flatters by 1.03; luck that a block's cells share does
    not count as choosing."""
    covered, mean = [], []
    for seed in range(120):
        found = fake.make(fake.flat_truth(MODELS), models=MODELS, samplers=("ddim",), noise=1.0,
                          shared=0.7, replicates=0, report_blocks=(1, 2, 3, 4), seed=seed)
        told = blocks.flattery(found, FD, 0, (1, 2, 3, 4))
        assert told.cells == 10 and told.low < told.mean < told.high
        covered.append(told.low <= 1.03 <= told.high)
        mean.append(told.mean)
    assert np.mean(mean) == pytest.approx(1.03, abs=0.25)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.05)
    assert blocks.flattery(found, FD, 0, (1,)).low is None
    assert blocks.flattery(found, FD, 0, (9,)) is None


def test_a_configuration_without_all_blocks_is_left_out():
    records = _several(0, report=2, models=("c8",), samplers=("ddim",), guidance=(3.0,))
    less = [r for r in records if not (r.identity.seed_block == 2 and r.identity.steps == 50)]
    (curve,) = curves.quality_curves(blocks.pooled(less, 0, [1, 2]), FD).values()
    assert [p.steps for p in curve] == [4, 6, 10, 20]


def test_nothing_is_said_of_choosing_where_rates_raced():
    records = _several(0, report=2, models=("c8", "c16"), samplers=("ddim",))
    assert len(findings.between_blocks(records, FD, 0, (1, 2))) == 1
    raced = [dataclasses.replace(r, round=1) if r.identity.seed_block == 0 else r for r in records]
    assert findings.between_blocks(raced, FD, 0, (1, 2)) == []


def test_what_was_measured_on_fewer_blocks_is_kept():
    """An earlier checkpoint on the first block alone, another task on the second alone."""
    records = _several(0, report=2, models=("c8",), samplers=("ddim",), guidance=(3.0,))
    last = records[0].identity.train_step

    def at(r, step, task):
        return dataclasses.replace(
            r, task=task, identity=dataclasses.replace(r.identity, train_step=step))

    early = [at(r, last + 1, r.task) for r in records if r.identity.seed_block == 1]
    other = [at(r, last, "consistency") for r in records if r.identity.seed_block == 2]
    found = blocks.pooled([*records, *early, *other], 0, [1, 2])
    reported = [r for r in found if r.identity.seed_block]
    assert {r.identity.seed_block for r in reported} == {1}
    assert [r for r in reported if r.identity.train_step == last + 1] == early
    assert [r.metrics for r in reported if r.task == "consistency"] == [r.metrics for r in other]
    assert [r for r in found if r.identity.train_step == last and r.task == records[0].task] == (
        blocks.pooled(records, 0, [1, 2]))


def test_mistakes_are_named():
    records = _several(0, report=2, models=("c8",), samplers=("ddim",), guidance=(3.0,))
    with pytest.raises(UserError, match="at least one other block"):
        blocks.pooled(records, 0, [0, 1])
    with pytest.raises(UserError, match="c8, ddim, 4 steps: 3 records of 2 seed blocks"):
        again = [r for r in records if r.identity.seed_block == 2]
        blocks.pooled([*records, *again], 0, [1, 2])
    short = [dataclasses.replace(r, replicates={k: v[:50] for k, v in r.replicates.items()})
             if r.identity.seed_block == 2 else r for r in records]
    with pytest.raises(UserError, match=r"hold \[200, 50\] replicates"):
        blocks.pooled(short, 0, [1, 2])
