"""Figures from records: the numbers beside each are the records', the planted truth is in them,
and what lacks records is said in a line and not drawn."""

from __future__ import annotations

import csv
import dataclasses
import json
import random

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import pictures
from ldm_scaling.cli import program
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import baselines, places, plot_style, records, report
from ldm_scaling.study.baselines import Baselines
from ldm_scaling.study.figures import beside, catalogue, compute, downstream, family, guidance
from ldm_scaling.study.figures.source import Source
from tests.study import paper_records as paper

SIZES = ("39m", "223m", "866m")
SMALL = {"sizes": SIZES, "samplers": ("ddim", "dpmpp_2m"), "steps": (4, 20, 50),
         "rates": (2.0, 4.0, 6.0)}
# See test_scaling, test_families, test_cascaded, test_repeated.
NEED_MORE = {"law_isoflop", "law_largest", "families", "cascade_cost", "cascade_split", "runs"}
NEED_OTHER_TASKS = {"fig4_super", "fig17_super", "fig12_super", "fig6_dreambooth",
                    "fig13_distilled", "fig19_guided"}


def _tasks(**noise):
    return [*paper.super_resolution(SIZES, **noise), *paper.distilled(SIZES, **noise),
            *paper.guided(("39m", "223m"), **noise), *paper.dreambooth(SIZES, **noise)]


@pytest.fixture(scope="module")
def main():
    return paper.grid(**SMALL)


@pytest.fixture(scope="module")
def everything(main):
    return [*main, *paper.checkpoints(SIZES), *_tasks()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, everything):
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_style, "DPI", 40)
        written = catalogue.write(folder, Source(
            everything, paper.FID, loss_curves=paper.losses(SIZES),
            images=paper.images(SIZES, n=2, side=8), captions=paper.CAPTIONS[:2]))
    return folder, written


