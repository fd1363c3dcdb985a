"""Sizes that were trained several times: the mean of their runs, what intervals cover, and which
records there are."""

import csv
import dataclasses

import numpy as np
import pytest

from ldm_scaling import config
from ldm_scaling.config import Start, Study, Sweep, Train, repeats
from ldm_scaling.errors import UserError
from ldm_scaling.study import (
    advice,
    curves,
    findings,
    labels,
    options,
    plot_style,
    records,
    repeated,
    students,
    subject,
)
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.statistics import blocks, duels, trends
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
SIZES = ("c8", "c16", "c24", "c32")


def made(runs=3, luck=0.02, seed=0, models=SIZES, select=True, **values):
    base = fake.make(models=SIZES, samplers=("ddim",), seed=seed, **values)
    return fake.trained_again(base, runs, luck, seed=seed, models=models, select=select)


def test_values_are_means_over_runs_of_what_is_reported():
    every = made()
    merged = {r.identity: r for r in repeated.merged(every)}
    assert merged.keys() == {r.identity for r in every if not r.repeats}
    for i, r in merged.items():
        own = [o for o in every if dataclasses.replace(o.identity, model_hash="") ==
               dataclasses.replace(i, model_hash="")]
        assert r.runs == len(own) in (1, 3)
        if r.runs == 3:
            assert r.metrics[FD] == pytest.approx(np.mean([o.metrics[FD] for o in own]))
            assert r.seconds_per_image == own[0].seconds_per_image
        if i.seed_block:
            assert r.runs == 3 and r.intervals[FD][0] < r.metrics[FD] < r.intervals[FD][1]
    again = repeated.merged(list(merged.values()))
    assert again == list(merged.values())
    assert curves.distinct(every) == list(merged.values())


def test_on_the_block_that_chose_all_rates_of_a_cell_move_together():
    """So the rate that was chosen stays the best, and cells of two sizes compare by their means."""
    every = made(luck=0.2)
    firsts = [r for r in every if not r.repeats]
    for r, m in zip(firsts, repeated.merged(every), strict=True):
        if r.identity.seed_block == 0:
            chosen = [(x.metrics[FD], y.metrics[FD]) for x, y in zip(
                firsts, repeated.merged(every), strict=True) if y.runs == 3 and
                repeated._beside(x) == repeated._beside(r)]
            assert m.metrics[FD] / r.metrics[FD] == pytest.approx(chosen[0][1] / chosen[0][0])
    assert curves.best_guidance(repeated.merged(every), FD) == curves.best_guidance(firsts, FD)
    # After a race further runs have nothing there.
    alone = repeated.merged(made(luck=0.2, select=False))
    assert [r.metrics for r in alone if not r.identity.seed_block] == [
        r.metrics for r in firsts if not r.identity.seed_block]


@pytest.mark.parametrize(("runs", "models"), [(2, SIZES), (3, SIZES), (3, ("c8", "c16"))])
def test_intervals_cover_what_another_run_may_be(runs, models):
    """Those of one run hold the truth in a third of the cases; those of sizes that were trained
    once too, by the luck of the others."""
    truth, held, alone, differences = fake.Truth(), [], [], []
    for seed in range(40):
        every = made(runs, seed=seed, models=models, shared=0.3, noise=0.2)
        found = curves.quality_curves(curves.distinct(every), FD)
        once = curves.quality_curves([r for r in every if not r.repeats], FD)
        for own, out in ((found, held), (once, alone)):
            out += [p.low <= truth.distance(p.model, p.sampler, p.steps, p.guidance) <= p.high
                    for curve in own.values() for p in curve]
        one = duels.duel(found, FD, "c8", "c32", 10)
        a, b = (truth.distance(p.model, p.sampler, p.steps, p.guidance) for p in (one.a, one.b))
        differences.append(one.low <= b - a <= one.high)
    assert np.mean(held) > 0.9 > 0.6 > np.mean(alone)
    assert np.mean(differences) > 0.85


