"""Several blocks that report: the curves, the figures, the page and the sweep take their mean, and
each configuration counts once."""

import csv
import dataclasses
import json
import re
import types

import numpy as np
import pytest

from ldm_scaling import __version__
from ldm_scaling.cli import program
from ldm_scaling.config import Study, Sweep
from ldm_scaling.errors import UserError
from ldm_scaling.study import (
    figure_cli,
    findings,
    page_advice,
    places,
    plot_style,
    publish,
    records,
    report,
)
from ldm_scaling.study import reported as reported_lib
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.statistics import claims
from ldm_scaling.study.workdir import Workdir
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
REPORT = (1, 2, 3)
MODELS, SAMPLERS = ("c8", "c16", "c32"), ("ddim", "dpmpp_2m")


@pytest.fixture(scope="module")
def found():
    return fake.make(models=MODELS, samplers=SAMPLERS, report_blocks=REPORT)


def _means(found):
    """(model, sampler, steps) -> the mean over the blocks that report."""
    out = {}
    for r in found:
        if r.identity.seed_block:
            cell = r.identity.model, r.identity.sampler, r.identity.steps
            out.setdefault(cell, []).append(r.metrics[FD])
    assert {len(v) for v in out.values()} == {len(REPORT)}
    return {cell: np.mean(v) for cell, v in out.items()}


def test_curves_hold_each_cell_once_at_its_mean(found):
    source, means = Source(found, FD, report_blocks=REPORT), _means(found)
    points = [p for curve in source.curves.values() for p in curve]
    assert {(p.model, p.sampler, p.steps): p.value for p in points} == pytest.approx(means)
    assert len(points) == len(means)
    one = Source(found, FD)
    narrower = [
        (b.all_high_P - b.all_low_P).mean() / (a.all_high_P - a.all_low_P).mean()
        for a, b in zip(one.bands.values(), source.bands.values(), strict=True)
    ]
    assert np.mean(narrower) == pytest.approx(len(REPORT) ** -0.5, rel=0.15)


def test_seconds_are_the_mean_of_what_was_timed(found):
    seconds = {cell: p.seconds for cell, p in _points(found)}
    assert {cell: p.seconds for cell, p in _points(fake.untimed(
        found, lambda i: i.seed_block == 2))} == pytest.approx(seconds)
    assert {p.seconds for _, p in _points(fake.untimed(found))} == {0.0}


def _points(found):
    curves = Source(found, FD, report_blocks=REPORT).curves
    return [((p.model, p.sampler, p.steps), p) for curve in curves.values() for p in curve]


def test_one_block_is_what_it_was(found):
    first = [r for r in found if r.identity.seed_block < 2]
    for key, points in Source(found, FD).curves.items():
        for a, b in zip(points, Source(first, FD).curves[key], strict=True):
            assert (a.value, a.low, a.high) == (b.value, b.low, b.high)
    def by_key(some):
        return {r.identity.key: r for r in some}

    assert by_key(Source(first, FD).main) == by_key(first)