def _rows(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_is_drawn_in_every_format(drawn):
    folder, written = drawn
    assert {line.split(" needs ")[0] for line in written.skipped} == NEED_MORE
    starts = [e.name for e in catalogue.FIGURES if e.name not in NEED_MORE]
    assert all(any(n == s or n.startswith(f"{s}_") for n in written.names) for s in starts)
    assert {p.name for p in folder.iterdir()} == {".parts", *(
        f"{n}.{k}" for n in written.names for k in ("png", "svg", "pdf", "csv"))}
    for name in written.names:
        with Image.open(folder / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert len(_rows(folder, name)) > 0


def test_numbers_are_exactly_the_records(drawn, everything):
    """Every value, interval and cost of every CSV is found in a record, to the last bit."""
    folder, written = drawn
    place = {}
    for r in everything:
        i = r.identity
        key = i.model, i.sampler, i.steps, i.guidance
        for name, value in r.metrics.items():
            place[*key, name, value] = r
    checked = dict.fromkeys(written.names, 0)
    for name in written.names:
        for row in _rows(folder, name):
            if not row.get("value"):
                continue
            rate = float(row.get("guidance") or row["best_guidance"])
            value = float(row["value"])
            r = place[row["model"], row["sampler"], int(row["steps"]), rate, row["measure"], value]
            if "low" in row:
                low, high = r.intervals[row["measure"]]
                assert (float(row["low"]), float(row["high"])) == (low, high)
                assert float(row["cost"]) == r.cost
                assert float(row["seconds"]) == r.seconds_per_image
            assert int(row["images"]) == r.identity.num_images
            checked[name] += 1
    without = {"tab1_family", "tab1_cost", "tradeoff", "training", "law_compute", "law_size"}
    assert {n for n, count in checked.items() if not count} == without
    for row in _rows(folder, "tab1_family"):
        key = row["model"], row["sampler"], int(row["steps"]), float(row["guidance"])
        r = place[*key, paper.FID, float(row[paper.FID])]
        assert float(row[paper.CLIP]) == r.metrics[paper.CLIP]
        assert (float(row["gflops"]), int(row["params"])) == (r.gflops, r.params)
        assert (float(row[f"{paper.FID}_low"]), float(row[f"{paper.FID}_high"])
                ) == r.intervals[paper.FID]
    mine = {r.identity.model: r for r in everything if r.task == "text_to_image"}
    for row in _rows(folder, "tab1_cost"):
        if row["source"] == "this study, counted by XLA":
            r = mine.pop(row["model"])
            assert (float(row["gflops"]), float(row["norm_cost"])) == (r.gflops, r.norm_cost)
            assert float(row["params_M"]) == r.params / 1e6
        printed = zoo.MEMBERS[row["model"]].published
        if row["source"] == "Table 1":
            assert (float(row["gflops"]), float(row["norm_cost"])) == (
                printed.gflops, printed.norm_cost)
        # Only the misprint is far from what its own row says.
        due = printed.norm_cost * zoo.MEMBERS["866m"].published.gflops
        assert (row["misprint"] == "True") == (float(row["gflops"]) < 0.8 * due)
    assert not mine
    for row in _rows(folder, "tradeoff"):
        key = row["model"], row["sampler"], int(row["steps"]), float(row["guidance"])
        r = place[*key, paper.FID, float(row[paper.FID])]
        assert float(row[paper.CLIP]) == r.metrics[paper.CLIP]
    losses = {(m, step): (a, b) for m, some in paper.losses(SIZES).items() for step, a, b in some}
    rows = _rows(folder, "training")
    assert len(rows) == len(losses)
    for row in rows:
        loss, held_out = losses[row["model"], int(row["step"])]
        assert float(row["train_loss"]) == loss
        assert row["validation_loss"] == ("" if held_out is None else repr(held_out))


def test_no_cell_is_left_out(drawn):
    folder, _ = drawn
    cells = len(SIZES) * len(SMALL["steps"])
    assert len(_rows(folder, "fig9_cost")) == cells
    assert len(_rows(folder, "fig11_samplers")) == 2 * cells
    assert len(_rows(folder, "fig7_guidance")) == 2 * cells
    assert len(_rows(folder, "fig8_guidance_ddim")) == cells * len(SMALL["rates"])
    # Checkpoints and the end of training, FID and CLIP.
    assert len(_rows(folder, "fig3_compute")) == 2 * len(SIZES) * (len(paper.CHECKPOINTS) + 1)
    parts = {row["panel"] for row in _rows(folder, "fig12_super")}
    assert parts == {"4 to 20 steps", "50 to 250 steps"}
    stages = [(row["model"], row["student_steps"], row["steps"])
              for row in _rows(folder, "fig19_guided") if row["network"] == "distilled"]
    assert sorted(stages) == sorted(
        (r.identity.model, str(r.student_steps), str(r.identity.steps))
        for r in paper.guided(("39m", "223m"))
    )
    panels = [(row["panel"], row["network"]) for row in _rows(folder, "fig13_distilled")]
    assert panels.count(("size", "distilled")) == panels.count(("cost", "distilled")) == len(SIZES)
    assert panels.count(("cost", "undistilled")) == cells


def test_bands_hold_their_points(drawn):
    folder, _ = drawn
    for name in ("fig9_cost", "fig11_samplers", "fig3_compute", "fig12_super", "fig13_distilled"):
        for row in _rows(folder, name):
            if row.get("panel") == "cost":  # Of single points, and dashed curves.
                continue
            assert float(row["band_low"]) < float(row["value"]) < float(row["band_high"])


def test_the_planted_truth_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 20)
    exact = {"noise": 0.0, "shared": 0.0}
    found = [*paper.grid(**SMALL | {"rates": paper.GUIDANCE}, **exact), *_tasks(**exact)]
    catalogue.write(tmp_path, Source(found, paper.FID), ["fig7", "fig13", "fig10"])
    for row in _rows(tmp_path, "fig7_guidance"):
        true = {w: paper.fid(row["model"], row["sampler"], int(row["steps"]), w)
                for w in paper.GUIDANCE}
        best = min(true, key=true.get)
        near = [w for w, v in true.items() if v <= 1.01 * true[best]]
        assert float(row["best_guidance"]) == best
        assert (float(row["near_low"]), float(row["near_high"])) == (min(near), max(near))
    ratios = [row["speed_up"] for row in _rows(tmp_path, "fig13_distilled")
              if (row["panel"], row["network"]) == ("size", "distilled")]
    # 20 undistilled steps and no fewer are as good as 4... a hair better, so 20 / 4.
    assert [float(ratio) for ratio in ratios] == pytest.approx([5.0] * len(SIZES))


def test_what_lacks_records_is_a_line_and_no_picture(tmp_path, main, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 20)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    written = catalogue.write(tmp_path, Source(main, paper.FID))
    lacking = NEED_OTHER_TASKS | NEED_MORE | {"fig10_images", "training"}
    assert {line.split(" needs ")[0] for line in written.skipped} == lacking
    assert all("records" in line or "workdir" in line for line in written.skipped)
    assert all("\n" not in line for line in written.skipped)
    assert not [p for p in tmp_path.iterdir() if p.stem in lacking]


def test_a_task_survives_the_file_and_none_is_text_to_image(tmp_path, main):
    one, = paper.guided(("39m",))[:1]
    for r in (one, main[0]):
        records.write(tmp_path, r)
        assert records.read(records.path_of(tmp_path, r.identity.key)) == r
    path = records.path_of(tmp_path, main[0].identity.key)
    payload = json.loads(path.read_text())
    del payload["task"]  # As records were before tasks had names.
    path.write_text(json.dumps(payload))
    assert records.read(path) == main[0]
    with pytest.raises(UserError, match="task is 'sr': use one of text_to_image"):
        dataclasses.replace(one, task="sr")


def test_other_tasks_do_not_enter_the_main_curves(main, everything):
    few, all_of_them = Source(main, paper.FID), Source(everything, paper.FID)
    assert few.curves.keys() == all_of_them.curves.keys()
    for key, points in few.curves.items():
        assert [p.value for p in points] == [p.value for p in all_of_them.curves[key]]


def test_guidance_is_never_chosen_where_it_is_reported(main):
    """Text-to-image records of the report block alone give no curve; those of a task without
    guidance do; those with a choice of rates are refused."""
    reported = [r for r in main if r.identity.seed_block == 1]
    assert Source(reported, paper.FID).curves == {}
    source = Source(_tasks(), paper.FID)
    assert source.blocks(source.of_task("consistency")) == (1, 1)
    two = source.of_task("consistency")
    two += [dataclasses.replace(r, identity=dataclasses.replace(r.identity, guidance=2.0))
            for r in two]
    with pytest.raises(UserError, match=r"guidance \[1.0, 2.0\] on seed block 1 alone"):
        source.blocks(two)


def test_pictures_are_those_of_the_chosen_rate_whatever_its_arm_is_called(tmp_path, main):
    """A rate that was chosen once lies beside the one that is now; a sampler of two spacings has
    files of its own name."""
    source = Source(main, paper.FID)
    choice = {(p.model, p.sampler, p.steps): p.guidance for c in source.curves.values() for p in c}
    other = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, guidance=9.0))
        for r in main if r.identity.seed_block == 1
    ]
    trailing = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, spacing="trailing"))
        for r in main if r.identity.sampler == "ddim"
    ]
    for r in (*main, *other, *trailing):
        shade = int(10 * r.identity.guidance) + 100 * (r.identity.spacing == "trailing")
        pictures.save_png(tmp_path / f"{r.identity.key}.png", np.full((4, 8, 3), shade, np.uint8))
    found = beside.strips([tmp_path], Source([*main, *other], paper.FID))
    assert {cell: int(images[0, 0, 0, 0]) for cell, images in found.items()} == {
        cell: int(10 * rate) for cell, rate in choice.items()}
    nowhere = tmp_path / "nowhere"
    found = beside.strips([nowhere, tmp_path], Source([*main, *trailing], paper.FID))
    assert {s for _, s, _ in found} == {"dpmpp_2m", "ddim, leading", "ddim, trailing"}
    for (model, sampler, steps), images in found.items():
        rate = choice[model, sampler.partition(",")[0], steps]
        assert images[0, 0, 0, 0] == int(10 * rate) + 100 * sampler.endswith("trailing")