def test_luck_has_the_covariance_of_the_runs():
    """Of a size's mean over cells, as the runs of all sizes scatter: divided by its own number."""
    every = made(3, luck=0.02, shared=0.0, noise=1e-9, replicates=4000, models=("c8", "c16", "c24"))
    merged = curves.quality_curves(curves.distinct(every), FD)
    runs: dict[str, dict[tuple, float]] = {}
    for r in every:
        if r.identity.seed_block and r.identity.model in ("c8", "c16", "c24"):
            cell = r.identity.model, r.identity.steps
            runs.setdefault(r.identity.model_hash, {})[cell] = np.log(r.metrics[FD])
    steps = fake.STEPS["ddim"]
    deviations = []
    for model in ("c8", "c16", "c24"):
        own = np.array([[run[model, n] for n in steps] for run in runs.values()
                        if (model, 4) in run])
        deviations += list(own - own.mean(axis=0))
    cov = np.array(deviations).T @ np.array(deviations) / 6
    for model, n in (("c8", 3), ("c32", 1)):
        drawn = np.log(np.array([p.replicates_R for p in sorted(
            merged[model, "ddim"], key=lambda p: p.steps)]))
        # Student's t with 6 degrees of freedom has 6/4 of the normal's variance.
        np.testing.assert_allclose(np.cov(drawn), cov / n * 6 / 4, rtol=0.2, atol=2e-6)


def test_one_size_trained_twice_says_nothing_of_another_run():
    every = made(2, models=("c8",))
    for r in repeated.merged(every):
        if r.identity.seed_block:
            own = [o for o in every if o.identity.model == r.identity.model and
                   repeated._place(o) == repeated._place(r)]
            np.testing.assert_allclose(
                r.replicates[FD], np.mean([o.replicates[FD] for o in own], axis=0))
    assert "do not say how far another would be" in repeated.words(repeated.merged(every))


def test_without_replicates_there_are_means_alone():
    every = [dataclasses.replace(r, replicates={}, intervals={}) for r in made(2)]
    assert "4 degrees" not in (said := repeated.words(repeated.merged(every)))
    assert said.startswith("c8, c16, c24 and c32 were trained 2 times") and "no replicates" in said


def test_few_images_stay_few_where_there_is_luck():
    """Intervals are never narrower for having been trained again, and nothing widens them twice."""
    every = made(2, luck=1e-9, num_images=8)
    lucky, plain = (curves.quality_curves(repeated.merged(every, luck), FD)
                    for luck in (True, False))
    for key, curve in lucky.items():
        for a, b in zip(curve, plain[key], strict=True):
            assert a.high - a.low > 0.9 * (b.high - b.low)
            assert (a.freedom, b.freedom) == (np.inf, 7)


def test_measures_that_may_be_0_or_below_scatter_by_differences():
    every = [dataclasses.replace(
        r, metrics={"kd_effnetlite0": r.metrics[FD] - 60},
        replicates={"kd_effnetlite0": [v - 60 for v in r.replicates[FD]]} if r.replicates else {},
        intervals={}) for r in made(3)]
    merged = [r for r in repeated.merged(every) if r.identity.seed_block]
    widths = [np.diff(r.intervals["kd_effnetlite0"]) for r in merged]
    assert np.isfinite(widths).all() and min(widths) > 0
    found = repeated.spread(every, "kd_effnetlite0")
    assert not found.relative and found.sd > 0.1


def test_blocks_and_runs_are_pooled_in_either_order():
    every = made(report_blocks=(1, 2))
    one = blocks.pooled(curves.distinct(every), 0, [1, 2])
    other = curves.distinct(blocks.pooled(every, 0, [1, 2]))
    assert [r.identity for r in one] == [r.identity for r in other]
    for a, b in zip(one, other, strict=True):
        assert a.metrics[FD] == pytest.approx(b.metrics[FD])
        np.testing.assert_allclose(a.replicates.get(FD, []), b.replicates.get(FD, []), rtol=0.01)


def test_a_cell_of_which_a_run_is_missing_is_the_mean_of_the_others():
    every = made(3)
    lost = next(r for r in every if r.repeats and r.identity.seed_block)
    merged = repeated.merged([r for r in every if r is not lost])
    found = {r.runs for r in merged if repeated._place(r) == repeated._place(lost)}
    assert found == {2}
    assert not np.isnan([r.metrics[FD] for r in merged]).any()


def along(records, step=1000):
    """The same records at a step before the end, of first runs."""
    return [dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=step))
            for r in records if not r.repeats]


def test_checkpoints_along_training_move_with_the_mean():
    """Else the end, which is a mean, would differ from what the first run had before it."""
    every = made(3, luck=0.2)
    found = {r.identity: r for r in repeated.merged([*every, *along(every)], luck=False)}
    for i, r in found.items():
        end = found[dataclasses.replace(i, train_step=2000)]
        assert r.metrics[FD] == pytest.approx(end.metrics[FD])
        if i.train_step == 1000 and i.seed_block:
            low, high = r.intervals[FD]
            assert low < r.metrics[FD] < high
            # Of the same prompts: the mean of three paired runs is about as sure as one.
            np.testing.assert_allclose(np.mean(r.replicates[FD]), np.mean(end.replicates[FD]),
                                       rtol=0.02)