def test_figures_and_page_show_the_means(tmp_path, found, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 20)
    means = _means(found)
    catalogue.write(tmp_path, Source(found, FD, report_blocks=REPORT), ["fig11", "winners"])
    with open(tmp_path / "fig11_samplers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {(r["model"], r["sampler"], int(r["steps"])): float(r["value"]) for r in rows}
    assert len(rows) == len(means) and shown == pytest.approx(means)
    told = report.Context(report_blocks=REPORT)
    page = report.write(tmp_path, found, tmp_path, told).read_text("utf-8")
    assert "anew on blocks 1, 2 and 3, with" in page
    data = _data(page)
    shown = {(p["model"], p["sampler"], p["steps"]): p["value"] for p in data["points"]
             if p["measure"] == FD}
    assert shown == pytest.approx(means, rel=1e-5)
    assert "on the choosing seed block than on the 3 that are reported" in page


def test_claims_are_surer_with_more_blocks():
    """A crossing within the noise of one block."""
    truth = fake.Truth({"c8": 44.0, "c32": 42.4}, bend=30.0)
    probability = {1: [], 6: []}
    for seed in range(6):
        found = fake.make(truth, models=("c8", "c32"), samplers=("ddim",), report_blocks=(
            1, 2, 3, 4, 5, 6), noise=0.8, seed=seed)
        for count in probability:
            source = Source(found, FD, report_blocks=tuple(range(1, count + 1)))
            third = claims.verdicts(claims.Evidence.of(source.main), FD)[2]
            probability[count].append(third.probability)
    assert np.mean(probability[6]) > np.mean(probability[1]) + 0.1


def test_the_command_takes_several(tmp_path, capsys, found, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 20)
    for r in found:
        records.write(tmp_path / "records", r)
    figure_cli.run(["fig9_cost", f"--workdir={tmp_path}", "--report-blocks=1,2,3"], None)
    with open(tmp_path / "figures" / "fig9_cost.csv", newline="") as file:
        shown = [float(row["value"]) for row in csv.DictReader(file)]
    means = {cell: v for cell, v in _means(found).items() if cell[1] == "ddim"}
    assert sorted(shown) == pytest.approx(sorted(means.values()))
    with pytest.raises(UserError, match="chosen on seed block 0 and reported on .0, 1."):
        figure_cli.run(["fig9_cost", f"--workdir={tmp_path}", "--report-blocks=0,1"], None)


def test_a_block_that_is_added_takes_nothing_away(tmp_path, capsys, found, monkeypatch):
    """Until it is measured in every cell; it is named meanwhile."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    first = [r for r in found if r.identity.seed_block < 2]
    third = [r for r in found if r.identity.seed_block == 2]
    some = [*first, *third[:3]]
    for there, kept in (
        (first, [1]), (some, [1]), ([*first, *third], [1, 2]), ([], [1, 2]),
        # None is whole: the fuller one says more.
        ([*first[:-1], *third[-1:]], [1]),
    ):
        assert reported_lib.whole(there, FD, 0, (1, 2)) == kept
    assert reported_lib.left_out((1, 2), [1, 2]) == ""
    one, two = (report.Context(report_blocks=blocks) for blocks in ((1,), (1, 2)))
    lone = report.write(tmp_path, first, tmp_path, one).read_text("utf-8")
    page = report.write(tmp_path, some, tmp_path, two).read_text("utf-8")
    assert _data(page)["points"] == _data(lone)["points"] != []
    assert page.count("Seed block 2 is not measured in every cell") >= 2 and (
        "anew on block 1, with" in page)
    Workdir(tmp_path / "own").bind(Study(sweep=Sweep(num_images=512, more_blocks=(2,))))
    for r in some:
        records.write(tmp_path / "own" / "records", r)
    figure_cli.run(["fig9_cost", f"--workdir={tmp_path}/own"], None)
    assert "fig9_cost.png" in (out := capsys.readouterr().out) and "Seed block 2 is not" in out
    none = [r for r in found if r.identity.seed_block == 0]
    assert findings.findings(none, FD)[-1].endswith("none is, so there are no curves yet.")


def test_students_are_compared_on_the_blocks_that_they_hold_too(tmp_path, monkeypatch):
    """Of members on two and students, or cascades, on one the other is left out of the page."""
    every = fake.make(models=("c8", "c16"), samplers=("ddim",), report_blocks=(1, 2), replicates=20)
    for r in every:  # The second is harder, for all.
        if r.identity.seed_block == 2:
            r.metrics[FD] += 40.0
    sweep = Sweep(num_images=512, more_blocks=(2,))
    study = Study(members=("c8", "c16"), reference="c16", sweep=sweep)
    materials = types.SimpleNamespace(
        study=study, workdir=Workdir(tmp_path), prepared=False,
        networks=types.SimpleNamespace(about=[], summary=None))
    sources = []
    monkeypatch.setattr(publish.catalogue, "write", lambda to, source: sources.append(source) or (
        catalogue.Written((), ())))
    alike = [r for r in fake.students(every, models=("c8",)) if r.identity.seed_block < 2]
    page = publish.write(materials, every, alike)
    said = re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text("utf-8"))
    assert page == str(tmp_path / "report.html") and sources[-1].report_blocks == [1]
    assert said.count("Seed block 2 is not measured in every cell") >= 2
    pairs = re.findall(r"reaches in 4 steps FD ([0-9.]+).*? against ([0-9.]+)", said)
    assert pairs and all(ours == theirs for ours, theirs in pairs)
    publish.write(materials, every, fake.students(every, models=("c8",)))
    assert sources[-1].report_blocks == [1, 2]
    assert "Seed block 2 is not" not in (tmp_path / "report.html").read_text("utf-8")


def test_an_older_setting_takes_no_block_away(tmp_path, capsys, monkeypatch):
    """Its records lack the block that was added, and are not shown."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    Workdir(tmp_path).bind(Study(sweep=Sweep(num_images=512, more_blocks=(2,))))
    every = fake.make(models=("c8",), samplers=("ddim",), report_blocks=(1, 2), replicates=20)
    older = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, model_hash="older"))
        for r in fake.students(every, models=("c8",), setting="codi_2")
        if r.identity.seed_block < 2
    ]
    for r in (*every, *older, *fake.students(every, models=("c8",))):
        records.write(tmp_path / "records", r)
    figure_cli.run(["fig13", f"--workdir={tmp_path}"], None)
    said = capsys.readouterr().out
    assert "and not codi_2" in said and "Seed block" not in said


