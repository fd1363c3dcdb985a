"""The report: whole, self-contained, safe against its own texts, and the same every time."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html.parser
import io
import json
import random
import re

import numpy as np
import pytest

from ldm_scaling import pictures
from ldm_scaling.errors import UserError
from ldm_scaling.study import (
    advice,
    advise_cli,
    curves,
    findings,
    labels,
    page_data,
    report,
    thumbnails,
    winners,
)
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.statistics import claims
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
NASTY = "</script><img src=x onerror=alert(1)>'\"&"
CREDIT = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0"
)
CONTEXT = report.Context(
    title=f"Title {NASTY}",
    dataset=[f"Data {NASTY}"],
    measures={"caption_agreement": f"Measured {NASTY}"},
    attribution=[CREDIT],
    config={"note": NASTY},
    versions={"jax": NASTY},
)
_VOID = {"meta", "link", "img", "input", "br", "hr", "path", "rect"}


class _Page(html.parser.HTMLParser):
    """Elements, attributes, texts, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.broken = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def inside(self, tag):
        return "".join(data for where, data in self.texts if where == tag)

    def text(self):
        return " ".join(d for where, d in self.texts if where not in ("script", "style"))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def study():
    records = fake.make(models=("c8", "c16", "c24"), replicates=40)
    nasty = dataclasses.replace(records[0].identity, model_hash=NASTY)
    return [dataclasses.replace(records[0], identity=nasty, device=NASTY), *records[1:]]


@pytest.fixture(scope="module")
def figures(tmp_path_factory, study):
    folder = tmp_path_factory.mktemp("figures")
    images = {k: v for k, v in fake.images(("c8", "c16", "c24"), n=2, size=8).items()
              if k[1] == "ddim"}
    catalogue.write(folder, Source(
        [r for r in study if r.identity.sampler == "ddim"], FD, images=images,
        captions=[NASTY, "$x$"], loss_curves=fake.training(("c8", "c16", "c24"))))
    (folder / ".tmp-1234-half.png").write_bytes(b"half a picture")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory, study, figures):
    path = report.write(tmp_path_factory.mktemp("work"), study, figures, CONTEXT)
    assert path.name == "report.html"
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def page(text):
    return _Page(text)


def test_the_page_is_well_formed(page):
    assert page.broken == [] and page.open == []
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(ids)