def test_students_are_held_against_the_run_that_taught_them():
    every = made(3, luck=0.2)
    copies = [dataclasses.replace(
        r, task="consistency", setting="codi_1", identity=dataclasses.replace(
            r.identity, sampler="codi", model_hash=f"student of {r.identity.model_hash}"))
        for r in every if not r.repeats and r.identity.seed_block]
    said = students.sentences([*every, *copies], FD, 0, [1])
    assert len(said) == 4 and all("probability 0.50" in line or "leave open" in line
                                  for line in said)
    assert said == students.sentences([*repeated.first_runs(every), *copies], FD, 0, [1])
    # Beside members they have the luck of one run.
    own = {r.identity.model_hash: r for r in repeated.merged([*every, *copies])
           if r.identity.seed_block and r.identity.model == "c8" and r.identity.steps == 10}
    one, other = own["c8-hash"], own["student of c8-hash"]
    assert np.diff(other.intervals[FD]) > 1.2 * np.diff(one.intervals[FD])


def test_figures_claims_and_advice_are_of_the_same_numbers():
    every = made(2, luck=0.1)
    whole = {(r.identity.model, r.identity.steps): r for r in repeated.merged(every)
             if r.identity.seed_block}
    source = Source(every, FD)
    for (model, _), curve in source.curves.items():
        for p in curve:
            assert [p.low, p.high] == pytest.approx(whole[model, p.steps].intervals[FD])
    for network in trends.networks(source.of_task("text_to_image"), FD):
        assert network.point.low == pytest.approx(
            whole[network.model, network.point.steps].intervals[FD][0])
    # Compute's line has the scatter between sizes, and luck not twice.
    once, means = (trends.training(some, FD) for some in (
        repeated.first_runs(every), repeated.merged(every, luck=False)))
    assert trends.training(every, FD) == means != once


def test_more_runs_are_the_remedy_for_luck():
    both = "c8", "c16"
    every = made(3, luck=0.3, noise=0.01, shared=0.01, report_blocks=(1, 2))
    found = advice.advise(options.of_records(
        [r for r in every if r.identity.model in both], "cost", report_blocks=(1, 2)),
        Budget(3.0, "cost"))
    (said,) = [note for note in found.notes if "within noise" in note]
    half = (found.duel.high - found.duel.low) / 2
    assert f"by {labels.number(half)}. More runs" in said and "--config.repeats" in said


def test_what_is_said_of_runs():
    every = made(3, luck=0.02, models=("c8", "c16", "c24"))
    merged = repeated.merged(every)
    assert repeated.words(merged) == (
        "c8, c16 and c24 were trained 3 times; c32 was trained once: values are means over runs, "
        "and intervals and probabilities cover the chance of another run (6 degrees of freedom, "
        "all sizes together).")
    assert repeated.words([r for r in every if not r.repeats]) == ""
    (said,) = findings.between_runs(every, FD)
    assert "FD differs by 2" in said and "by 6 further runs of 3 sizes" in said
    assert findings.between_runs(merged, FD) == []
    found = advice.advise(options.of_records(every, "cost"), Budget(3.0, "cost"))
    assert any("3 times" in note for note in found.notes)
    assert not any("do not cover" in note for note in found.notes)


def test_the_figure_has_every_run(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 20)
    every = made(3, models=("c8", "c16"))
    assert catalogue.write(tmp_path, Source(every, FD), ["runs"]).names == ("runs",)
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * (3 + 3 + 1 + 1)
    for key in {(row["model"], row["steps"]) for row in rows}:
        own = [row for row in rows if (row["model"], row["steps"]) == key]
        mean = np.mean([float(row[f"{FD}_of_run"]) for row in own])
        assert [float(row["value"]) for row in own] == pytest.approx([mean] * len(own))
    once = [r for r in every if not r.repeats]
    assert catalogue.write(tmp_path, Source(once, FD), ["runs"]).names == ()


