"""The report in a browser: it loads without a complaint, its controls change what is drawn, the
keyboard reaches everything, a phone shows it without sideways scrolling, and paper shows contents
and no controls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import numpy as np
import pytest

from ldm_scaling import pictures
from ldm_scaling.study import advice, advise_cli, budgets, curves, labels, report, thumbnails
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.budgets import Budget
from tests.study import fake_records as fake
from tests.study import paper_records as paper

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="drives a browser: pip install -e '.[parity]'"
)
BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium (with [parity])"
)

FD = "fd_effnetlite0"
MODELS = ("c8", "c16", "c24")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def study():
    steps = {"ddim": (4, 10, 20), "dpmpp_2m": (4, 10, 20)}
    return fake.make(models=MODELS, samplers=tuple(steps), steps=steps, replicates=40)


@pytest.fixture(scope="module")
def kept(study):
    """The first pictures of every point by (model, sampler, steps), but those of c24 in DDIM."""
    found = fake.images(MODELS, n=3, size=16)
    cells = {(p.model, p.sampler, p.steps) for c in curves.quality_curves(study, FD).values()
             for p in c}
    return {cell: found[cell] for cell in cells if cell[:2] != ("c24", "ddim")}


@pytest.fixture(scope="module")
def address(tmp_path_factory, study, kept):
    work = tmp_path_factory.mktemp("work")
    for i in (r.identity for r in study if r.identity.seed_block == 1):
        cell = i.model, i.sampler, i.steps
        if cell in kept:
            strip = np.concatenate(kept[cell], axis=1)
            pictures.save_png(work / "strips" / f"{i.key}.png", strip)
    told = report.Context(
        captions=fake.CAPTIONS[:3], attribution=["https://example.org/" + "x" * 60]
    )
    return report.write(work, study, work / "figures", told, [work / "strips"]).as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER)
        yield started
        started.close()


@contextlib.contextmanager
def _opened(browser, address, **how):
    """The page of an address; fails where it complained, or asked for anything."""
    complaints, asked = [], []
    page = browser.new_page(**{"viewport": DESK, **how})
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(address)
    # Not `wait_for_function`: it polls by `eval`, which the page's own policy forbids.
    sync_api.expect(page.locator(".chart > svg:not([data-points])")).to_have_count(0)
    yield page
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    page.close()


@pytest.fixture
def page(browser, address):
    with _opened(browser, address) as page:
        yield page


def _wide(page):
    return page.evaluate("document.documentElement.scrollWidth")


def test_it_loads_and_draws_in_both_colour_schemes(page):
    charts = page.locator(".chart > svg").all()
    assert len(charts) == 4 and all(int(c.get_attribute("data-points")) > 0 for c in charts)
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        paper, ink = page.evaluate(
            "['backgroundColor', 'color'].map((k) => getComputedStyle(document.body)[k])")
        light = [np.mean([int(v) for v in text[4:-1].split(",")]) for text in (paper, ink)]
        assert (light[0] < light[1]) == (scheme == "dark") and abs(light[0] - light[1]) > 150


def test_controls_change_the_plots(page):
    """One by one, each on top of those before."""
    for chart, change in (
        ("quality", lambda: page.select_option("#quality-measure", "caption_agreement")),
        ("quality", lambda: page.select_option("#quality-measure", FD)),
        ("quality", lambda: page.select_option("#quality-axis", "seconds")),
        ("quality", lambda: page.select_option("#quality-axis", "steps")),
        ("quality", lambda: page.uncheck("#quality-ends")),
        ("quality", lambda: page.select_option("#quality-axis", "cost")),
        ("quality", lambda: page.uncheck("#quality-winner")),
        ("quality", lambda: page.check("#quality-all")),
        ("quality", lambda: page.click("label:has([name=model][value=c16])")),
        ("quality", lambda: page.click("label:has([name=sampler][value=dpmpp_2m])")),
        ("quality", lambda: page.click("label:has([name=steps][value='4'])")),
        ("heat", lambda: page.click("label:has([name=model][value=c24])")),
        ("heat", lambda: page.select_option("#heat-measure", "caption_agreement")),
        ("winner", lambda: page.select_option("#winner-sampler", "dpmpp_2m")),
        ("winner", lambda: page.select_option("#winner-axis", "seconds")),
        ("trade", lambda: page.select_option("#trade-steps", "20")),
    ):
        svg = page.locator(f"#{chart}-chart > svg")
        before = svg.inner_html()
        change()
        assert svg.inner_html() != before, chart


def test_each_word_of_a_search_is_of_one_cell(page, study):
    key = study[0].identity.key

    def found(text):
        page.fill("#records-search", text)
        rows = page.locator("#records-table tbody tr:visible").evaluate_all(
            "(rows) => rows.map((r) => [r.dataset.model, r.dataset.sampler, r.dataset.steps])")
        assert page.inner_text("#records-count").startswith(f"{len(rows)} of ")
        return rows, {tuple(row) for row in rows}

    assert found("c16 ddim 20")[1] == {("c16", "DDIM", "20")}
    assert found("c2 DPM 2m 10")[1] == {("c24", "DPM-Solver++ (2M)", "10")}
    assert len(found(key[:8])[0]) == 1 and found(key[:3])[0] == []
    cells = len(MODELS) * 2 * 3
    assert len(found("1.5")[0]) >= cells and len(found("512")[0]) == len(study) == len(found("")[0])


def test_a_column_sorts_all_records_in_one_move(page, study):
    """Row by row 10,000 records take half a minute: each that moves is laid out anew."""
    heads = page.locator("#records-table thead th").all_inner_texts()
    k = next(k for k, head in enumerate(heads) if head.startswith("FD"))
    column = f"(rows) => rows.map((r) => r.cells[{k}].dataset.value)"
    page.evaluate("() => new MutationObserver((all) => { window.moves = all.length; }).observe("
                  "document.querySelector('#records-table tbody'), { childList: true })")
    for falling in (False, True):
        page.locator("#records-table thead button").nth(k).click()
        values = page.locator("#records-table tbody tr").evaluate_all(column)
        assert values == sorted(values, key=float, reverse=falling) and len(values) == len(study)
        assert page.evaluate("window.moves") <= 2


def test_a_heat_map_has_three_digits_that_fit(browser, address):
    with _opened(browser, address, viewport=PHONE) as page:
        page.select_option("#heat-measure", "caption_agreement")
        cells = page.locator("#heat-chart svg text[style]")
        texts = cells.all_text_contents()
        assert len(set(texts)) > len(texts) / 3
        for cell in cells.all():
            text, box = cell.bounding_box(), cell.locator(
                "xpath=preceding-sibling::*[1]").bounding_box()
            assert box["x"] <= text["x"] and text["x"] + text["width"] <= box["x"] + box["width"]
        # As `plot_style.ink_on`: the higher contrast by WCAG 2.
        inks = [page.evaluate("inkOn", [grey] * 3) for grey in (119, 133)]
        assert inks == ["#fff", "#1a212b"]


def test_scripts_write_numbers_as_the_page_does(page):
    for value in (0.0, 1234.4, 99.96, 3.214, -0.00614, 6.14e-5, 4.1e-8, 2.5e12, 242_134.0):
        assert page.evaluate("number", value) == labels.number(value)
        assert page.evaluate("brief", value) == labels.brief(value) or value > 1e12
    for ends in ((8.5e-7, 2.2e-6), (-1e-12, 0.5)):
        assert page.evaluate("(ends) => range(...ends)", ends) == f" {labels.interval(*ends)}"
    assert page.evaluate("tickTexts", [0, 9e-7, 1e-6]) == ["0", "9e-7", "1e-6"]


def test_paper_is_wide_enough_for_many_measures(browser, tmp_path, study):
    names = ("fid_clean", "kid_clean", "cmmd", "precision", "recall", "density", "coverage",
             "lpips_vgg")
    some = [dataclasses.replace(
        r, metrics=dict.fromkeys(names, r.metrics[FD]), replicates={},
        intervals=dict.fromkeys(names, (0.00123, 0.00234))) for r in study]
    told = report.Context(metric=names[0])
    address = report.write(tmp_path, some, tmp_path, told).as_uri()
    with _opened(browser, address, viewport={"width": 718, "height": 1000}) as page:
        page.emulate_media(media="print")
        assert page.locator("#records-table").bounding_box()["width"] <= 718 - 40


def test_long_names_leave_the_charts_their_room(browser, tmp_path, study):
    """Wherever they are said: none has a place to break at."""
    long = {"c24": "a_very_long_name_of_a_network_that_goes_on_and_on_for_ever"}
    named = [dataclasses.replace(r, identity=dataclasses.replace(
        r.identity, model=long.get(r.identity.model, r.identity.model))) for r in study]
    address = report.write(tmp_path, named, tmp_path, report.Context()).as_uri()
    for width in (PHONE["width"], DESK["width"]):
        with _opened(browser, address, viewport={"width": width, "height": 900}) as page:
            for samplers in (1, 2):
                if samplers == 2:
                    page.click("label:has([name=sampler][value=dpmpp_2m])")
                assert _wide(page) == width
                at = [mark.bounding_box()["x"]
                      for mark in page.locator("#quality-chart path[transform]").all()]
                # The key has the names: none has room of its own beside the curves.
                assert page.locator("#quality-key").inner_text().endswith(long["c24"])
                assert max(at) - min(at) > 0.5 * width
            for name in page.locator(".chart text:is(.name, [style*='#fff'])").all():
                box = name.bounding_box()
                assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_a_short_logarithmic_axis_has_ticks(page):
    for low, high in ((3.1, 3.9), (10.2, 14.5), (100, 290), (10, 31), (0.3, 900)):
        at = page.evaluate("([low, high]) => ticks(low, high, true, 5)", [low, high])
        assert len(at) >= 3 and at == sorted(set(at)) and low <= at[0] <= at[-1] <= high


def test_names_of_many_sizes_cover_nothing(browser, tmp_path):
    many = paper.grid(("ddim",), steps=(4, 10, 20, 50), rates=(2.0, 3.0), replicates=0)
    address = report.write(tmp_path, many, tmp_path, report.Context(metric=paper.FID)).as_uri()
    for width in (PHONE["width"], 1100):
        with _opened(browser, address, viewport={"width": width, "height": 900}) as page:
            names = page.locator("#quality-chart text.name")
            marks = page.locator("#quality-chart path[transform]").evaluate_all(
                "(all) => all.map((m) => m.getBoundingClientRect()).map((b) => "
                "[b.x + b.width / 2, b.y + b.height / 2])")
            boxes = [name.bounding_box() for name in names.all()]
            for k, a in enumerate(boxes):
                right, bottom = a["x"] + a["width"], a["y"] + a["height"]
                assert right <= width
                assert not any(a["x"] < b["x"] + b["width"] and b["x"] < right
                               and a["y"] < b["y"] + b["height"] - 3 and b["y"] < bottom - 3
                               for b in boxes[:k])
                assert not any(a["x"] < x < right and a["y"] < y < bottom for x, y in marks)
            assert 0 < len(boxes) < len(paper.SIZES)
            assert page.locator("#quality-key span").all_inner_texts() == list(paper.SIZES)
            assert _wide(page) == width


def test_without_scripts_the_page_says_what_is_missing(browser, address):
    page = browser.new_page(java_script_enabled=False)
    page.goto(address)
    assert "need JavaScript" in page.locator("noscript").inner_text()
    page.close()


def _told(page):
    return page.locator("#advice-result").inner_text()


def test_the_slider_says_what_advise_says(page, study):
    for unit, written in (("cost", "cost"), ("gflops", "gflops"), ("seconds", "s")):
        page.select_option("#advice-unit", unit)
        options = options_lib.of_records(study, unit, FD)
        costs = sorted(p.cost for p in options.points)
        for budget in (costs[0], costs[3] * 1.01, costs[8], costs[-1] * 2):
            _compare(page, options, budget, written)


def _compare(page, options, budget, written, tasks="text_to_image"):
    unit, dearest = options.unit, max(p.cost for p in options.points)
    page.fill("#advice-amount", repr(budget))
    page.press("#advice-amount", "Enter")
    said, found = _told(page), advise_cli.plain(advice.advise(options, Budget(budget, unit)))
    for row in (found["best"], found["runner_up"]):
        steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
        name = labels.network(row["model"], row["task"])
        assert (f"{name}, {labels.sampler(row['sampler'])}, {steps}, guidance "
                f"{row['guidance']:g}") in said
        assert f"{labels.number(row['value'])} [{labels.number(row['low'])}, " in said
        # What the page prints can be typed: it pays for the configuration.
        assert f"{budgets.enough(row[unit]):g} {written}" in said
    sure = labels.probability(found["probability_runner_up_is_better"])
    assert f"better with probability {sure}" in said
    assert page.locator("#advice-front tbody tr").count() == len(found["front"])
    beyond = "allows all that was measured" in page.locator("#advice-range").inner_text()
    assert beyond == (budget > dearest)
    command, quoted, _ = page.locator("#advice-command").inner_text().split('"')
    flags = f"--task={tasks} --metric={FD} --select-block=0 --report-blocks=1"
    assert command == f"ldm-scaling advise --records=DIR {flags} --budget="
    assert budgets.parse(quoted) == Budget(budget, unit)


def test_the_slider_weighs_students_with_their_own_pictures(browser, tmp_path, study):
    """In DDIM they have the sampler and the steps of their teachers, and are not taken for these.
    What does not compare has no say, and the command leaves it out."""
    more = {"models": ("c8", "c24"), "steps": (4,)}
    students = [
        *fake.students(study, better=-2.0, **more),
        *fake.students(study, "guided_distillation", 60.0, sampler="ddim", told=True, **more),
    ]
    others = [*students, *fake.students(study, "deblurring", 90.0)]
    tasks = "text_to_image,consistency,guided_distillation"
    shades = {"consistency": 60, "guided_distillation": 200, "text_to_image": 120, "deblurring": 9}
    for r in [*study, *others]:
        strip = np.full((16, 16, 3), shades[r.task], np.uint8)
        pictures.save_png(tmp_path / "strips" / f"{r.identity.key}.png", strip)
    page = report.write(
        tmp_path, study, tmp_path, report.Context(), [tmp_path / "strips"], others
    ).as_uri()
    with _opened(browser, page) as page:
        for unit, written in (("cost", "cost"), ("gflops", "gflops")):
            page.select_option("#advice-unit", unit)
            options = options_lib.of_records([*study, *students], unit, FD)
            costs = sorted(p.cost for p in options.points)
            for budget in (costs[2], costs[5] * 1.01, costs[-1] * 2):
                _compare(page, options, budget, written, tasks)
        assert "c24 (guided), DDIM, 4 steps" in _told(page)
        assert page.locator("#advice-band rect.foreign").count() >= 1
        page.click("#advice-images")
        assert page.inner_text("#panel-title").startswith("c24 (guided), DDIM, 4 steps")
        assert page.inner_text("#panel-facts").startswith("FD ")
        strip = [np.full((16, 16, 3), 200, np.uint8)]
        assert _shown(page) == [thumbnails.encode(image) for image in strip]


def test_it_opens_on_something_and_the_least_that_it_names_can_be_typed(browser, tmp_path):
    one = fake.make(models=("c16",), samplers=("ddim",), steps={"ddim": (4,)}, guidance=(3.0,),
                    replicates=0, report_blocks=(1, 2))
    address = report.write(tmp_path, one, tmp_path, report.Context(report_blocks=(1, 2))).as_uri()
    page = browser.new_page()
    page.goto(address)
    for unit in ("cost", "seconds", "gflops"):
        page.select_option("#advice-unit", unit)
        assert "c16" in _told(page) and "Below range" not in page.inner_text("#advice-range")
        page.fill("#advice-amount", "1e-9")
        page.press("#advice-amount", "Enter")
        assert _told(page) == ""
        least = page.inner_text("#advice-range").split()[-2]
        page.fill("#advice-amount", least)
        page.press("#advice-amount", "Enter")
        assert "c16" in _told(page)
    assert "--select-block=0 --report-blocks=1,2 --budget=" in page.inner_text("#advice-command")
    page.close()


def test_the_keyboard_moves_the_slider(page):
    slider = page.locator("#advice-slider")
    slider.focus()
    at = [float(page.input_value("#advice-amount"))]
    for _ in range(3):
        slider.press("ArrowRight")
        at.append(float(page.input_value("#advice-amount")))
    assert at == sorted(set(at))
    for no_budget in ("0", "-3", "1e999"):
        page.fill("#advice-amount", no_budget)
        page.press("#advice-amount", "Enter")
        assert float(page.input_value("#advice-amount")) == at[-1]
    ends = {}
    for key, beyond in (("Home", "0.001"), ("End", "1000000")):
        slider.press(key)
        ends[key] = page.input_value("#advice-amount")
        page.fill("#advice-amount", beyond)
        page.press("#advice-amount", "Enter")
        assert page.input_value("#advice-amount") == beyond
        slider.press(key)
        assert page.input_value("#advice-amount") == ends[key]
    slider.press("Home")
    assert "Below range" in page.locator("#advice-range").inner_text()
    assert _told(page) == "" and page.locator("#advice-images").is_disabled()
    assert "below range" in slider.get_attribute("aria-valuetext")
    slider.press("End")
    assert "allows all that was measured" in page.locator("#advice-range").inner_text()
    assert "Take" in _told(page) and "guidance" in slider.get_attribute("aria-valuetext")


def _shown(page):
    return [img.get_attribute("src") for img in page.locator("#panel-images img").all()]


def test_the_keyboard_opens_walks_and_closes_the_pictures_of_a_point(page, kept):
    svg, panel = page.locator("#quality-chart > svg"), page.locator("#panel")
    svg.focus()
    svg.press("ArrowRight")
    assert not panel.is_visible()
    svg.press("Enter")
    assert panel.is_visible()
    seen = []
    for _ in range(9):
        model, sampler, steps = page.inner_text("#panel-title").split(", ")[:3]
        cell = model, {"DDIM": "ddim"}[sampler], int(steps.split()[0])
        assert _shown(page) == [thumbnails.encode(image) for image in kept.get(cell, ())]
        note = page.inner_text("#panel-note")
        assert ("No images were kept" in note) == (cell not in kept)
        seen.append(cell)
        page.keyboard.press("ArrowRight")
    assert set(seen) == {(m, "ddim", n) for m in MODELS for n in (4, 10, 20)}
    assert page.inner_text("#panel-place") == "1 of 9"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#panel-place") == "9 of 9"
    page.keyboard.press("Escape")
    assert not panel.is_visible()
    assert page.evaluate("document.activeElement.matches('#quality-chart > svg')")


def test_a_click_opens_the_pictures_and_their_captions(page):
    svg = page.locator("#quality-chart > svg")
    svg.scroll_into_view_if_needed()
    place = svg.locator("path[transform]").first
    box = place.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.inner_text("#panel-title").startswith("c8, DDIM, 4 steps, guidance ")
    assert [i.get_attribute("alt") for i in page.locator("#panel-images img").all()
            ] == fake.CAPTIONS[:3]
    assert page.locator("#panel-images img").first.evaluate("(i) => i.naturalWidth") == 16
    assert page.locator("#panel-images").inner_text().count("<b>") == 1  # a caption's own text
    page.click("#panel-close")
    page.click("#advice-images")
    best = page.locator("#advice-result b").first.inner_text()
    assert page.inner_text("#panel-title") == best


def test_a_phone_needs_no_sideways_scrolling_and_a_tap_opens_pictures(browser, address):
    with _opened(browser, address, viewport=PHONE, is_mobile=True, has_touch=True) as page:
        assert _wide(page) == PHONE["width"]
        assert all(svg.bounding_box()["width"] < PHONE["width"]
                   for svg in page.locator(".chart > svg").all())
        page.locator("#quality-chart > svg path[transform]").first.tap()
        assert page.inner_text("#panel-title").startswith("c8, DDIM, 4 steps, guidance ")
        box = page.locator("#panel").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] == _wide(page)


def test_wide_pictures_and_tables_scroll_within_their_frames(browser, tmp_path, study):
    for name in ("tab1_family", "law_size", "mine"):
        svg = '<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="300"/>'
        (tmp_path / f"{name}.svg").write_text(svg)
    address = report.write(tmp_path, study, tmp_path, report.Context()).as_uri()
    for at in (PHONE, DESK):
        with _opened(browser, address, viewport=at) as page:
            assert _wide(page) == at["width"]
            images = page.locator(".picture img").all()
            widths = [image.bounding_box()["width"] for image in images]
            assert len(widths) == 3 and set(widths) == {720 if at == PHONE else 1000}
            for frame in page.locator(".picture, .scroll").all():
                box = frame.bounding_box()
                assert 0 < box["x"] and box["x"] + box["width"] < at["width"]
                assert frame.evaluate("(f) => getComputedStyle(f).borderRightStyle") == "solid"
            page.emulate_media(media="print")
            for image in images:
                assert image.bounding_box()["width"] < at["width"]


def test_paper_shows_contents_and_no_controls(page, study):
    page.emulate_media(media="print")
    for control in (".filters", "nav", "#advice-slider", "#quality-measure", "#records-search",
                    ".button", "#records-table th:last-child"):
        assert not page.locator(control).first.is_visible()
    assert page.locator(".more li").last.is_visible()
    for content in ("#found", "#advice-result", "#advice-front", "#quality-chart > svg", "#about"):
        assert page.locator(content).is_visible()
    points = sum(map(len, curves.quality_curves(study, FD).values()))
    assert page.locator("#records-table tbody tr:visible").count() == points
    assert len(page.pdf(format="A4")) > 20_000


def test_of_one_guidance_rate_none_is_the_best(browser, tmp_path, study):
    for rates, framed in (({3.0}, 0), ({3.0, 5.0}, 9)):
        some = [r for r in study if r.identity.guidance in rates]
        address = report.write(tmp_path, some, tmp_path, report.Context()).as_uri()
        with _opened(browser, address) as page:
            assert page.locator("#heat-chart rect[fill=none]").count() == framed
            assert ("Framed" in page.inner_text("section:has(#guidance)")) == bool(framed)


def test_a_study_without_pictures_or_reported_records_still_loads(browser, tmp_path, study):
    for keep, has in ((lambda r: r.identity.seed_block == 0, 0), (lambda r: True, 1)):
        some = [dataclasses.replace(r, replicates={}, intervals={}) for r in study if keep(r)]
        address = report.write(tmp_path, some, tmp_path, report.Context()).as_uri()
        with _opened(browser, address) as page:
            assert page.locator("#advice").count() == has
            if has:
                assert "not known (no replicates)" in _told(page)
                page.click("#advice-images")
                assert "No images were kept" in page.inner_text("#panel-note")
