"""The plots: every one is written, marks what the numbers say, and never depends on the hour."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from ldm_scaling import files
from ldm_scaling.study import curves, image_grids, labels, plot_style, plots, pricing
from ldm_scaling.study.figures import catalogue, text_to_image
from ldm_scaling.study.figures.source import Source
from tests import shallow
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
SIZES = tuple(fake.CHANNELS)
SMALL = {"models": ("c8", "c16", "c24"), "replicates": 50}


@pytest.fixture(scope="module")
def study():
    return fake.make(**SMALL)


def test_every_picture_is_written_in_three_formats_with_its_numbers(tmp_path, study, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 60)
    names = catalogue.write(tmp_path, Source(
        study, FD, loss_curves=fake.training(SMALL["models"]),
        images=fake.images(SMALL["models"], n=2, size=8), captions=fake.CAPTIONS[:2],
    )).names
    assert {"fig9_cost", "fig9_seconds", "fig11_samplers", "winners", "tradeoff", "training",
            "fig8_guidance_ddim", "fig8_guidance_ddpm", "fig8_guidance_dpmpp_2m",
            "fig10_images_ddim"} <= set(names)
    assert {p.name for p in tmp_path.iterdir()} == {".parts", *(
        f"{n}.{k}" for n in names for k in ("png", "svg", "pdf", "csv"))}
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture.convert("L")).std() > 5  # not blank
        assert (tmp_path / f"{name}.svg").read_text().rstrip().endswith("</svg>")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_records_give_the_same_bytes(tmp_path, study, monkeypatch):
    """Fonts of PDFs are embedded as publishers ask for them, which is not type 3."""
    monkeypatch.setitem(plot_style.STYLE, "pdf.fonttype", shallow.FONT_TYPE)
    for folder in ("a", "b"):
        with plot_style.style():
            found = curves.quality_curves(study, FD)
            drawn = plots.quality_by_cost(study, found, FD, "ddim")
        plot_style.save(drawn, tmp_path / folder, "same")
    for kind in plot_style.FORMATS:
        a, b = (tmp_path / f / f"same.{kind}" for f in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()
        if kind == "pdf":
            assert b"/CIDFontType2" in a.read_bytes() and b"/Type3" not in a.read_bytes()


def test_a_picture_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    """One of which a format is gone, that looks otherwise, or whose writing was cut off midway, is
    written whole."""
    paths = [tmp_path / f"one.{kind}" for kind in plot_style.FORMATS]

    def save(title):
        with plot_style.style():
            drawn = Figure(layout="constrained")
            drawn.subplots().set_title(title)
        plot_style.save(drawn, tmp_path, "one")
        return [path.stat().st_mtime_ns for path in paths]

    first = save("a")
    assert save("a") == first
    paths[2].unlink()
    second = save("a")
    assert all(a != b for a, b in zip(first, second))
    bytes_ = [path.read_bytes() for path in paths]
    whole, written = files.atomic_write_bytes, []

    def cut_off(path, data):
        if written:
            raise OSError("no space left")
        written.append(whole(path, data))

    with monkeypatch.context() as during, pytest.raises(OSError):
        during.setattr(files, "atomic_write_bytes", cut_off)
        save("b")
    assert not paths[2].exists()
    save("b")
    assert all(path.read_bytes() != was for path, was in zip(paths, bytes_))


def _labels(fig):
    return [text for ax in fig.axes for text in (ax.get_xlabel(), ax.get_ylabel())]


def test_axes_say_what_they_show(study):
    found = curves.quality_curves(study, FD)
    with plot_style.style():
        said = _labels(plots.quality_by_cost(study, found, FD, "ddim"))
        timed = _labels(plots.quality_by_cost(study, found, FD, "ddim", "seconds"))
    assert any("normalised cost × network calls" in text for text in said)
    assert any("lower is better" in text and "EfficientNet-Lite0" in text for text in said)
    assert any("seconds per image" in text for text in timed)
    assert not any("FID" in text for text in said + timed)


def test_a_trade_off_points_to_the_better_side_whichever_measure_is_across(study):
    for metric, other, arrow in ((FD, "caption_agreement", "→"), ("caption_agreement", FD, "←")):
        with plot_style.style():
            fig = plots.trade_off(study, metric, other, 0)
        assert fig.axes[0].get_xlabel() == f"{labels.measure(other).label} ({arrow} better)"
        assert fig.get_suptitle().startswith("Both measures along guidance (DDIM")


def test_titles_stay_within_narrow_figures():
    name = "dpmpp_2m_sde:solver_type=heun"
    few = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, sampler=name))
        for r in fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, replicates=0)
    ]
    with plot_style.style():
        for fig in (plots.guidance_by_steps(few, FD, name, 0),
                    plots.trade_off(few, FD, "caption_agreement", 0)):
            fig.draw_without_rendering()
            (title,) = [t for t in fig.texts if t.get_text() == fig.get_suptitle()]
            assert title.get_window_extent().x1 <= fig.bbox.x1
            assert title.get_window_extent().y0 > fig.axes[0].bbox.y1


@pytest.mark.parametrize("names", [4, 7, 11, "long"])
def test_names_of_sizes_stay_within_narrow_figures(names):
    """Each of them, on rows of their own height: panels are as high as with one row."""
    def of_sizes(models):
        one = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, replicates=0)
        moved = [
            dataclasses.replace(r, identity=dataclasses.replace(r.identity, model=m),
                                params=r.params + k)
            for k, m in enumerate(models) for r in one
        ]
        with plot_style.style():
            fig = plots.trade_off(moved, FD, "caption_agreement", 0)
            fig.draw_without_rendering()
        return fig

    models = [f"size {k}" for k in range(names)] if names != "long" else [
        f"a size {k} of a name that goes on and on for ever and ever" for k in range(2)]
    fig = of_sizes(models)
    (legend,) = fig.legends
    assert len(legend.get_texts()) == len(models)
    texts = [text.get_window_extent() for text in legend.get_texts()]
    assert all(fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 for box in texts)
    assert all(not a.overlaps(b) for k, a in enumerate(texts) for b in texts[:k])
    panel, alone = fig.axes[0].bbox.height, of_sizes(models[:1]).axes[0].bbox.height
    assert panel == pytest.approx(alone, rel=0.1)


def test_without_replicates_no_probability_is_drawn(study):
    """The best size stands alone: without an axis, or pale beside probabilities."""
    def drawn(bare):
        records = [dataclasses.replace(r, replicates={}, intervals={}) if bare(r.identity) else r
                   for r in study]
        with plot_style.style():
            return plots.winner_chart(records, curves.quality_curves(records, FD), FD).axes

    def alphas(ax):
        return {patch.get_alpha() for patch in ax.patches if isinstance(patch, StepPatch)}

    for ax in drawn(lambda i: False):
        assert ax.get_ylabel().startswith("probability")
        assert "replicates" not in ax.get_title("left")
        assert alphas(ax) == {1.0}
    for ax in drawn(lambda i: True):
        assert "probability" not in ax.get_ylabel() and not len(ax.get_yticks())
        assert "no replicates" in ax.get_title("left")
    ddim, ddpm, _ = drawn(lambda i: i.sampler == "ddim" and i.steps > 10)
    assert ddim.get_ylabel() == ddpm.get_ylabel() and len(ddim.get_yticks())
    assert "pale: no replicates" in ddim.get_title("left") and ddpm.get_title("left") == "DDPM"
    assert alphas(ddim) > {1.0}


def test_seconds_of_several_devices_are_not_drawn(tmp_path, study):
    mixed = [dataclasses.replace(study[0], device="another"), *study[1:]]
    written = catalogue.write(tmp_path, Source(mixed, FD), ["fig9_seconds"])
    assert written.names == () and "timed on one kind of device" in written.skipped[0]


def test_what_was_not_timed_is_not_drawn_in_seconds(tmp_path, study):
    written = catalogue.write(tmp_path, Source(fake.untimed(study), FD), ["fig9_seconds"])
    assert written.names == () and "timed on one kind of device" in written.skipped[0]
    chosen = fake.untimed(study, lambda i: i.seed_block == 1)
    written = catalogue.write(tmp_path, Source(chosen, FD), ["fig9_seconds"])
    assert written.names == () and "those of the reported block count" in written.skipped[0]
    assert "seconds_per_image of 0" in written.skipped[0]
    some = fake.untimed(study, lambda i: i.model == "c16" and i.steps > 10 or i.model == "c24")
    with plot_style.style():
        drawn = text_to_image.seconds(Source(some, FD))[""]
        whole = text_to_image.seconds(Source(study, FD))[""]
    assert {(r["model"], r["steps"]) for r in drawn.rows} == {
        (r["model"], r["steps"]) for r in whole.rows
        if r["model"] == "c8" or r["model"] == "c16" and r["steps"] <= 10}
    assert drawn.figure.get_suptitle().startswith("7 of 15 configurations, of c16 and c24, have")
    assert whole.figure.get_suptitle() == ""
    slow = [dataclasses.replace(r, seconds_per_image=9 * r.seconds_per_image)
            if r.identity.model == "c8" else r for r in some]
    with plot_style.style():
        both = text_to_image.seconds(Source(slow, FD))[""].figure
    lacking, doubt = both.get_suptitle().split("\n")
    assert lacking == drawn.figure.get_suptitle() and doubt == pricing.doubt(slow)
    assert "c8 is up to" in doubt
    for line in drawn.figure.axes[1].lines:
        assert (np.asarray(line.get_xdata()) > 0).all()


def test_samplers_are_spelt_for_readers_and_for_files():
    assert labels.sampler("ddim, after 4 of ddpm, trailing") == "DDIM, after 4 of DDPM, trailing"
    assert labels.sampler("ddim:eta=0.5, leading") == "DDIM with eta 0.5, leading"
    assert labels.file_name("ddim:eta=0.5, trailing") == "ddim-eta-0-5_trailing"


def test_quality_is_drawn_at_its_place(study):
    found = curves.quality_curves(study, FD)
    with plot_style.style():
        fig = plots.quality_by_cost(study, found, FD, "ddim")
    right = fig.axes[1]
    drawn = {tuple(np.round(line.get_xdata(), 9)): line.get_ydata() for line in right.lines}
    for model in SMALL["models"]:
        points = found[model, "ddim"]
        np.testing.assert_allclose(drawn[tuple(np.round([p.cost for p in points], 9))],
                                   [p.value for p in points])
    assert right.get_xscale() == "log"


@pytest.mark.parametrize("value", [40.0, 0.0, -3.0])
def test_a_heat_map_of_one_value_is_drawn(study, value):
    same = [dataclasses.replace(r, metrics={FD: value}) for r in study]
    with plot_style.style():
        fig = plots.guidance_by_steps(same, FD, "ddim", 0)
        fig.draw_without_rendering()
    shades = {tuple(c) for c in fig.axes[0].collections[0].get_facecolors()}
    assert len(shades) == 1 and np.isfinite([*shades]).all()


def test_ink_is_that_with_more_contrast():
    """By WCAG 2, white on a grey of 119 has 4.48 and on red 4.0, both more than the dark ink; on a
    grey of 133 it has 3.7, and the ink more."""
    for level, ink in ((119, "white"), (133, plot_style.INK)):
        assert plot_style.ink_on([level / 255] * 3) == ink
    assert plot_style.ink_on((1.0, 0.0, 0.0)) == plot_style.ink_on((0.0, 0.0, 1.0, 1.0)) == "white"
    assert plot_style.ink_on((0.0, 1.0, 0.0)) == plot_style.ink_on((1, 1, 0)) == plot_style.INK


def test_step_counts_do_not_touch_each_other():
    for steps in ((4, 6, 8, 10, 20, 50, 100, 250, 500), (1, 2, 5, 10, 250, 500, 1000), (7,),
                  tuple(range(1, 41))):
        with plot_style.style():
            fig = plot_style.figure(4.2, 3)
            ax = fig.subplots()
            ax.plot(steps, steps)
            ax.set_xscale("log")
            plot_style.step_ticks(ax, steps)
            fig.draw_without_rendering()
        named = [t for t in ax.get_xticklabels() if t.get_text()]
        boxes = [t.get_window_extent() for t in named]
        assert all(b.x0 - a.x1 > 3 for a, b in zip(boxes, boxes[1:]))
        assert len(ax.get_xticks()) == len(steps)
        assert {str(steps[0]), str(steps[-1])} <= {t.get_text() for t in named}
        assert len(named) > len(steps) // 4


def test_names_with_dollars_are_no_formulas(study):
    with plot_style.style():
        fig = plots.quality_by_cost(study, curves.quality_curves(study, FD), FD, "ddim")
        texts = [text for ax in fig.axes for text in (*ax.texts, ax.title, *ax.get_xticklabels())]
        plain, dollars = (fig.text(0, 0, text).get_window_extent().width for text in ("x", "$x$"))
    assert dollars > 2 * plain and not any(text.get_parse_math() for text in texts)
    assert plot_style.power(2.6e7) == "2.6×10⁷" and plot_style.power(1e12) == "10¹²"


@pytest.mark.parametrize("value, digits, said", [
    (9.96e7, 2, "10⁸"), (9.94e7, 2, "9.9×10⁷"), (999_999, 3, "10⁶"), (2.5e-4, 3, "2.5×10⁻⁴"),
    (1.05e300, 3, "1.05×10³⁰⁰"), (0, 3, ""),
])  # fmt: skip
def test_powers_are_rounded_before_they_are_parted(value, digits, said):
    assert plot_style.power(value, digits) == said


def test_no_two_panels_of_a_heat_map_have_one_title():
    names = {"c8": "mmdit_depth8_a", "c16": "mmdit_depth8_b", "c24": "c24"}
    few = fake.make(models=tuple(names), steps={"ddim": (4,)}, samplers=("ddim",), replicates=0)
    few = [dataclasses.replace(r, identity=dataclasses.replace(
        r.identity, model=names[r.identity.model])) for r in few]
    with plot_style.style():
        fig = plots.guidance_by_steps(few, FD, "ddim", 0)
    titles = {ax.get_title(loc="left") for ax in fig.axes} - {""}
    assert titles == {"mmdit_depth8_a", "mmdit_depth8_b", "c24"}


def test_a_trade_off_has_the_numbers_of_its_panels(study):
    with plot_style.style():
        drawn = text_to_image.trade(Source(study, FD))[""]
    assert {labels.steps(row["steps"]) for row in drawn.rows} == {
        ax.get_title(loc="left") for ax in drawn.figure.axes}
    assert len({r.identity.steps for r in study}) > 3


def test_the_heat_map_frames_the_best_rate_of_each_step_count(study):
    choice = curves.best_guidance(study, FD)
    with plot_style.style():
        fig = plots.guidance_by_steps(study, FD, "ddim", 0)
    panels = {ax.get_title(loc="left"): ax for ax in fig.axes}
    steps, rates = sorted(fake.STEPS["ddim"]), sorted(fake.GUIDANCE)
    for model in SMALL["models"]:
        frames = {(math.floor(p.get_x() + 0.5), math.floor(p.get_y() + 0.5))
                  for p in panels[model].patches}
        assert frames == {(steps.index(s), rates.index(choice[model, "ddim", s])) for s in steps}
    assert "framed" in fig.get_suptitle()
    one = [r for r in study if r.identity.guidance == rates[0]]
    with plot_style.style():
        fig = plots.guidance_by_steps(one, FD, "ddim", 0)
    assert not any(ax.patches for ax in fig.axes[:-1]) and "framed" not in fig.get_suptitle()


@pytest.mark.parametrize("keep", [
    lambda i: i.seed_block == 0,
    lambda i: i.model == "c8",
    lambda i: i.sampler == "ddpm",
    lambda i: i.steps == 4,
    lambda i: (i.model, i.sampler) not in {("c24", "ddim"), ("c8", "ddpm")},
    lambda i: i.guidance == 3.0,
], ids=["no report", "one size", "one sampler", "one step count", "curves missing", "one rate"])
def test_an_unfinished_sweep_is_drawn_as_far_as_it_goes(tmp_path, study, keep, monkeypatch):
    monkeypatch.setattr(plot_style, "DPI", 30)
    monkeypatch.setattr(plot_style, "FORMATS", {"png": {}})
    some = [r for r in study if keep(r.identity)]
    names = catalogue.write(tmp_path, Source(some, FD)).names
    assert any(n.startswith("fig8") for n in names)
    assert ("winners" in names) == any(r.identity.seed_block == 1 for r in some)


def test_no_records_no_pictures(tmp_path):
    written = catalogue.write(tmp_path, Source([], FD))
    assert written.names == () and len(written.skipped) == len(catalogue.FIGURES)
    assert list(tmp_path.iterdir()) == []


def test_colours_are_ordered_in_lightness():
    for n in (2, 5, 11):
        for first, last in ((0.0, 0.86), (0.3, 1.0)):
            rgb = [[int(c[k : k + 2], 16) for k in (1, 3, 5)]
                   for c in plot_style.ramp(n, first, last)]
            light = [float(np.dot(c, (0.2126, 0.7152, 0.0722))) for c in rgb]
            assert light == sorted(light) and len(set(light)) == n
    looks = plot_style.marks([f"m{k}" for k in range(11)])
    assert len({m["marker"] for m in looks.values()}) == 11  # colour is never the only sign


def test_rows_of_an_equal_cost_grid_cost_nearly_the_same():
    records = fake.make(replicates=0)
    cells = image_grids.costs(records, fake.images(n=1, size=2))
    rows = image_grids.equal_cost(cells, "ddim", SIZES)
    assert 2 <= len(rows) <= 4
    assert [r.cost for r in rows] == sorted(r.cost for r in rows)
    for row in rows:
        models = [cell[0] for cell, _ in row.cells]
        assert len(models) > 1 and models == [m for m in SIZES if m in models]
        for cell, cost in row.cells:
            assert cell[1] == "ddim"
            assert 1 / 1.36 < cost / row.cost < 1.36
            assert cost == pytest.approx(fake.norm_cost(cell[0]) * cell[2])
    # All five sizes can be had at one cost with these step counts, so that cost is among them.
    assert max(len(r.cells) for r in rows) == 5


def test_an_image_grid_shows_the_images_themselves():
    records = fake.make(models=("c8", "c16"), samplers=("ddim",), replicates=0)
    rng = np.random.default_rng(0)
    images = {(m, "ddim", n): rng.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
              for m in ("c8", "c16") for n in fake.STEPS["ddim"]}
    rows = image_grids.equal_cost(image_grids.costs(records, images), "ddim", ("c8", "c16"))
    with plot_style.style():
        fig = image_grids.draw(rows, images, ["a $x^2", "b <i>"],
                               curves.quality_curves(records, FD), FD)
        fig.savefig(io.BytesIO(), format="png", dpi=40)
    shown = [np.asarray(ax.images[0].get_array()) for ax in fig.axes]
    wanted = [image for row in rows for cell, _ in row.cells for image in images[cell]]
    assert len(shown) == len(wanted)
    for a, b in zip(shown, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    words = " ".join(t.get_text() for t in fig.texts)
    assert "a $x^2" in words and "b <i>" in words
    assert words.count("★ best") == len(rows)