def test_rates_of_0_have_colours(main):
    """Where the best one is none, or negative, there are no logarithms of rates."""
    rates = {2.0: 0.0, 4.0: -1.0, 6.0: 3.0}
    moved = [dataclasses.replace(r, identity=dataclasses.replace(
        r.identity, guidance=rates[r.identity.guidance])) for r in main]
    assert guidance.best_rates(Source(moved, paper.FID))[""].rows


@pytest.mark.parametrize("listed", [True, False])
def test_old_parts_go_and_other_files_stay(tmp_path, main, monkeypatch, listed):
    """Also in a folder of an earlier version, which listed none."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    catalogue.write(tmp_path, Source(main, paper.FID), ["fig8"])
    mine = {"fig8_guidance_notes.txt", "fig8_guidance_ddpm_for_talk.svg", "winners_mine.png",
            "fig8_guidance_dpmpp_2m_annotated.pdf", "fig8_guidance_2024.csv"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    if not listed:
        (tmp_path / ".parts").unlink()
    one = [r for r in main if r.identity.sampler == "ddim"]
    written = catalogue.write(tmp_path, Source(one, paper.FID), ["fig8_guidance"])
    assert written.names == ("fig8_guidance_ddim",)
    assert {p.name for p in tmp_path.iterdir()} == {
        ".parts", *mine, *(f"fig8_guidance_ddim.{k}" for k in ("png", "svg", "pdf", "csv"))}


def test_a_second_distance_does_not_take_the_place_of_clip(everything):
    def with_another(found):
        return found | {"fid_clean": found[paper.FID]} if paper.FID in found else found

    source = Source([
        dataclasses.replace(r, metrics=with_another(r.metrics), intervals=with_another(r.intervals),
                            replicates=with_another(r.replicates)) for r in everything], paper.FID)
    assert source.measures(source.main) == [paper.FID, "fid_clean", paper.CLIP]
    assert {row["measure"] for row in compute.training(source)[""].rows} == {paper.FID, paper.CLIP}
    assert {paper.FID, paper.CLIP} <= family.table(source)[""].rows[0].keys()


def test_a_page_shows_what_was_drawn_with_it_and_what_is_not_ours(tmp_path, main, monkeypatch):
    """An earlier run's figures may be of another measure."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    monkeypatch.setattr(plot_style, "FORMATS", {"svg": {}})
    for r in main:
        records.write(tmp_path / "records", r)
    figure = ["figure", f"--workdir={tmp_path}", "--page", "--metric"]
    assert program.main([*figure, paper.CLIP, "fig8", "winners"]) == 0
    folder = tmp_path / "figures"
    (folder / "winners_for_talk.svg").write_text("<svg/>")
    assert program.main([*figure, paper.FID, "fig7"]) == 0
    assert {"winners.svg", "fig8_guidance_ddim.svg"} <= {p.name for p in folder.iterdir()}
    page = (folder / "report.html").read_text("utf-8")
    assert "Best guidance (Fig. 7)" in page and "winners for talk" in page
    assert "Winner by budget</h3>" not in page and "Guidance and steps (Fig. 8)" not in page
    assert page.count("data:image/") == 2