def _data(page):
    return json.loads(re.search(
        r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_names_the_flags_that_say_the_same(found):
    """All of them: a workdir's config may name other blocks and another measure than the page's."""
    for metric, select, shown, some in (
        (FD, 0, (1,), found), ("caption_agreement", 0, REPORT, found),
        (FD, 1, (2, 3), [r for r in found if r.identity.seed_block != 0]),
    ):
        flags = ["--task=text_to_image", f"--metric={metric}", f"--select-block={select}",
                 f"--report-blocks={','.join(map(str, shown))}"]
        units = page_advice.units(some, metric, select, shown)
        assert [unit["flags"] for unit in units] == [flags] * 3


@pytest.mark.parametrize("more", [(0,), (1,), (2, 2), (-1,)])
def test_a_block_that_already_has_a_part_is_refused(more):
    with pytest.raises(UserError, match=r"sweep.more_blocks=.*each differs from the others"):
        Sweep(more_blocks=more)


def test_a_workdir_is_not_bound_to_the_blocks_that_were_added():
    study = Study(sweep=Sweep(num_images=1000))
    wider = dataclasses.replace(study, sweep=dataclasses.replace(study.sweep, more_blocks=(2,)))
    assert study.identity() == wider.identity()
    moved = dataclasses.replace(study, sweep=dataclasses.replace(study.sweep, report_block=2))
    assert study.identity() != moved.identity()
    assert wider.sweep.report_blocks == (1, 2)
    few = dataclasses.replace(wider, sweep=dataclasses.replace(wider.sweep, num_images=4))
    few.check_counts(10**6, 12)
    with pytest.raises(UserError, match="3 blocks of as many prompts need at least 12 pictures"):
        few.check_counts(10**6, 11)


@pytest.mark.parametrize("old, new, sweep", [
    ({"num_images": 16}, {"num_images": 12}, {"num_images": 12}),
    ({"num_images": 12}, {"num_images": 16}, {"num_images": 16}),
    ({"reference_hash": "a"}, {"reference_hash": "b"}, {"metrics": ("fid_clean",)}),
    ({"version": "0"}, {"version": __version__}, {}),
], ids=["fewer", "more", "measures", "version"])
def test_of_cells_measured_again_in_another_way_the_last_configs_are_taken(
    old, new, sweep, tmp_path, caplog, monkeypatch, capsys
):
    """By advice and figures, as by the page. What was measured but once stays where nothing
    clashes: a member that the last config leaves out too."""
    one = [r for r in fake.make(models=("c8", "c16"), samplers=("ddim",), replicates=20)
           if r.identity.steps < 10]

    def made(records, **way):
        beside = {"fid_clean": 1.0} if way.get("reference_hash") == "b" else {}
        return [
            dataclasses.replace(r, metrics=r.metrics | beside,
                                identity=dataclasses.replace(r.identity, **way))
            for r in records
        ]

    before, after = made(one, **old), made([r for r in one if r.identity.model == "c8"], **new)
    study = Study(members=("c8",), reference="c8", sweep=Sweep(**{"num_images": 512} | sweep))
    Workdir(tmp_path).bind(study)
    for r in before:
        records.write(tmp_path / "records", r)
    found = places.read([str(tmp_path)])
    assert len(found.records) == len(one) and not caplog.text
    for r in after:
        records.write(tmp_path / "records", r)
    found = places.read([str(tmp_path)])
    assert {r.identity.key for r in found.records} == {r.identity.key for r in after}
    assert f"cells were measured in 2 ways; taken are the {len(after)} records" in caplog.text
    monkeypatch.setattr(plot_style, "DPI", 20)
    for words in (["advise"], ["figure", "fig8", f"--to={tmp_path}/out"]):
        assert program.main([*words, f"--workdir={tmp_path}"]) == 0, capsys.readouterr().err
    # A folder of records has no last config.
    (tmp_path / "study.json").unlink()
    assert program.main(["advise", f"--workdir={tmp_path}"]) == 2
    assert "two records for c8" in capsys.readouterr().err


def _raced(model, total):
    """Each rate's first round for so many pictures, and what is reported."""
    one = [r for r in fake.make(models=(model,), samplers=("ddim",), replicates=20)
           if r.identity.steps < 10]
    full = [dataclasses.replace(r.identity, num_images=total) for r in one]
    return [
        dataclasses.replace(r, identity=i) if i.seed_block else dataclasses.replace(
            r, round=1, identity=dataclasses.replace(
                i, num_images=total // 2, reference_hash=records.raced_reference(i)))
        for r, i in zip(one, full, strict=True)
    ]


def test_a_race_for_another_number_of_pictures_is_another_way(tmp_path):
    study = Study(members=("c8",), reference="c8", sweep=Sweep(num_images=40))
    Workdir(tmp_path).bind(study)
    found, told = reported_lib.last_measured(tmp_path, [*_raced("c8", 64), *_raced("c8", 40)])
    assert {r.identity.key for r in found} == {r.identity.key for r in _raced("c8", 40)}
    assert "of 40 pictures" in told[0]


def test_what_raced_for_another_number_is_left_out_with_what_it_reports():
    """A round's distance is foretold for all pictures; where nothing tells for how many it stays,
    and so does a cell that is uneven in itself, which curves refuse."""
    whole = [*_raced("c8", 40), *_raced("c16", 40)]
    found, told = reported_lib.comparable([*whole, *_raced("c24", 80)])
    assert found == whole and told == [
        f"2 cells of c24 were measured on 80 pictures of seed block {b} and not 40, which does not "
        "compare, and left out." for b in (0, 1)]
    rounds = [r for r in _raced("c24", 80) if r.round]
    assert reported_lib.comparable([*whole, *rounds]) == ([*whole, *rounds], [])
    grid = [r for r in whole if not r.round]
    uneven = dataclasses.replace(grid[0], identity=dataclasses.replace(
        grid[0].identity, num_images=80, guidance=9.0))
    assert reported_lib.comparable([*grid, uneven]) == ([*grid, uneven], [])