@pytest.mark.parametrize("sizes", [SIZES, tuple(fake.CHANNELS)])
def test_laws_are_drawn_of_sizes_that_were_trained_several_times(tmp_path, monkeypatch, sizes):
    """By as many parameters as of sizes that were trained once: runs tell no more of them."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    base = fake.make(models=sizes, samplers=("ddim",))
    every = fake.trained_again(base, 3, 0.02, models=sizes)
    losses = fake.training(sizes)
    further = {f"{m}_run{k}": [[step, a, b and b * (1 + 0.01 * k)] for step, a, b in losses[m]]
               for m in sizes for k in (1, 2)}
    names = ["law_compute", "law_size", "law_largest"]
    drawn = {}
    for folder, source in (("once", Source(base, FD, loss_curves=losses)),
                           ("again", Source(every, FD, loss_curves=losses | further))):
        assert set(catalogue.write(tmp_path / folder, source, names).names) == {*names}
        with open(tmp_path / folder / "law_size.csv", newline="") as file:
            drawn[folder] = list(csv.DictReader(file))
    assert [("E" in rows[0]) for rows in drawn.values()] == [len(sizes) > 4] * 2
    own = [row for row in drawn["again"] if row["measure"] == "validation_loss"]
    assert sorted({row["run"] for row in own}) == ["0", "1", "2"]


def test_records_say_which_network_they_repeat(tmp_path):
    (first, *_, last) = made(2)
    for r in (first, last):
        records.write(tmp_path, r)
    assert '"repeats"' not in records.path_of(tmp_path, first.identity.key).read_text()
    assert {r.identity: r for r in records.read_all(tmp_path)} == {
        r.identity: r for r in (first, last)}
    with pytest.raises(ValueError, match="mean of 2"):
        records.write(tmp_path, dataclasses.replace(first, runs=2))


# --- the config, and what is measured -----------------------------------------------------------

STUDY = Study(members=("c8", "c16"), repeats=3, train=Train(steps=9, warmup_steps=2),
              sweep=Sweep(samplers=("ddim",), steps=(2, 4), guidance=(1.5, 3.0), num_images=16))


def test_runs_have_names_and_seeds_of_their_own():
    assert STUDY.trained == ("c8", "c16", "c8_run1", "c16_run1", "c8_run2", "c16_run2")
    assert [STUDY.seed_of(name) for name in STUDY.trained] == [0, 0, 1, 1, 2, 2]
    assert dataclasses.replace(STUDY, seed=2**32 - 1).seed_of("c8_run2") == 1
    mine = dataclasses.replace(STUDY, members=("mine_run2",), repeats=1)
    assert (mine.seed_of("mine_run2"), mine.run_of("mine_run2")) == (0, ("mine_run2", 0))
    for name in ("c8", "c8_run12", "c24_s16_run1", "x_run0", "_run1"):
        assert repeats.name(*repeats.parse(name)) == name
    # Runs can be added to a workdir, and leave the networks that are there what they were.
    once = dataclasses.replace(STUDY, repeats=1)
    assert once.identity() == STUDY.identity()
    assert subject.of_member(once, "c8") == subject.of_member(STUDY, "c8")
    hashes = {subject.of_member(STUDY, name).hash for name in STUDY.trained}
    assert len(hashes) == 6


@pytest.mark.parametrize(("changed", "told"), [
    ({"repeats": 0}, "repeats=0: each member is trained once"),
    ({"weights": "sd", "members": ("c8",)}, "repeats=3: with weights='sd'"),
    ({"start": Start(workdir="elsewhere")}, "repeats=3: with start.workdir='elsewhere'"),
    ({"members": ("c8", "c8_run1")}, "c8_run1 reads as a further run"),
])
def test_what_cannot_be_repeated_is_told(changed, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(STUDY, **changed)
    assert config.default().repeats == 1


def test_further_runs_are_measured_at_the_rates_that_the_first_chose():
    """On the block that chose too; not where rates raced, whose last rounds have fewer pictures."""
    one = subject.of_member(STUDY, "c8")
    grid = subject.selection(one, "r")
    cells = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (2, 4)})
    value = {(i.steps, i.guidance): r.metrics for r in cells for i in [r.identity]}
    chosen = [dataclasses.replace(
        cells[0], identity=i, metrics=value[i.steps, 1.5 if i.guidance == 1.5 else 8.0])
        for i in grid]
    rates = curves.best_guidance(chosen, FD)
    for strategy, on in (("grid", [0, 1]), ("racing", [1])):
        study = dataclasses.replace(STUDY, sweep=dataclasses.replace(
            STUDY.sweep, strategy=strategy, num_images=64))
        again = subject.of_member(study, "c8_run2")
        assert (again.network, again.model, again.first_run) == (
            "c8_run2", "c8", subject.of_member(study, "c8"))
        assert subject.selection(again, "r") == []
        found = subject.reporting(again, "r", chosen)
        assert [(i.seed_block, i.steps, i.guidance) for i in found] == [
            (block, n, rates["c8", "ddim", n]) for block in on for n in (2, 4)]
        assert {i.model_hash for i in found} == {again.hash} != {one.hash}
        assert len(subject.planned(again)) == len(found)