def test_the_report_shows_every_figure_in_its_section(tmp_path, drawn, main):
    folder, written = drawn
    text = report.write(tmp_path, main, folder, report.Context(metric=paper.FID)).read_text("utf-8")
    assert text.count("data:image/") == len(written.names)
    assert 'id="downstream"' in text and 'id="other"' not in text
    for entry in catalogue.FIGURES:
        drawn_here = entry.name not in NEED_MORE
        assert (entry.heading.replace("'", "&#39;") in text) == drawn_here


def test_names_beside_curves_neither_touch_nor_leave_the_axes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 10
        bottom_N, left_N = rng.uniform(20, 60, n), rng.uniform(0, 300, n)
        left_N[: n // 2] = 100.0
        top_N, right_N = bottom_N + 12, left_N + 30
        moved_N = plot_style.apart(left_N, right_N, bottom_N, top_N, (0.0, 300.0))
        assert (bottom_N + moved_N >= -1e-9).all() and (top_N + moved_N <= 300 + 1e-9).all()
        for a in range(n):
            for b in range(a):
                beside = left_N[a] >= right_N[b] or left_N[b] >= right_N[a]
                off = abs(bottom_N[a] + moved_N[a] - bottom_N[b] - moved_N[b])
                assert beside or off > 12 - 0.5


@pytest.mark.parametrize("name", ["size", "size of a name that goes on and on for ever and ever"])
@pytest.mark.parametrize("steep", [True, False])
def test_names_lie_inside_the_picture(steep, name):
    with plot_style.style():
        fig = plot_style.figure(5, 4)
        ax = fig.subplots()
        starts, ends = [], []
        for k in range(8):
            y = (9.0 + 0.1 * k, 1.0 + 0.05 * k if steep else 8.0 + 0.05 * k)
            ax.plot([1 + k, 9 + k], y)
            starts.append((1 + k, y[0], f"{k} {name}", "#336699"))
            ends.append((9 + k, y[1], f"{k} {name}", "#336699"))
        ax.set_ylim(0, 10)
        plot_style.name_curves(ax, starts, ends, lower_is_better=True)
        fig.draw_without_rendering()
        texts = [t for t in ax.texts if t.get_text()]
        for k, t in enumerate(texts):
            shown = t.get_text().removesuffix("…")
            assert f"{k} {name}".startswith(shown) and len(shown) >= len("0 size")
            assert (shown == f"{k} {name}") == (name == "size")
        assert len(texts) == 8 and ax.get_xlim()[1] < 40
        assert all((t.get_rotation() != 0) == steep for t in texts)
        for t in texts:
            box = t.get_window_extent()
            assert box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
            assert box.x0 >= ax.bbox.x0 and box.y0 >= ax.bbox.y0 - 1


def _apart(texts):
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    return not any(a.overlaps(b.padded(-1)) for k, a in enumerate(boxes) for b in boxes[:k])


def test_a_long_name_takes_few_decades_and_their_ticks_stay_apart():
    with plot_style.style():
        fig = plot_style.figure(5.5, 4)
        ax = fig.subplots()
        ax.plot([0.3, 150], [3, 2], "o-")
        plot_style.log_x(ax)
        plot_style.name_ends(ax, [(150, 2, "a_name_that_goes_on_and_on_for_ever" * 3, "#336699")])
        fig.draw_without_rendering()
        low, high = ax.get_xlim()
        shown = [t for t, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)
                 if low <= at <= high]
        assert 150 < high < 150 * 150 and len(shown) > 3 and _apart(shown)