def test_nothing_is_loaded_from_anywhere(text, page):
    for tag, attrs in page.elements:
        for name in ("src", "srcset", "poster", "action", "data", "xlink:href"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
        if tag != "a":
            assert attrs.get("href", "data:").startswith("data:"), (tag, attrs)
    styles = page.inside("style") + " ".join(a.get("style", "") for _, a in page.elements)
    assert "@import" not in styles and "url(" not in styles
    scripts = page.inside("script")
    assert not re.search(r"\b(fetch|XMLHttpRequest|importScripts|WebSocket|EventSource)\b", scripts)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    # The browser itself refuses everything but what the page carries.
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_texts_cannot_become_markup(text, page):
    assert NASTY not in text
    assert not [a for a in page.all("img") if "onerror" in a]
    assert page.text().count(NASTY) >= 5
    data = json.loads(_script(text))
    assert data["metric"] == FD


def _script(text):
    return re.search(r'<script type="application/json" id="study-data">(.*?)</script>', text,
                     re.S).group(1)


def test_every_record_is_in_the_table_and_in_the_csv(page, study):
    rows = [a for a in page.all("tr") if "data-model" in a]
    assert len(rows) == len(study)
    values = {a["data-value"] for a in page.all("td") if "data-value" in a}
    assert {r.identity.key for r in study} <= values
    assert {str(v) for r in study for v in r.metrics.values()} <= values
    (link,) = [a["href"] for a in page.all("a") if a.get("download")]
    table = list(csv.DictReader(io.StringIO(base64.b64decode(link.split(",")[1]).decode())))
    assert {row["key"]: float(row[FD]) for row in table} == {
        r.identity.key: r.metrics[FD] for r in study}
    assert {row["device"] for row in table} == {NASTY, "2 CPU cores"}


def test_bold_rows_are_the_reported_ones(page, study):
    chosen = [a for a in page.all("tr") if a.get("class") == "chosen"]
    points = [p for c in curves.quality_curves(study, FD).values() for p in c]
    assert sorted((a["data-model"], a["data-steps"], a["data-guidance"]) for a in chosen) == sorted(
        (p.model, str(p.steps), f"{p.guidance:g}") for p in points)
    assert {a["data-block"] for a in chosen} == {"1"}


def test_it_opens_with_advice_and_a_chart_and_says_then_what_was_found(page, study):
    ids = [a["id"] for _, a in page.elements if "id" in a]
    order = [i for i in ids if f"#{i}" in {a["href"] for a in page.all("a")} and i != "main"]
    assert order[:4] == ["advice", "quality", "found", "winners"]
    assert order[-2:] == ["records", "about"]
    said = page.text()
    for sentence in findings.findings(study, FD):
        assert sentence in said
    found = claims.verdicts(claims.Evidence.of(study), FD)
    assert [v.number for v in found] == [1, 2, 3, 4, 5, 6]
    for verdict in found:
        assert verdict.headline in said and verdict.test in said
        assert not verdict.tested or verdict.outcome.capitalize() in said
    # Those without records share one line.
    untested = [str(v.number) for v in found if not v.tested]
    assert len(page.all("article")) == 6 - len(untested)
    assert f"Not tested here: claims {labels.listing(untested)}" in page.inside("summary")


def test_what_is_missing_is_not_folded_away(tmp_path, study):
    some = [r for r in study if r.identity.seed_block == 0 or r.identity.steps > 4]
    missing = findings.incomplete(some, FD, 0, 1)
    text = report.write(tmp_path, some, tmp_path / "none", report.Context()).read_text("utf-8")
    shown, folded = text.split('<details class="more">')
    assert missing and all(sentence in shown for sentence in missing)
    all_of = findings.findings(some, FD)
    assert all_of[2] in shown and all_of[3] in folded.split("</details>")[0]


def test_budgets_that_read_alike_share_a_row(study, monkeypatch):
    """Whatever the digits that are not shown."""
    found = curves.quality_curves(study, FD)
    one = winners.winner_by_budget(found, FD, ("c8", "c16", "c24"), samplers={"ddim"})[-1]
    likely = [dataclasses.replace(one, budget=at, best=dataclasses.replace(one.best, probability=p))
              for at, p in ((2.0, 0.7501), (3.0, 0.7502), (4.0, 0.62), (5.0, 0.7501))]
    monkeypatch.setattr(winners, "winner_by_budget", lambda *a, **k: likely)
    rows = page_data.winner_rows(found, FD, (), "ddim")
    assert [row["budget"] for row in rows] == ["2.00 to 3.00", "4.00", "5.00"]


def test_it_says_what_the_measure_is_and_credits_the_pictures(page):
    said = page.text()
    assert "It is not FID" in said
    assert "seed block 0" in said and "512 images per configuration" in said
    assert "All emojis designed by OpenMoji" in said and "CC BY-SA 4.0" in said
    assert "https://openmoji.org" in {a["href"] for a in page.all("a")}


def test_every_picture_is_embedded_with_a_description(page, figures):
    pictures = {p.stem for p in figures.iterdir() if not p.name.startswith(".")}
    images = page.all("img")
    assert len(images) == len(pictures)
    assert all(len(a["alt"]) > 10 for a in images)
    assert all(a["src"].startswith(("data:image/png", "data:image/svg+xml")) for a in images)
    charts = [a for a in page.all("div") if a.get("class") == "chart"]
    assert len(charts) == 4 and all(len(a["data-label"]) > 40 for a in charts)


def test_the_interactive_data_hold_every_point(text, study):
    data = json.loads(_script(text))
    points = [p for c in curves.quality_curves(study, FD).values() for p in c]
    shown = {(p["model"], p["sampler"], p["steps"]): p for p in data["points"]
             if p["measure"] == FD}
    assert len(shown) == len(points)
    for p in points:
        q = shown[p.model, p.sampler, p.steps]
        assert q["value"] == pytest.approx(p.value, rel=1e-5)
        assert (q["low"], q["high"]) == (pytest.approx(p.low, rel=1e-5),
                                         pytest.approx(p.high, rel=1e-5))
        # The band holds all of the curve at once: it is wider than the interval of a point.
        assert q["band_low"] < q["value"] < q["band_high"]
        assert q["band_high"] - q["band_low"] > 0.95 * (q["high"] - q["low"])
    assert len(data["cells"]) == sum(r.identity.seed_block == 0 for r in study)
    for won in data["winners"]:
        for budget in won["budgets"]:
            assert sum(c["probability"] for c in budget["contenders"]) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("blocks", [(1,), (1, 2)], ids=["one block", "two blocks"])
def test_the_page_carries_the_advice_at_every_budget(tmp_path, study, blocks):
    study = [dataclasses.replace(r, device="2 CPU cores") for r in study]
    for r in [r for r in study if r.identity.seed_block == 1 and 2 in blocks]:
        values = {name: 1.01 * v for name, v in r.metrics.items()}
        other = dataclasses.replace(r.identity, seed_block=2)
        study.append(dataclasses.replace(r, identity=other, metrics=values))
    context = report.Context(report_blocks=blocks)
    data = json.loads(_script(report.write(tmp_path, study, tmp_path, context).read_text("utf-8")))
    assert [u["unit"] for u in data["advice"]] == ["cost", "seconds", "gflops"]
    for told in data["advice"]:
        unit, points, pieces = told["unit"], told["points"], told["pieces"]
        options = options_lib.of_records(study, unit, FD, report_blocks=blocks)
        costs = sorted(p.cost for p in options.points)
        for budget in (v * f for v in costs for f in (0.9999, 1.0, 1.0001)):
            # As the page's script looks it up.
            piece = [p for p in pieces if p["from"] <= budget * (1 + 1e-9)][-1:]
            if not piece:
                with pytest.raises(UserError, match="is below the cheapest"):
                    advice.advise(options, Budget(budget, unit))
                continue
            (piece,) = piece
            found = advise_cli.plain(advice.advise(options, Budget(budget, unit)))
            for name in ("best", "runner_up"):
                point = None if piece[name] is None else points[piece[name]]
                row = point and {k: v for k, v in point.items() if k not in ("name", "label")}
                assert (row and {**row, unit: row["cost"]}) == (
                    found[name] and {"cost": found[name][unit], **_without(found[name])})
            assert piece["probability"] == found["probability_runner_up_is_better"]
            assert (piece["advantage"] and piece["advantage"][0]) == found["advantage"]
            front = [points[k] for k in told["front"] if points[k]["cost"] <= budget * (1 + 1e-9)]
            assert [(p["cost"], p["value"]) for p in front] == [
                (p[unit], p["value"]) for p in found["front"]]
            extra = told["beyond"] if budget > costs[-1] else []
            assert sorted([*told["notes"], *piece["notes"], *extra]) == sorted(found["notes"])


def _without(row):
    return {k: v for k, v in row.items() if k != "num_images"}


def test_seconds_of_two_devices_give_no_budget(text):
    data = json.loads(_script(text))
    assert [u["unit"] for u in data["advice"]] == ["cost", "gflops"]
    assert all(any("do not compare" in note for note in u["notes"]) for u in data["advice"])
    assert {w["axis"] for w in data["winners"]} == {"cost"} and "do not compare" in (
        data["incomparable"])
    assert '<option value="seconds">seconds per image' not in text


def test_what_was_not_timed_costs_the_page_nothing_else(tmp_path):
    """Without any seconds nothing is drawn against them; with some, those points."""
    study = fake.make(models=("c8", "c16"), samplers=("ddim",), replicates=20)

    def page(records, name):
        told = report.Context(metric=FD)
        text = report.write(tmp_path / name, records, tmp_path / name, told).read_text()
        return text, json.loads(_script(text))

    text, data = page(fake.untimed(study), "none")
    assert [u["unit"] for u in data["advice"]] == ["cost", "gflops"]
    assert all(any("no measured seconds" in note for note in u["notes"]) for u in data["advice"])
    assert {w["axis"] for w in data["winners"]} == {"cost"}
    assert "The records hold no measured seconds, so nothing is drawn against them." in text
    assert {p["seconds"] for p in data["points"]} == {None}
    text, data = page(fake.untimed(study, lambda i: i.model == "c16"), "some")
    assert [u["unit"] for u in data["advice"]] == ["cost", "seconds", "gflops"]
    (seconds,) = [u for u in data["advice"] if u["unit"] == "seconds"]
    assert "c16" not in {p["model"] for p in seconds["points"]}
    assert min(p["cost"] for p in seconds["points"]) > 0
    assert all((p["seconds"] is None) == (p["model"] == "c16") for p in data["points"])
    assert "configurations, of c16, have no measured seconds" in text


def _images(text):
    return json.loads(re.search(
        r'<script type="application/json" id="study-images">(.*?)</script>', text, re.S).group(1))


def test_points_carry_their_own_pictures_as_many_as_the_page_holds(tmp_path, study, monkeypatch):
    drawn = fake.images(("c8", "c16", "c24"), n=8, size=16)
    chosen = [r.identity for r in study if r.identity.seed_block == 1]
    for i in chosen:
        strip = np.concatenate(drawn[i.model, i.sampler, i.steps], axis=1)
        pictures.save_png(tmp_path / "strips" / f"{i.key}.png", strip)
    lost, damaged = (tmp_path / "strips" / f"{i.key}.png" for i in chosen[:2])
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:200])

    def write():
        path = report.write(tmp_path, study, tmp_path / "none", report.Context(captions=[NASTY]),
                            [tmp_path / "strips"])
        return path.read_text("utf-8")

    whole = write()
    found = _images(whole)
    assert found["captions"] == [NASTY] and found["note"] == ""
    assert {tuple(cell.split("\n")) for cell in found["points"]} == {
        (i.model, i.sampler, str(i.steps)) for i in chosen[2:]}
    for cell, uris in found["points"].items():
        model, sampler, steps = cell.split("\n")
        assert uris == [thumbnails.encode(x) for x in drawn[model, sampler, int(steps)]]
    # Less room: fewer of each, the first ones; then none at all.
    for most, count in ((len(whole.encode()) - 9, range(4, 8)), (1, [0])):
        monkeypatch.setattr(report, "MOST_BYTES", most)
        text = write()
        fewer = _images(text)
        assert len(text.encode()) <= most or not fewer["points"]
        shown = {len(uris) for uris in fewer["points"].values()} or {0}
        assert len(shown) == 1 and shown <= set(count)
        assert all(uris == found["points"][cell][: len(uris)]
                   for cell, uris in fewer["points"].items())
        assert "Of the 8 pictures kept of each point" in fewer["note"]


