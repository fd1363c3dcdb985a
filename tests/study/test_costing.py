"""Costs of a picture: units agree with each other, with the records, and with what was measured."""

import dataclasses
import itertools

import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import budgets, costing
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.costing import Counted, Price
from tests.study import fake_records as fake

PRICE = Price(
    "39m", gflops=56.0, norm_cost=0.07, decoder_gflops=2500.0, text_gflops=46.0, device="here",
    seconds={
        ("network", 1): 0.010, ("guided", 1): 0.016, ("decoder", 1): 0.05, ("text", 1): 0.004,
        ("network", 8): 0.006, ("guided", 8): 0.011, ("decoder", 8): 0.03, ("text", 8): 0.001,
    },
)
EVERY = [Counted(*on) for on in itertools.product((False, True), repeat=3)]


def test_the_papers_convention_is_the_records_own():
    for record in fake.make(models=("c8", "c48"), replicates=0):
        i = record.identity
        price = Price(i.model, record.gflops, record.norm_cost)
        calls = costing.calls(i.sampler, i.steps)
        spent = costing.sampling(price, calls, i.guidance != 1, "cost")
        assert spent == pytest.approx(record.cost)


@pytest.mark.parametrize("sampler, calls", [
    ("ddim", 12), ("ddpm", 12), ("dpmpp_2m", 12), ("ddim:eta=1", 12), ("heun", 23), ("unipc", 12),
])  # fmt: skip
def test_network_calls(sampler, calls):
    assert costing.calls(sampler, 12) == calls