def test_names_of_dense_sizes_stay_apart_in_their_costs(main):
    dense = [dataclasses.replace(r, params=int(1e6 * 1.2**k), gflops=1.5 * 1.2**k, norm_cost=1.0,
                                 identity=dataclasses.replace(r.identity, model=f"size{k}"))
             for k, r in enumerate(main[:9])]
    with plot_style.style():
        fig = family.cost(Source(dense, paper.FID))[""].figure
        fig.draw_without_rendering()
        texts = [t for t in fig.axes[0].texts if t.get_text().startswith("size")]
        assert len(texts) == 9 and _apart(texts)


@pytest.mark.parametrize("every", [2, np.int64(2), (0, 2), [0, 2, 4, 6, 8], None])
def test_names_cover_no_marker(every):
    """Where curves go on beside the ends of others, as along training."""
    with plot_style.style():
        fig = plot_style.figure(5.6, 4.8)
        ax, ends = fig.subplots(), []
        for k in range(10):
            x = np.geomspace(1.0, 10.0, 9) * 1.35**k
            y = 30 / x**0.2 + 0.25 * k
            ax.plot(x, y, "o", ls="-", markevery=every)
            ends.append((x[-1], y[-1], f"{k}00m", "#336699"))
        plot_style.log_x(ax)
        plot_style.name_curves(ax, [(30, y, *more) for _, y, *more in ends], ends, True)
        fig.draw_without_rendering()
        boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
        marks = [place for line in ax.lines
                 for place in ax.transData.transform(line.get_xydata()[::2])]
    assert len(boxes) == 10
    assert not any(b.x0 < x < b.x1 and b.y0 < y < b.y1 for b in boxes for x, y in marks)
    assert _apart(ax.texts)