def test_the_same_input_gives_the_same_bytes(tmp_path, study, figures, text):
    shuffled = list(study)
    random.Random(1).shuffle(shuffled)
    assert report.write(tmp_path, shuffled, figures, CONTEXT).read_text("utf-8") == text


@pytest.mark.parametrize("keep", [
    lambda i: i.seed_block == 0,
    lambda i: i.model == "c8",
    lambda i: i.steps == 4,
    lambda i: i.guidance == 3.0,
    lambda i: (i.model, i.sampler) != ("c24", "ddim"),
], ids=["no report", "one size", "one step count", "one rate", "a curve missing"])
def test_an_unfinished_study_still_gives_a_page(tmp_path, study, keep):
    some = [r for r in study if keep(r.identity)]
    path = report.write(tmp_path, some, tmp_path / "no figures", report.Context())
    found = _Page(path.read_text("utf-8"))
    assert found.broken == [] and found.open == []
    assert len([a for a in found.all("tr") if "data-model" in a]) == len(some)


def test_a_measure_that_rounds_of_a_race_lack_is_reported(tmp_path, study):
    """At the guidance that another chose; advice, which weighs on the other block, is refused."""
    some = []
    for r in (r for r in study if r.identity.sampler == "ddim"):
        if r.identity.seed_block:
            more = {"recall": 1 / r.metrics[FD]}
            r = dataclasses.replace(r, metrics=r.metrics | more)
        else:
            r = dataclasses.replace(r, round=1)
        some.append(r)
    path = report.write(tmp_path, some, tmp_path / "none", report.Context())
    found = _Page(path.read_text("utf-8"))
    assert found.broken == [] and f"{1 / some[-1].metrics[FD]:.4f}" in found.text()
    _, drawn = curves.chosen_curves(curves.distinct(some), "recall", FD)
    best = curves.quality_curves(curves.distinct(some), FD)
    assert {k: [p.guidance for p in v] for k, v in drawn.items()} == {
        k: [p.guidance for p in v] for k, v in best.items()}
    with pytest.raises(UserError, match="rates raced.*name another measure"):
        options_lib.of_records(some, "cost", "recall")


