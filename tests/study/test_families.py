"""Families at equal cost: of planted numbers, which family is best at which budget."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.study import families
from ldm_scaling.study.curves import Point
from ldm_scaling.study.figures import families as figure
from ldm_scaling.study.statistics import words
from tests.study import fake_records, paper_records

FID = paper_records.FID


def point(model, sampler, steps, cost, value, chosen_by=None):
    rng = np.random.default_rng([steps, int(100 * value)])
    replicates_R = value + 0.01 * rng.standard_normal(50)
    return Point(
        model, sampler, steps, 2.0, cost, 0.1, value, value - 0.1, value + 0.1,
        value if chosen_by is None else chosen_by, replicates_R, 100,
    )


# A DiT is best where little may be spent, a U-Net where much may be; a U-Net's best cell in between
# is one that only the selection block likes.
CURVES = {
    ("c8", "ddim"): [point("c8", "ddim", 4, 1.0, 30.0), point("c8", "ddim", 8, 2.0, 25.0, 31.0)],
    ("c24", "dpmpp_2m"): [point("c24", "dpmpp_2m", 4, 4.0, 12.0)],
    ("dit_w40", "ddim"): [point("dit_w40", "ddim", 4, 1.0, 20.0)],
    ("dit_w104", "ddim"): [point("dit_w104", "ddim", 4, 4.0, 15.0)],
}


def test_a_family_enters_with_what_the_selection_block_chose():
    found, winners = families.compared(CURVES, FID)
    unet, dit = found
    assert (unet.name, dit.name) == ("U-Net", "DiT")
    assert [(b, p.model, p.steps) for b, p in unet.frontier] == [
        (1.0, "c8", 4), (2.0, "c8", 4), (4.0, "c24", 4)]
    assert [(b, p.model) for b, p in dit.frontier] == [
        (1.0, "dit_w40"), (2.0, "dit_w40"), (4.0, "dit_w104")]
    assert [(w.budget, w.best.model) for w in winners] == [
        (1.0, "DiT"), (2.0, "DiT"), (4.0, "U-Net")]
    assert all(w.best.probability == 1.0 for w in winners)


def test_in_words():
    (sentence,) = families.sentences(CURVES, FID)
    assert "families U-Net (2 sizes, 3 cells) and DiT (2 sizes, 2 cells), each at" in sentence
    assert "at a budget of 1.00 DiT is the best family, with dit_w40 in 4 steps of DDIM" in sentence
    assert "at a budget of 4.00 U-Net is the best family, with c24 in 4 steps of" in sentence
    assert words.sure(1.0) in sentence


def test_sizes_of_one_family_are_the_ladder_that_claims_are_judged_on():
    assert families.ladder(["c8", "dit_w40", "c24"]) == ("U-Net", ["c8", "c24"])
    assert families.ladder(["c8", "dit_w40"]) == ("U-Net", ["c8"])
    assert families.ladder(["dit_w40", "mine", "dit_w104"]) == ("DiT", ["dit_w40", "dit_w104"])
    assert families.ladder(["mine", "c8"]) == ("U-Net", ["c8"])
    assert families.ladder(["c8", "c24"]) == ("", ["c8", "c24"])


@pytest.mark.parametrize("curves", [
    {}, {k: v for k, v in CURVES.items() if k[0] in ("c8", "c24")},
    {("c8", "ddim"): CURVES["c8", "ddim"], ("mine", "ddim"): [point("mine", "ddim", 1, 1.0, 1.0)]},
])
def test_one_family_is_not_compared(curves):
    assert families.compared(curves, FID) == ([], []) and families.sentences(curves, FID) == []


class Source:
    curves, metric = CURVES, FID


def test_networks_of_no_family_are_told(caplog):
    assert figure.by_cost(Source) and not caplog.records

    class Own(Source):
        curves = {("c8", "ddim"): CURVES["c8", "ddim"], ("mine", "ddim"): CURVES["c8", "ddim"]}

    assert figure.by_cost(Own) == {}
    assert "families: mine left out" in caplog.text and "zoo.register" in caplog.text


def test_the_figure_shows_every_budget():
    (drawn,) = figure.by_cost(Source).values()
    assert {(r["family"], r["budget"], r["model"]) for r in drawn.rows} == {
        (f.name, b, p.model) for f in families.compared(CURVES, FID)[0] for b, p in f.frontier}
    assert {r["probability_best"] for r in drawn.rows} == {0.0, 1.0}


@pytest.mark.parametrize("models, said", [
    (("c8",), "One latent diffusion model, its samplers compared"),
    (("c8", "c24"), "A family of latent diffusion models that differ only in width, trained alike"),
    (("c8", "c24_s16"), "Latent diffusion models (U-Net) in several sizes, trained alike"),
    (("c8", "dit_w40"), "Latent diffusion models (U-Net and DiT) in several sizes"),
    (("mine", "yours"), "Latent diffusion models (other networks) in several sizes"),
])
def test_the_summary_says_what_the_networks_are(models, said):
    (first,) = fake_records.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)},
                                 guidance=(3.0,), report_blocks=())
    found = [dataclasses.replace(first, params=k, identity=dataclasses.replace(
        first.identity, model=m)) for k, m in enumerate(models)]
    assert families.summary(found).startswith(said)
    longer = dataclasses.replace(first.identity, model="c8", train_step=9)
    assert "trained alike" not in families.summary(
        [*found, dataclasses.replace(found[0], identity=longer)])
