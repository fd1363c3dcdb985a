"""Texts for a terminal are the same wherever they are made."""

from __future__ import annotations

import math
import types

import pytest
import rich.console

from ldm_scaling.models import autoencoder, text_encoder, zoo_table
from ldm_scaling.study import (
    advice,
    advise_cli,
    caching_cost,
    cost_cli,
    evaluate_show,
    plan_show,
    table_1,
)
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.cost_files import CostFile, Skipped
from ldm_scaling.study.evaluate import Score

PLAN = caching_cost.Plan(
    images=8, captions=8, side=32, autoencoder=autoencoder.AutoencoderSpec(8, (1, 2, 2), 1, 4, 4),
    text=text_encoder.BertSpec(layers=1), length=18, examples_per_second=100,
)
TEXTS = {
    "zoo": zoo_table.text,
    "cost": lambda: cost_cli.text(CostFile("Chip", "tpu", skipped=(
        Skipped("network", "c8", 8, "too large for [bold]:warning:[/bold]"),))),
    "caching": lambda: caching_cost.text(PLAN, []),
    "plan": lambda: plan_show.text([], 0.5),
    "advise": lambda: advise_cli.text(
        advice.advise(table_1.options("cost"), Budget(math.inf, "cost"))),
}


@pytest.mark.parametrize("name", TEXTS)
def test_notebooks_and_forced_colours_leave_texts_as_they_are(name, monkeypatch):
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    plain = TEXTS[name]()
    assert plain and plain == plain.strip("\n") and "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert TEXTS[name]() == plain
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert TEXTS[name]() == plain


def test_brackets_and_colons_are_said_as_they_are():
    assert "too large for [bold]:warning:[/bold]" in TEXTS["cost"]()


def test_a_tables_first_column_begins_where_its_heading_does():
    heading, line, row, *_ = TEXTS["zoo"]().splitlines()
    assert heading.index("name") == row.index("39m") == line.index("─")


def test_labels_of_scores_are_said_as_they_are(capsys):
    score = Score(
        name="mine", label="FD [mine]", better="lower", value=1.0, interval=None, n=2,
        extractor="net", features="a [net]", resizer="", against="", reference=None,
        reference_n=None, remark="", source="",
    )
    sets = types.SimpleNamespace(real=None, generated=types.SimpleNamespace(side=0))
    evaluate_show.show(sets, [], [score], None, {}, {})
    heading, _, row, *_, features = capsys.readouterr().out.splitlines()
    assert row.startswith(" FD [mine]   1.0000") and heading.startswith(" score")
    assert features == "features: a [net] (net)"