def test_no_two_measures_have_one_short_name():
    short = [m.short for m in labels.MEASURES.values()]
    assert len({*short}) == len(short)


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (-0.0, "0"), (1234.4, "1234"), (99.96, "100"), (56.72, "56.7"), (3.214, "3.21"),
    (0.00614, "0.00614"), (1.4e-4, "0.000140"), (-6.14e-5, "-0.0000614"), (4.1e-8, "4.10e-8"),
    (2.5e12, "2.50e12"),
])
def test_numbers_keep_three_digits(value, text):
    assert labels.number(value) == text


def test_the_ends_of_an_interval_are_of_one_style():
    assert labels.interval(8.5e-7, 2.2e-6) == "[0.000000850, 0.00000220]"
    assert labels.interval(-4e-7, 3e-7) == "[-4.00e-7, 3.00e-7]"
    assert labels.interval(-1e-12, 0.5) == "[0, 0.500]"
    assert [*map(labels.brief, (242_134.0, 2.41e-5, 23.44))] == ["242k", "2.4e-5", "23.4"]


def test_frechet_distances_are_explained_where_there_are_some(tmp_path, study):
    for name, there in (("kid_clean", False), ("fid_clean", True)):
        some = [dataclasses.replace(
            r, metrics={name: r.metrics[FD]}, intervals={name: r.intervals.get(FD, (1.0, 2.0))},
            replicates={name: r.replicates.get(FD, [])}) for r in study]
        told = report.Context(metric=name)
        text = report.write(tmp_path, some, tmp_path / "none", told).read_text("utf-8")
        assert ("Fréchet" in text[text.index("<h3>Protocol"):]) == there


def test_where_there_is_one_guidance_rate_none_is_chosen(tmp_path, study):
    for rates, several in (((3.0,), False), ((3.0, 5.0), True)):
        some = [r for r in study if r.identity.guidance in rates]
        text = report.write(tmp_path, some, tmp_path / "none", report.Context()).read_text("utf-8")
        for said in ("The best guidance rate of each size", "The rate was chosen on one set",
                     "Along a line the guidance rate rises"):
            assert (said in text) == several
        assert ('class="none"><input type="checkbox" id="quality-all"' in text) != several


def test_mistakes_are_named(tmp_path, study):
    with pytest.raises(UserError, match="no records.*run the sweep"):
        report.write(tmp_path, [], tmp_path, report.Context())
    with pytest.raises(UserError, match="no measure is called 'fid'"):
        report.write(tmp_path, study, tmp_path, report.Context(metric="fid"))
    assert list(tmp_path.iterdir()) == []