@pytest.mark.parametrize("counted", EVERY, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_cost_and_flops_differ_by_the_reference_networks_flops(counted, guided):
    spent = {u: costing.sampling(PRICE, 20, guided, u, counted) for u in ("cost", "gflops")}
    assert spent["gflops"] / spent["cost"] == pytest.approx(56.0 / 0.07)


@pytest.mark.parametrize("unit", ["cost", "gflops", "calls"])
def test_doubling_doubles_what_is_guided_and_nothing_else(unit):
    def spent(guided, doubled):
        return costing.sampling(PRICE, 20, guided, unit, Counted(doubled=doubled))

    assert spent(True, True) == 2 * spent(True, False) == 2 * spent(False, True)
    assert spent(False, False) == spent(True, False)


def test_of_a_guidance_interval_the_calls_within_are_pairs():
    def spent(unit, guided=True, doubled=True):
        return costing.sampling(PRICE, 20, guided, unit, Counted(doubled), guided_calls=5)

    assert spent("calls") == 25 and spent("gflops") == pytest.approx(25 * 56.0)
    assert spent("seconds") == pytest.approx(5 * 0.016 + 15 * 0.010)
    for unit, one in (("calls", 1), ("gflops", 56.0), ("seconds", 0.010)):
        assert spent(unit, guided=False) == spent(unit, doubled=False) == pytest.approx(20 * one)


@pytest.mark.parametrize("unit", ["cost", "gflops", "seconds"])
def test_decoder_and_text_are_paid_once_whatever_the_steps(unit):
    for guided in (False, True):
        extra = [
            costing.sampling(PRICE, n, guided, unit, Counted(True, True, True))
            - costing.sampling(PRICE, n, guided, unit, Counted(True))
            for n in (1, 50)
        ]
        assert extra[0] > 0 and extra[0] == pytest.approx(extra[1])


def test_seconds_are_those_measured():
    def spent(guided, batch=1, **kw):
        return costing.sampling(PRICE, 10, guided, "seconds", Counted(batch=batch, **kw))

    assert spent(True, doubled=True) == pytest.approx(0.16)
    assert spent(False, doubled=True) == spent(True) == pytest.approx(0.10)
    assert spent(True, batch=8, doubled=True, decoder=True, text=True) == pytest.approx(0.141)
    assert PRICE.batches == [1, 8]


def test_what_is_not_there():
    with pytest.raises(UserError, match=r"guided at batch size 4.*\[1, 8\].*ldm-scaling cost "
                                        r"--member=39m --batch=4"):
        costing.sampling(PRICE, 10, True, "seconds", Counted(True, batch=4))
    with pytest.raises(UserError, match="decoder and text are no network calls"):
        costing.sampling(PRICE, 10, True, "calls", costing.ALL)
    bare = dataclasses.replace(PRICE, decoder_gflops=None)
    with pytest.raises(UserError, match="FLOPs of the decoder are not known"):
        costing.sampling(bare, 10, True, "gflops", costing.ALL)
    with pytest.raises(UserError, match="unit='euros'"):
        costing.sampling(PRICE, 10, True, "euros")
    with pytest.raises(UserError, match="gflops=0.0 must be above 0"):
        Price("39m", 0.0, 1.0)


def test_labels_name_the_unit_and_what_is_counted():
    names = {costing.label(u, c, "H100") for u in costing.UNITS for c in EVERY}
    assert len(names) == 4 * 8, "two ways of counting have one name"
    assert "not doubled" in costing.label("cost") and "H100" in costing.label("seconds",
                                                                             device="H100")


@pytest.mark.parametrize("text, value, unit", [
    ("400ms", 0.4, "seconds"), ("0.4 s", 0.4, "seconds"), ("2 seconds", 2, "seconds"),
    ("3 cost", 3, "cost"), (" 3.5COST ", 3.5, "cost"), ("1e12 flops", 1000, "gflops"),
    ("1 TFLOPs", 1000, "gflops"), ("500 gflops", 500, "gflops"), ("1e+3 GFLOPS", 1000, "gflops"),
    ("40 tflop", 40_000, "gflops"), ("5 mflops", 0.005, "gflops"), ("1 pflops", 1e6, "gflops"),
    ("250us", 2.5e-4, "seconds"), ("2 min", 120, "seconds"),
])  # fmt: skip
def test_budgets_as_people_write_them(text, value, unit):
    found = budgets.parse(text)
    assert found.unit == unit and found.value == pytest.approx(value)


@pytest.mark.parametrize("text", [
    "", "3", "cost", "three cost", "3 euros", "-3 cost", "0 ms", "nan cost", "1e999 s", "1.2.3 s",
    "3 cost 4",
])  # fmt: skip
def test_what_is_no_budget_shows_the_forms(text):
    with pytest.raises(UserError, match='"3 cost".*"20ms".*"1 gflops".*one picture'):
        budgets.parse(text)


@pytest.mark.parametrize("value", [
    1.2339719, 0.12007205, 0.00205812, 2.0, 0.9996, 9.999, 99.96, 999.7, 1234.5, 98765.4, 3.3e-7,
])  # fmt: skip
def test_a_cost_that_is_printed_pays_for_itself_and_for_nothing_dearer(value):
    text = budgets.rounded_up(value)
    assert "e" not in text and value <= float(text) * (1 + 1e-9) <= value * 1.01
    dearer = value * (1 + 1e-5)
    typed = budgets.parse(f"{budgets.rounded_up(value, dearer)} cost").value
    assert value <= typed * (1 + 1e-9) < dearer
    # What is no dearer but by rounding costs no digits.
    assert budgets.rounded_up(value, value * (1 + 1e-12)) == text


def test_amounts_say_what_was_asked_for():
    assert budgets.amount(3.0, "cost") == "3.00 cost"
    assert budgets.amount(1.23397, "cost") == "1.23397 cost"
    assert budgets.amount(1e300, "cost") == "1e+300 cost"
    assert budgets.spent(1.23397, "cost", 2.0) == "1.24 cost"
    assert budgets.spent(1.23397, "cost", 1.2345) == "1.23397 cost"


def test_a_budget_is_above_0():
    with pytest.raises(UserError, match="above 0"):
        Budget(0.0, "cost")
