"""Curves, winners and findings against a synthetic study whose truth is known."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import curves, findings, pricing, raced, reported, winners
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.statistics import words
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
SIZES = tuple(fake.CHANNELS)


@pytest.fixture(scope="module")
def study():
    return fake.make()


@pytest.fixture(scope="module")
def exact():
    return fake.make(noise=0.0, shared=0.0)


def test_best_guidance_is_the_rate_with_the_smallest_true_distance(exact):
    truth = fake.Truth()
    choice = curves.best_guidance(exact, FD)
    assert len(choice) == 5 * (5 + 5 + 4)
    for (model, sampler, steps), guidance in choice.items():
        distance = {w: truth.distance(model, sampler, steps, w) for w in fake.GUIDANCE}
        assert guidance == min(distance, key=distance.get)


def test_best_guidance_follows_the_direction_of_the_measure(exact):
    # In this truth agreement rises with guidance everywhere.
    assert set(curves.best_guidance(exact, "caption_agreement").values()) == {max(fake.GUIDANCE)}


def test_ties_go_to_the_smaller_rate():
    tied = fake.make(fake.flat_truth(("c8",)), models=("c8",), noise=0.0, shared=0.0)
    random.Random(0).shuffle(tied)
    assert set(curves.best_guidance(tied, FD).values()) == {min(fake.GUIDANCE)}


def test_an_unknown_measure_is_named():
    with pytest.raises(UserError, match="no measure is called 'fid'.*fd_effnetlite0"):
        curves.best_guidance([], "fid")


def test_curves_are_sorted_by_cost_and_report_the_other_block(study):
    found = curves.quality_curves(study, FD)
    reported = {(r.identity.model, r.identity.sampler, r.identity.steps): r
                for r in study if r.identity.seed_block == 1}
    assert sum(map(len, found.values())) == len(reported)
    for (model, sampler), points in found.items():
        assert [p.cost for p in points] == sorted(p.cost for p in points)
        for p in points:
            record = reported[model, sampler, p.steps]
            assert p.value == record.metrics[FD]
            assert (p.low, p.high) == record.intervals[FD]
            assert p.cost == pytest.approx(record.norm_cost * p.steps)


def test_changing_the_report_block_changes_no_choice(study):
    """No double dipping: guidance, and the steps taken within a budget, ignore reported values."""
    rng = np.random.default_rng(3)
    scrambled = [
        dataclasses.replace(r, metrics={k: v * rng.uniform(0.2, 5) for k, v in r.metrics.items()})
        if r.identity.seed_block == 1 else r
        for r in study
    ]

    def choices(records):
        found = curves.quality_curves(records, FD)
        won = winners.winner_by_budget(found, FD, SIZES)
        return [[(c.model, c.point.sampler, c.point.steps, c.point.guidance)
                 for c in w.contenders] for w in won]

    assert choices(study) == choices(scrambled)


def test_reporting_on_the_other_block_removes_the_bias_of_choosing():
    """All rates are equally good: the chosen one looks too good where it was chosen only."""
    chosen, reported = [], []
    for seed in range(40):
        records = fake.make(fake.flat_truth(("c8",)), models=("c8",), noise=1.0, shared=0.0,
                            replicates=0, seed=seed)
        for points in curves.quality_curves(records, FD).values():
            chosen += [p.chosen_by for p in points]
            reported += [p.value for p in points]
    assert np.mean(chosen) < 39.2  # the expected smallest of four standard normals is -1.03
    assert np.mean(reported) == pytest.approx(40, abs=0.15)


def test_an_unfinished_sweep_gives_partial_curves_and_says_so(study):
    def is_missing(r):
        i = r.identity
        return (i.model, i.sampler) == ("c48", "ddim") and i.steps == 50 and i.seed_block == 1

    partial = [r for r in study if not is_missing(r)]
    points = curves.quality_curves(partial, FD)["c48", "ddim"]
    assert [p.steps for p in points] == [4, 6, 10, 20]
    (gap,) = curves.gaps(partial, FD)
    assert gap.cell == ("c48", "ddim", 50) and not gap.reported and gap.guidance == ()
    assert any("not complete: 1 cell" in s and "c48 DDIM 50 steps" in s
               for s in findings.findings(partial, FD))
    assert curves.gaps(study, FD) == []


def test_a_missing_guidance_rate_is_a_gap(study):
    partial = [r for r in study if not (r.identity.seed_block == 0 and r.identity.model == "c16"
                                        and r.identity.sampler == "ddpm"
                                        and r.identity.steps == 4 and r.identity.guidance == 8.0)]
    (gap,) = curves.gaps(partial, FD)
    assert gap.cell == ("c16", "ddpm", 4) and gap.guidance == (8.0,)


@pytest.mark.parametrize("records", [[], fake.make(models=("c8",), samplers=("ddim",))[:3]])
def test_next_to_no_records_are_no_error(records):
    found = curves.quality_curves(records, FD)
    assert winners.winner_by_budget(found, FD, SIZES) == []
    findings.findings(records, FD)


def test_two_records_of_one_configuration_are_refused(study):
    again = dataclasses.replace(study[0].identity, train_step=4000)
    with pytest.raises(UserError, match="they differ in train_step 2000 and 4000"):
        curves.distinct([*study, dataclasses.replace(study[0], identity=again)])


def test_two_spacings_become_two_arms(study):
    ddim = [r for r in study if r.identity.sampler == "ddim"]
    trailing = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, spacing="trailing"))
                for r in ddim]
    arms = curves.distinct(ddim + trailing)
    assert curves.samplers(arms) == ["ddim, leading", "ddim, trailing"]
    assert len(arms) == 2 * len(ddim)


@pytest.mark.parametrize("axis", ["cost", "seconds"])
@pytest.mark.parametrize("samplers", [{"ddim"}, {"ddpm"}, None])
def test_winners_without_noise_are_the_true_ones(exact, axis, samplers):
    """Brute force over the truth: nobody within the budget does better."""
    truth = fake.Truth()
    found = curves.quality_curves(exact, FD)
    names = samplers or set(fake.STEPS)
    cells = [(min(truth.distance(p.model, p.sampler, p.steps, w) for w in fake.GUIDANCE),
              p.at(axis), p.model)
             for (_, s), points in found.items() if s in names for p in points]
    won = winners.winner_by_budget(found, FD, SIZES, axis, samplers)
    assert [w.budget for w in won] == pytest.approx(sorted({x for _, x, _ in cells}))
    for w in won:
        best = min((v, m) for v, x, m in cells if x <= w.budget)
        assert (w.best.point.value, w.best.model) == (pytest.approx(best[0]), best[1])
        assert w.best.probability == 1
        assert w.complete == ({m for _, x, m in cells if x <= w.budget} == set(SIZES))


def test_a_measure_where_higher_is_better_crowns_the_highest(exact, study):
    for records in (exact, study):
        found = curves.quality_curves(records, "caption_agreement", FD)
        last = winners.winner_by_budget(found, "caption_agreement", SIZES, samplers={"ddim"})[-1]
        assert last.best.point.value == max(c.point.value for c in last.contenders)
        assert last.best.probability == max(c.probability for c in last.contenders) > 0.5
        low, high = last.advantage_interval
        assert 0 < last.advantage and low <= last.advantage <= high
    # Left to itself the measure chooses the highest rate, which is its best everywhere.
    own = curves.quality_curves(exact, "caption_agreement")
    assert not any(p.guidance != max(fake.GUIDANCE) for c in own.values() for p in c)


def test_probabilities_sum_to_one_and_follow_the_pairing(study):
    found = curves.quality_curves(study, FD)
    for w in winners.winner_by_budget(found, FD, SIZES, samplers={"ddim"}):
        assert sum(c.probability for c in w.contenders) == pytest.approx(1)
        if w.runner_up:
            low, high = w.advantage_interval
            assert low <= w.advantage <= high
            # The error that all cells share is gone from the difference.
            own = w.best.point.high - w.best.point.low
            assert high - low < own


def test_identical_arms_win_equally_often_and_rarely_for_sure():
    """Null case: five equal sizes. Averaged over studies each gets a fifth of the probability."""
    share, sure = [], 0
    for seed in range(150):
        records = fake.make(fake.flat_truth(SIZES), samplers=("ddim",), guidance=(3.0,),
                            steps={"ddim": (4, 10, 50)}, replicates=100, seed=seed)
        found = curves.quality_curves(records, FD)
        w = winners.winner_by_budget(found, FD, SIZES)[-1]
        share.append([c.probability for c in w.contenders])
        sure += w.best.probability >= words.CONFIDENCE
    np.testing.assert_allclose(np.mean(share, axis=0), 0.2, atol=0.08)
    assert sure <= 0.1 * 150


def test_exact_ties_share_the_probability():
    records = fake.make(fake.flat_truth(SIZES), samplers=("ddim",), noise=0.0)
    found = curves.quality_curves(records, FD)
    last = winners.winner_by_budget(found, FD, SIZES)[-1]
    assert [c.probability for c in last.contenders] == pytest.approx([0.2] * 5)


def test_unequal_numbers_of_replicates_are_refused(study):
    short = [dataclasses.replace(r, replicates={k: v[:50] for k, v in r.replicates.items()})
             if r.identity.model == "c8" else r for r in study]
    with pytest.raises(UserError, match="cannot be paired.*50.*200"):
        winners.winner_by_budget(curves.quality_curves(short, FD), FD, SIZES)


def test_without_replicates_there_is_a_winner_and_no_probability():
    records = fake.make(replicates=0)
    found = curves.quality_curves(records, FD)
    last = winners.winner_by_budget(found, FD, SIZES)[-1]
    assert last.best.model == "c48"
    assert last.best.probability is None and last.advantage_interval is None
    assert any("c48" in s for s in findings.findings(records, FD))


def test_a_crossing_is_found_for_every_sampler(study):
    found = curves.quality_curves(study, FD)
    cross, together = winners.crossovers(found, FD, SIZES, ["ddim", "ddpm", "dpmpp_2m"])
    assert cross["ddim"].low.complete and cross["ddim"].low.best.model != "c48"
    assert cross["ddim"].high.best.model == "c48"
    assert together <= min(c.probability for c in cross.values())


def test_a_largest_size_that_never_wins_is_named():
    floors = {m: 40.0 + 20 * k for k, m in enumerate(SIZES)}
    said = " ".join(findings.findings(fake.make(fake.Truth(floors)), FD))
    assert "The largest size, c48, wins at no budget" in said


def test_seconds_are_judged_where_they_compare_and_nothing_speaks_against_them(study):
    exact = " ".join(findings.findings(study, FD))
    assert "In measured seconds per image" in exact and "ldm-scaling cost  measures" not in exact
    uneven = [dataclasses.replace(r, seconds_per_image=3 * r.seconds_per_image)
              if r.identity.model == "c8" and r.identity.steps > 6 else r for r in study]
    doubted = " ".join(findings.findings(uneven, FD))
    assert "In measured seconds per image" not in doubted
    assert "may change places: those of c8 are not of one measurement each" in doubted
    assert "So claim 3 is judged by cost alone." in doubted
    mixed = [dataclasses.replace(r, device="a new one") if r.identity.model == "c8" else r
             for r in study]
    said = " ".join(findings.findings(mixed, FD))
    assert "In measured seconds" not in said
    assert "measured on 2 CPU cores and a new one and do not compare: claim 3 is judged by" in said
    some = " ".join(findings.findings(fake.untimed(study, lambda i: i.model == "c16"), FD))
    assert "In measured seconds per image" in some
    assert "s. 5 of 25 configurations, of c16, have no measured seconds" in some
    none = " ".join(findings.findings(fake.untimed(study), FD))
    assert "The records hold no measured seconds: claim 3 is judged by cost alone." in none


def test_one_cell_and_one_common_budget_are_said_as_such():
    one = findings.findings(fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}), FD)
    (best,) = [s for s in one if "on the reporting prompts" in s]
    assert best.startswith("The one configuration that is reported is c8") and best.count("c8") == 1
    cheap = fake.make(fake.Truth({"c8": 10.0, "c16": 90.0}, bend=0.0), models=("c8", "c16"),
                      samplers=("ddim",), steps={"ddim": (4,)})
    said = findings.findings(cheap, FD)
    assert any(s.endswith(", and is the cheapest.") for s in said)
    (winner,) = [s for s in said if "the size that is best" in s]
    assert "best at the one common budget is c8" in winner and "each budget" not in winner
    assert not any("smallest of these budgets" in s for s in said)


def test_seconds_of_one_size_change_no_places():
    uneven = [dataclasses.replace(r, seconds_per_image=r.seconds_per_image * (
        3 if r.identity.steps > 6 else 1)) for r in fake.make(models=("c8",))]
    (first, *_) = pricing.doubts(uneven)
    assert first.startswith("Seconds that are measured anew may differ: those of c8")


def test_a_workdirs_choice_leads_where_records_hold_it(study, monkeypatch, tmp_path):
    assert reported.main_metric(tmp_path, study) == FD
    for own, leads in (("caption_agreement", "caption_agreement"), ("fid_tf2015", FD)):
        monkeypatch.setattr(reported, "metric_of", lambda *_, own=own: own)
        assert reported.main_metric(tmp_path, study) == leads


def test_pairs_of_sizes_are_compared_as_one_family(study):
    said = " ".join(findings.findings(study, FD))
    assert "Smallest against largest: At a budget of 4.00 (cost) c8 (50 steps) beats c48" in said
    assert "comparisons of two sizes at equal budgets with DDIM" in said
    equal = fake.make(fake.flat_truth(SIZES), guidance=(3.0,), seed=3)
    assert ", 0 differ for sure" in " ".join(findings.findings(equal, FD))
    assert "Smallest against" not in " ".join(findings.findings(fake.make(replicates=0), FD))


def test_of_a_race_the_last_rounds_are_compared():
    """A rate that was dropped early has few images; its distance counts for nothing."""
    records = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, noise=0.0)

    def at(r, images, number, value):
        identity = dataclasses.replace(r.identity, num_images=images)
        return dataclasses.replace(r, identity=identity, round=number, metrics={FD: value})

    block = [r for r in records if r.identity.seed_block == 0]
    raced = [at(r, 20, 1, 10.0 + k) for k, r in enumerate(block)]
    raced += [at(r, 60, 2, 30.0 - k) for k, r in enumerate(block[1:3])]
    (rate,) = curves.best_guidance(raced, FD).values()
    assert rate == block[2].identity.guidance
    kept = curves.distinct(raced)
    assert sorted(r.identity.num_images for r in kept) == [20, 20, 60, 60]
    assert len({r.identity.guidance for r in kept}) == 4


def test_a_race_is_won_against_what_did_not_race_by_values_alone():
    """The rates of a cell that stands are compared by what was foretold of as many pictures."""
    records = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, noise=0.0)
    block = [r for r in records if r.identity.seed_block == 0]
    last = raced._at(block[0].identity, 60)
    won = dataclasses.replace(block[0], identity=last, round=2, metrics={FD: 10.0})
    (rate,) = curves.best_guidance([won, *block[1:]], FD).values()
    assert rate == last.guidance


def test_rates_of_one_cell_are_of_one_number_of_images():
    """A distance is larger with fewer images: a rate that was added with more is no better one."""
    cell = {"models": ("c8",), "samplers": ("ddim",), "steps": {"ddim": (4,)}}
    added = fake.make(guidance=(30.0,), num_images=1024, **cell)
    with pytest.raises(UserError, match="guidance 1.5 was measured on 512 images and 30 on 1,024"):
        curves.distinct([*fake.make(**cell), *added])
    # Values decide, whatever was drawn for them: not the number.
    (rate,) = curves.best_guidance([*fake.make(**cell), *added], FD).values()
    assert rate != 30


def test_of_two_races_and_none_what_drew_most_counts():
    """A sweep that was raced by other rounds, or begun as a race, is no clash; two of other numbers
    of pictures are one, whose files are named."""
    one = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, num_images=256)[0]

    def at(images, number, of=one):
        return dataclasses.replace(of, round=number, identity=raced._at(of.identity, images))

    rounds = [at(32, 1), at(64, 1), at(64, 2)]
    for some in (rounds, rounds[::-1]):
        (kept,) = curves.distinct(some)
        assert (kept.identity.num_images, kept.round) == (64, 2)
        assert curves.distinct([*some, one]) == [one]
    larger = dataclasses.replace(
        one, identity=dataclasses.replace(one.identity, num_images=512))
    two = [one, larger]
    with pytest.raises(UserError, match="reference_hash"):
        curves.distinct([at(64, 1), at(64, 1, larger)])
    with pytest.raises(UserError) as told:
        curves.distinct(two)
    assert all(f"{r.identity.key}.json" in str(told.value) for r in two)


def test_another_measure_is_of_the_rates_that_are_reported(exact):
    """Those that the sweep chose by, where few are the best by the measure itself."""
    chooser, found = curves.chosen_curves(exact, "caption_agreement", "caption_agreement")
    cells = {(p.model, p.sampler, p.steps): p for c in found.values() for p in c}
    best = curves.best_guidance(exact, FD)
    assert chooser == FD and {cell: p.guidance for cell, p in cells.items()} == best
    assert len(Source(exact, "caption_agreement").bands) == len(found)
    at = {(r.identity.model, r.identity.sampler, r.identity.steps, r.identity.guidance): r
          for r in exact if r.identity.seed_block == 0}
    for cell, p in cells.items():
        assert p.chosen_by == -at[*cell, p.guidance].metrics["caption_agreement"]
    assert curves.chosen_curves(exact, FD, FD)[0] == FD


def test_a_trade_off_that_is_none_is_not_called_one(exact):
    turned = [dataclasses.replace(r, metrics=r.metrics | {
        "caption_agreement": -r.metrics["caption_agreement"]}) for r in exact]
    text = " ".join(findings.findings(turned, FD))
    assert "does not trade the measures" in text
    assert "raises caption agreement in 0 of 70 cells, and lowers it by" in text


def test_the_sentences_follow_the_numbers(exact):
    said = findings.findings(exact, FD)
    text = " ".join(said)
    # In this truth the best rate falls as steps grow, and agreement rises with guidance.
    assert "As steps increase, the best guidance rate falls" in text
    assert "raises caption agreement in 70 of 70 cells" in text
    best = min((p for c in curves.quality_curves(exact, FD).values() for p in c),
               key=lambda p: p.value)
    assert f"is {best.model} with" in text and f"{best.steps} steps" in text
    rising = fake.make(dataclasses.replace(fake.Truth(), dish=0.0), noise=0.5, shared=0.0)
    assert "shows no common trend" in " ".join(findings.findings(rising, FD))


def test_one_guidance_rate_has_no_trend_and_rates_that_stay_do_not_move():
    def said(truth, *rates):
        study = fake.make(truth, samplers=("ddim",), guidance=rates, noise=0.0, replicates=0)
        return [s for s in findings.findings(study, FD) if s.startswith("As steps increase")]

    class Same(fake.Truth):
        def best_rate(self, steps):
            return 3.0

    assert said(fake.Truth(), 3.0) == []
    (line,) = said(Same(), 3.0, 8.0)
    assert "best guidance rate does not move: " in line
    assert "falls in 0, rises in 0 and stays in 5 of 5 series" in line
