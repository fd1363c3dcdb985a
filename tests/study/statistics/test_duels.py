"""Duels: planted crossings are found, equal sizes rarely beat each other."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import curves
from ldm_scaling.study.statistics import duels
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
DDIM = {"ddim"}
SIZES = tuple(fake.CHANNELS)


@pytest.fixture(scope="module")
def found():
    return curves.quality_curves(fake.make(), FD)


def test_the_planted_crossing_is_found(found):
    small = duels.duel(found, FD, "c8", "c48", 4.0, samplers=DDIM)
    large = duels.duel(found, FD, "c8", "c48", 50.0, samplers=DDIM)
    assert small.probability > 0.99 and small.low > 0 and small.p_value < 1e-6
    assert large.probability < 0.01 and large.high < 0 and large.p_value < 1e-6
    said = duels.sentence(small, FD)
    assert said.startswith("At a budget of 4.00 (cost) c8 (50 steps) beats c48 (4 steps) with "
                           "probability above 0.99: by ")
    assert " c48 (50 steps) beats c8 (50 steps) " in duels.sentence(large, FD)


def test_a_duel_seen_from_the_other_side_is_its_mirror(found):
    a, b = (duels.duel(found, FD, *names, 10.0, samplers=DDIM)
            for names in (("c16", "c32"), ("c32", "c16")))
    assert a.advantage == -b.advantage
    assert (a.low, a.high) == pytest.approx((-b.high, -b.low))
    assert a.probability == pytest.approx(1 - b.probability)
    assert a.p_value == pytest.approx(b.p_value)
    assert duels.sentence(a, FD) == duels.sentence(b, FD)


def test_advantages_hold_the_truth_along_a_curve_and_at_each_budget():
    truth, alone, along = fake.Truth(), [], []
    for seed in range(100):
        records = fake.make(truth, models=("c8", "c24"), samplers=("ddim",), seed=seed)
        found = curves.quality_curves(records, FD)
        budgets, band = duels.difference_band(found, FD, "c8", "c24")
        true = []
        for budget in budgets:
            one = duels.duel(found, FD, "c8", "c24", budget)
            a, b = (truth.distance(p.model, p.sampler, p.steps, p.guidance)
                    for p in (one.a, one.b))
            true.append(b - a)
            alone.append(one.low <= b - a <= one.high)
        along.append(((band.all_low_P <= true) & (true <= band.all_high_P)).all())
    assert np.mean(alone) == pytest.approx(0.95, abs=0.03)
    assert np.mean(along) >= 0.89


def test_among_equal_sizes_few_families_hold_a_false_call():
    """Null: five equal sizes at five budgets. Uncorrected p-values are uniform; Holm's are rare."""
    p_values, holm, certain = [], [], []
    for seed in range(150):
        records = fake.make(fake.flat_truth(SIZES), samplers=("ddim",), guidance=(3.0,), seed=seed)
        found = curves.quality_curves(records, FD)
        family = duels.all_pairs(found, FD, SIZES, [4, 10, 50])
        p_values += [d.p_value for d in family]
        holm.append(min(d.holm for d in family) <= 0.05)
        certain += [d.probability >= 0.975 or d.probability <= 0.025 for d in family]
        assert all(d.p_value <= d.bh <= d.holm for d in family)
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.06)
    assert np.mean(certain) == pytest.approx(0.05, abs=0.02)
    assert np.mean(holm) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 150)


def test_budgets_at_which_both_do_the_same_are_one_comparison(found):
    one = duels.all_pairs(found, FD, ("c8", "c48"), [50.0, 500.0], samplers=DDIM)
    assert len(one) == 1 and one[0].budget == 50.0 and one[0].holm == one[0].p_value


def test_higher_is_better_where_the_measure_says_so():
    exact = curves.quality_curves(fake.make(noise=0.0, shared=0.0), "caption_agreement", FD)
    one = duels.duel(exact, "caption_agreement", "c48", "c8", 50.0, samplers=DDIM)
    assert one.advantage > 0 and one.probability == 1 and one.p_value == 0


def test_mistakes_are_named(found):
    with pytest.raises(UserError, match="c48 cannot meet a budget of 1 .*its least is 4"):
        duels.duel(found, FD, "c8", "c48", 1.0)
    with pytest.raises(UserError, match="c99 cannot meet.*no reported record"):
        duels.duel(found, FD, "c8", "c99", 9.0)
    for few in (1, 0):  # One has no spread.
        bare = {k: [dataclasses.replace(p, replicates_R=np.zeros(few)) for p in v]
                for k, v in found.items()}
        with pytest.raises(UserError, match="no paired replicates.*sweep.replicates"):
            duels.duel(bare, FD, "c8", "c48", 9.0)
    assert duels.difference_band(bare, FD, "c8", "c48") is None