def test_figures_by_name(capsys, tmp_path, main):
    for r in main:
        records.write(tmp_path / "records", r)
    where = f"--records={tmp_path / 'records'}"
    assert program.main(["figure", "tab1", "fig13", where]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(tmp_path / "figures" / "tab1_family.png")
    assert said[1] == str(tmp_path / "figures" / "tab1_cost.png")
    assert said[2].startswith("skipped: fig13_distilled needs records of task consistency")
    assert {p.suffix for p in (tmp_path / "figures").iterdir()} == {".png", ".svg", ".pdf", ".csv"}
    assert program.main(["figure", "fig7", f"--workdir={tmp_path}", f"--to={tmp_path / 'x'}"]) == 0
    assert (tmp_path / "x" / "fig7_guidance.pdf").exists()
    capsys.readouterr()
    (tmp_path / "file").touch()
    for arguments, message in (
        (["tab1", where, f"--to={tmp_path / 'file'}"], "exists; name another place by --to=DIR"),
        (["fig99", where], "no figure is called 'fig99'"),
        (["fig9_cots", where], "did you mean fig9_cost?"),
        ([], "needs --workdir=DIR or --records=DIR"),
        ([f"--records={tmp_path / 'figures'}"], "no records there"),
        ([f"--workdir={tmp_path / 'nowhere'}"], "--workdir="),
        ([where, "--metric=lpips_alex"], "hold fid_tf2015, clip_score_l14"),
        ([where, "--metric=nothing"], "no measure is called 'nothing'"),
        ([where, "--colour=red"], "unrecognized arguments: --colour=red"),
    ):
        assert program.main(["figure", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert program.main(["figure", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(e.name in listed for e in catalogue.FIGURES)
    assert "All are of networks that have records" in listed  # Loss curves alone draw nothing.


def test_distances_of_other_numbers_of_pictures_are_not_drawn_together(
    capsys, tmp_path, main, monkeypatch
):
    """What does not compare with members is left out, of members what fewer have, and a line says
    so, beside the figures and on the page. Restored pictures have numbers of their own."""
    def put(found, number):
        for r in found:
            i = dataclasses.replace(r.identity, num_images=number)
            records.write(tmp_path / "records", dataclasses.replace(r, identity=i))

    monkeypatch.setattr(plot_style, "DPI", 20)
    ddim = [r for r in main if r.identity.sampler == "ddim"]
    put([r for r in ddim if r.identity.model != SIZES[2]], 16)
    put([r for r in ddim if r.identity.model == SIZES[2]], 64)
    put(paper.distilled(SIZES), 64)
    put(paper.super_resolution(SIZES), 128)
    names = ("fig8", "fig12", "fig13")
    assert program.main(["figure", *names, f"--records={tmp_path}", "--page"]) == 0
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if "does not compare, and left out" in line]
    assert [line.partition(" cells of ")[2].partition(", which")[0] for line in lines] == [
        *(f"866m were measured on 64 pictures of seed block {b} and not 16" for b in (0, 1)),
        "223m, 39m and 866m were measured on 64 pictures of seed block 1 and not 16",
    ]
    assert lines[2].startswith("Consistency distillation: ")
    assert any(line.startswith("skipped: fig13") for line in said)
    folder = tmp_path / "figures"
    page = (folder / "report.html").read_text("utf-8")
    assert all(line in page for line in lines)
    assert {r["model"] for r in _rows(folder, "fig8_guidance_ddim")} == set(SIZES[:2])
    assert {r["model"] for r in _rows(folder, "fig12_super")} == set(SIZES)


def test_every_image_conditioned_task_has_a_picture_and_baselines_of_its_own(tmp_path):
    """And of a task that of the pictures and networks that scored the records."""
    restored = paper.super_resolution(SIZES, replicates=0)
    others = [
        dataclasses.replace(r, task="deblurring", identity=dataclasses.replace(
            r.identity, model_hash="deblurring", reference_hash="sharp"))
        for r in restored
    ]
    held = [
        Baselines(task, reference, 1, 30_000, {baselines.GIVEN: {paper.FID: value}},
                  {baselines.GIVEN: {paper.FID: (value - 1, value + 1)}})
        for task, reference, value in (
            ("deblurring", "sharp", 11.0), ("super_resolution", "older", 12.0),
            ("super_resolution", "coco", 13.0))
    ]
    for b in held:
        baselines.write(baselines.path_of(
            tmp_path, b.task, b.reference_hash, b.seed_block, b.num_images), b)
    there = baselines.of_records(tmp_path, [*restored, *others])
    assert sorted(b.metrics[baselines.GIVEN][paper.FID] for b in there) == [11.0, 13.0]
    torn = next((tmp_path / baselines.FOLDER).glob("*.json"))
    whole = torn.read_text()
    torn.write_text(whole[:-40])
    with pytest.raises(UserError, match=f"{torn.name} are damaged.*restore .* ldm-scaling sweep "):
        baselines.of_records(tmp_path, [*restored, *others])
    torn.write_text(whole)
    source = Source([*restored, *others], paper.FID, baselines=there)
    assert compute.fine_tuning_score(source).keys() == {"", "deblurring"}
    parts = {"": "as given: 13.0", "deblurring": "as given: 11.0"}
    for part, drawn in downstream.super_resolution(source).items():
        for ax in drawn.figure.axes:
            said = [t.get_text() for t in ax.texts if t.get_text().startswith("as given")]
            assert len(said) == 1 and said[0].startswith(parts[part])
    titles = [report._section(name, catalogue.entry_of(name), {})[1]
              for name in ("fig12_super", "fig12_super_deblurring")]
    assert titles == ["Super-resolution and sampling cost (Fig. 12)",
                      "Deblurring and sampling cost (Fig. 12)"]


def test_one_step_is_said_as_one():
    source = Source(
        paper.grid(("ddim",), SIZES, (1,), (2.0, 3.0), replicates=0), paper.FID)
    assert compute.training(source)[""].figure.get_suptitle().endswith("DDIM, 1 step")


def test_several_workdirs_are_drawn_as_one_study(tmp_path, main, monkeypatch, capsys, caplog):
    """Records, losses and pictures of one workdir a size, and a page with verdicts on all."""
    monkeypatch.setattr(plot_style, "DPI", 20)
    for size in SIZES:
        own, k = tmp_path / size, paper.SIZES.index(size)
        for r in main:
            if r.identity.model == size:
                records.write(own / "records", r)
                if r.identity.seed_block == 1:
                    strip = np.full((4, 8, 3), 10 * k, np.uint8)
                    pictures.save_png(own / "strips" / f"{r.identity.key}.png", strip)
        (own / "models" / size).mkdir(parents=True)
        (own / "models" / size / "curves.csv").write_text(
            "step,name,value\n10,train/loss,0.5\n10,validation/loss,0.6\n")
    several = [f"--workdir={tmp_path / size}" for size in SIZES]
    assert program.main(["figure", "training", *several]) == 2
    assert "say where the files go by --to=DIR" in capsys.readouterr().err
    to = tmp_path / "all"
    assert program.main(["figure", "training", *several, f"--to={to}", "--page"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(to / "report.html")
    assert {row["model"] for row in _rows(to, "training")} == set(SIZES)
    curves = tmp_path / SIZES[0] / "models" / SIZES[0] / "curves.csv"
    curves.write_text(curves.read_text()[:-4])
    torn = [f"--to={tmp_path / 'torn'}", "--page"]
    assert program.main(["figure", "training", *several, *torn]) == 0
    assert {row["model"] for row in _rows(tmp_path / "torn", "training")} == set(SIZES[1:])
    assert f"the losses of {SIZES[0]} are left out: the curves {curves} are damaged" in caplog.text
    assert f"<li>The losses of {SIZES[0]} are left out: " in (
        tmp_path / "torn" / "report.html").read_text("utf-8")
    page = (to / "report.html").read_text("utf-8")
    assert "At a small sampling budget smaller models win" in page
    assert all(f'"{size}\\nddim\\n4"' in page for size in SIZES)  # Pictures of a point.
    there = places.read([",".join(str(tmp_path / size) for size in SIZES)])
    assert {r.identity.key for r in there.records} == {r.identity.key for r in main}
    assert there.homes == [tmp_path / size for size in SIZES]


def test_the_same_records_in_any_order_give_the_same_bytes(tmp_path, main, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 30)
    shuffled = list(main)
    random.Random(0).shuffle(shuffled)
    for folder, some in (("a", main), ("b", shuffled)):
        catalogue.write(tmp_path / folder, Source(some, paper.FID), ["fig7", "fig11"])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
