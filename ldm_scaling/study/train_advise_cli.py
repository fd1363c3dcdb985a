"""`ldm-scaling advise --train-budget`: what it is asked of, and the advice in words or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath

from ldm_scaling import terminal
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import cost, zoo
from ldm_scaling.models.cost import Cost
from ldm_scaling.study import families, labels, places, repeated, train_advice, train_budgets
from ldm_scaling.study.arguments import pieces
from ldm_scaling.study.places import Places
from ldm_scaling.study.records import TEXT_TO_IMAGE
from ldm_scaling.study.statistics import scaling
from ldm_scaling.study.train_advice import Drawing, Estimate, TrainAdvice
from ldm_scaling.study.train_budgets import Rate, TrainBudget
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training.events import VALIDATION, read_curves

_PASSES = 4
"""Passes over the pictures that teach about as much as new ones: of language models, by Muennighoff
et al. 2023 (arXiv 2305.16264)."""
# Where the nearest network has so many times the best one's FLOPs, or less, it is near none.
_APART = 2.0
_BEYOND = ("smaller than any here: the smallest", "larger than any here: the largest")
# Flags of advice on drawing, which say nothing of training.
_OTHERS = ("sampler", "max_steps", "costs", "batch", "memory", "metric", "task", "select_block",
           "report_blocks")


def run(given: argparse.Namespace) -> None:
    """Prints the advice for `--train-budget`.

    Args:
      given: the flags of `advise`.

    Raises:
      UserError: for what the user can mend.
    """
    budget = train_budgets.parse(given.train_budget)
    _check(given, budget)
    home, study, found = _place(given.records)
    costs = _costs(found, pieces("--member", given.member or ()))
    every = {run: read_curves(Workdir(home).member(run))
             for run in repeated.networks(found.records, list(costs))}
    curves = {m: every[m] for m in costs}
    if bare := [m for m, rows in curves.items() if not rows]:
        path = Workdir(home).member(bare[0]) / "curves.csv"
        raise UserError(
            f"--train-budget goes by losses along training, and {path} is not there or holds none: "
            "put it back, or name other sizes by --member")
    params, calls = ({m: getattr(c, name) for m, c in costs.items()}
                     for name in ("params", "gflops"))
    batch = study.train.batch_size
    rate = None
    if given.device is not None:
        rate = train_budgets.of_chip(given.device, given.utilisation)
    elif budget.unit == "seconds":
        rate = train_budgets.of_curves(curves, calls, batch, study.start.passed)
        if rate is None:
            raise UserError(f"--train-budget={budget.text!r}: the curves in {home / 'models'} keep "
                            "no seconds of training: give --device=h100, or a budget in flops")
    losses = {
        run: [(step, value) for step, name, value in rows
              if name == VALIDATION and 0 < value < math.inf] for run, rows in every.items()
    }
    runs = scaling.of_losses(losses, params, calls, batch, scaling.SETTLED)
    gflops = budget.value * (rate.gflops if rate else 1.0)
    drawing = Drawing(given.pictures, given.calls) if given.pictures else None
    advice = train_advice.advise(runs, gflops, _sizes(costs), drawing)
    pictures = _pictures(study, home)
    notes = _notes(advice, study, pictures)
    if given.format == "json":
        print(json.dumps(plain(advice, budget, rate, batch, pictures, notes), indent=1,
                         allow_nan=False))
    else:
        print(text(advice, budget, rate, batch, pictures, notes))


def _check(given: argparse.Namespace, budget: TrainBudget) -> None:
    if given.budget is not None:
        raise UserError(
            "--train-budget chooses what to train and --budget how to draw: give one; then  advise "
            "--budget=... --member=SIZE  is of the size that was chosen")
    if given.published or not given.records:
        raise UserError(
            "--train-budget needs --records=WORKDIR, a study of your own: it goes by the losses "
            "along its training, and the paper publishes none")
    for name in _OTHERS:
        if getattr(given, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is of drawing pictures, and does not go "
                            "with --train-budget")
    if (given.pictures is None) != (given.calls is None):
        raise UserError(
            "--pictures=N and --calls=K go together here: so many are drawn from the budget too, "
            "each by K calls of the network (20 guided steps are 40)")
    if given.utilisation is not None and given.device is None:
        raise UserError("--utilisation is of a device's peak: it goes with --device=KIND")
    if given.device is not None and budget.unit != "seconds":
        raise UserError(f"--device says what a time is in FLOPs, and --train-budget={budget.text!r}"
                        ' is in FLOPs: leave it out, or give a time such as "300 h"')
    if budget.of_chips and given.device is None:
        raise UserError(
            f"--train-budget={budget.text!r}: curves do not say how many chips trained a study: "
            'give --device=h100, or the hours of all that trained this one, such as "300 h"')


def _place(texts: Sequence[str]) -> tuple[epath.Path, Study, Places]:
    """The one workdir, its last config and its records."""
    found = places.read(texts)
    if len(found.homes) > 1:
        raise UserError(f"--train-budget: {labels.listing([str(h) for h in found.homes])} are "
                        "several workdirs, and a law is of the runs of one: name one of them")
    (home,) = found.homes
    study = Workdir(home).last_config()
    if study.start.hash:
        raise UserError(f"--train-budget: members in {home} began with those of another study, "
                        "whose training their losses do not count")
    return home, study, found


def _costs(found: Places, asked: Collection[str]) -> dict[str, Cost]:
    """The sizes that were trained, of one family, in FLOPs rising."""
    costs = {
        r.identity.model: Cost(r.params, r.gflops)
        for r in sorted(found.records, key=lambda r: r.gflops)
        if r.task == TEXT_TO_IMAGE and r.identity.train_step > 0
    }
    if not costs:
        raise UserError("--train-budget: the records are of no members that were trained here")
    if lacking := [name for name in asked if name not in costs]:
        raise UserError(f"--member={lacking[0]}: there are {', '.join(sorted(costs))}")
    costs = {m: c for m, c in costs.items() if not asked or m in asked}
    if len(parts := families.parted(list(costs))) > 1:
        raise UserError(
            f"--train-budget: networks of {labels.listing(list(parts))} follow no one law: name "
            f"those of one by --member={','.join(max(parts.values(), key=len))}")
    return costs


def _sizes(costs: dict[str, Cost]) -> dict[str, Cost]:
    """These, and the zoo's of their family for the same latents and captions."""
    own = [zoo.MEMBERS[m].spec for m in costs if m in zoo.MEMBERS]
    alike = {(type(s), s.latent_shape, s.context_dim) for s in own}
    family = zoo.FAMILIES.get(zoo.family_of(next(iter(costs))), ())
    return costs | {
        m.name: cost.of(m.spec) for m in family if m.name not in costs
        and (type(m.spec), m.spec.latent_shape, m.spec.context_dim) in alike
    }


def _pictures(study: Study, home: epath.Path) -> int | None:
    """Of the training split; None where the data are not here to be counted."""
    from ldm_scaling.study import preparing

    root = Workdir(home) / "data"
    if study.data.composed:
        return study.data.train_pictures
    try:
        found = preparing.of(study.data, root) if preparing.prepared(study.data, root) else ()
    except UserError:  # They are damaged, which is no matter of this.
        found = ()
    return sum(d.count("train") for d in found) or None


# --- what is printed ----------------------------------------------------------------------------


def _notes(advice: TrainAdvice, study: Study, pictures: int | None) -> list[str]:
    """What it goes by, and what it cannot know."""
    law, share = advice.law, advice.with_best / advice.replicates
    (a, b), (alpha, beta) = law.factors, law.exponents
    again = f" in {advice.runs} training runs" if advice.runs > len(advice.models) else ""
    out = [
        f"Training is counted as {scaling.BACKWARD:.0f} x the FLOPs of a call x pictures (forward, "
        "and backward twice that), as in law_isoflop" + (
            ", drawing as the FLOPs of its calls, at the same rate where the budget is a time"
            if advice.drawing else "") + "; work of the autoencoder, of captions and of validation "
        "is not in it.",
        f"By the law E + A / F^a + B / D^b of F GFLOPs a call and D pictures, through "
        f"{advice.points} validation losses of {labels.listing(advice.models)}{again}: E = "
        f"{law.offset if law.offset > 1e-6 else 0:.3g}, A = {a:.3g}, a = {alpha:.3g}, B = {b:.3g}, "
        f"b = {beta:.3g}. "
        f"{advice.with_best} of {advice.replicates} replicates of it have a best size; intervals "
        "are theirs, 95%" + (
            "." if share >= 1 - scaling.WITHOUT_BEST else
            ", and too narrow for want of the others: these runs hardly tell one."),
        _reach(advice),
    ]
    if not pictures:
        out.append("How many passes over the training pictures that is, is not known: they are not "
                   "here to be counted.")
    elif (passes := advice.images[0] / pictures) > max(
            done := advice.measured["images"][1] / pictures, _PASSES):
        out.append(
            f"That is beyond what the data hold: {_number(passes)} passes over {pictures:,} "
            f"training pictures, where the runs made up to {_number(done)}. Pictures seen again "
            "teach less than new ones, of which the law knows nothing: take more pictures, or a "
            "smaller budget.")
    if study.train.decay[0] != "none":
        out.append(
            f"The learning rate falls along these runs ({study.train.learning_rate_decay}): their "
            "middles are worse than the ends of shorter runs would be, so the law is too fond of "
            "long training.")
    out.append("A validation loss is not the pictures' quality" + (
        f", and knows nothing of what {advice.drawing.calls} calls make of it: --budget weighs "
        "that for the sizes that were trained." if advice.drawing else
        ", and what drawing them costs is not in it: --budget weighs both for the sizes that were "
        "trained."))
    return out


def _reach(advice: TrainAdvice) -> str:
    """How far the budget, and what it is spent on, lie from what was measured."""
    (least, most), (smallest, largest), (_, longest) = (
        advice.measured[name] for name in ("compute", "size", "images"))
    measured = f"{least * 1e9:.3g} to {_flops(most)}"
    what = f"Its training, {_flops(advice.training)}," if advice.drawing else "The budget"
    if advice.training < least:
        return (f"{what} is {_times(least / advice.training)} below what was measured, {measured}: "
                "the law is followed back there.")
    beyond = [f"{_times(x)} {where}" for x, where in (
        (advice.size[0] / largest, "the largest network's FLOPs"),
        (smallest / advice.size[0], "fewer FLOPs than the smallest network's"),
        (advice.images[0] / longest, "the pictures of the longest run")) if x > 1]
    spent = f" It goes into {labels.listing(beyond)}." if beyond else ""
    if advice.training <= most * (1 + 1e-9):
        return f"{what} lies within what was measured, {measured}.{spent}"
    return (f"{what} is {_times(advice.training / most)} the most that was measured ({measured})."
            f"{spent} Intervals suppose that the law goes on so far; whether it does, and which "
            "learning rate such a network wants, no run here tells.")


def _flops(gflops: float) -> str:
    return f"{gflops * 1e9:.3g} FLOPs"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else labels.number(value)


def _ends(estimate: Estimate, say) -> str:
    """An estimate with its interval."""
    value, low, high = map(say, estimate)
    return f"{value} [{low}, {high}]"


def _times(value: float) -> str:
    return f"{_number(value)} times" if math.isfinite(value) else "never"


def text(
    advice: TrainAdvice, budget: TrainBudget, rate: Rate | None, batch: int, pictures: int | None,
    notes: Sequence[str],
) -> str:
    """The advice for a terminal; no line is longer than 100 characters."""
    console = terminal.console()
    near = advice.nearest
    drawing, of = advice.drawing, "training"
    paid = "budget" if drawing else "training"
    if drawing:
        of += (f" and {labels.counted(drawing.pictures, 'picture')} of "
               f"{labels.counted(drawing.calls, 'call')}")
    console.print(f"For {budget.text} of {of}" + (
        f", {_flops(advice.gflops)}" if rate else "") + ": a network of "
        f"{_ends(advice.size, _number)} GFLOPs a call")
    apart, there = advice.size[0] / near.gflops, [s.gflops for s in advice.sizes]
    beyond = not 1 / _APART < apart < _APART and not min(there) < advice.size[0] < max(there)
    console.print(
        f"  {_BEYOND[apart > 1] if beyond else 'nearest'} is {near.name}: "
        f"{labels.number(near.gflops)} GFLOPs, {labels.count(near.params)} parameters")
    passes = f", {_number(advice.images[0] / pictures)} passes" if pictures else ""
    console.print(f"  trained on {_ends(advice.images, labels.count)} pictures: "
                  f"{labels.count(advice.images[0] / batch)} steps of {batch}{passes}")
    console.print(f"  expect validation loss {_ends(advice.loss, labels.number)}")
    if drawing:
        console.print(f"  of the budget {advice.training / advice.gflops:.0%} trains and "
                      f"{1 - advice.training / advice.gflops:.0%} draws")
    half, *ends = advice.half
    console.print(
        "A network of half the FLOPs never comes to that loss" if math.isinf(half) else
        f"A network of half the FLOPs comes to that loss by {_number(half)} "
        f"[{', '.join(_number(x) if math.isfinite(x) else 'never' for x in ends)}] times the "
        f"{paid}")
    table = terminal.table("size", "parameters", "GFLOPs a call", "pictures", "steps", "loss",
                           f"{paid} for the best's loss")
    for s in advice.sizes:
        table.add_row(
            s.name, labels.count(s.params), labels.number(s.gflops), *(
                (labels.count(s.images), labels.count(s.images / batch), labels.number(s.loss))
                if s.images else ("none", "none", "")), _times(s.times))
    console.print(f"\nThe same {paid} spent on each size:")
    console.print(table)
    if rate:
        console.print(f"Hours are counted at {train_budgets.per_second(rate.gflops)}: {rate.words}"
                      ".")
    for note in notes:
        console.print(note)
    return terminal.text(console)


def plain(
    advice: TrainAdvice, budget: TrainBudget, rate: Rate | None, batch: int, pictures: int | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The advice ready for JSON; what is not known, or infinite, is None."""
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def estimate(found: Estimate) -> dict[str, float | None]:
        return dict(zip(("value", "low", "high"), map(finite, found), strict=True))

    law = advice.law
    return {
        "budget": budget.text, "flops": advice.gflops * 1e9,
        "training_flops": advice.training * 1e9,
        "seconds": budget.value if budget.unit == "seconds" else None,
        "flops_per_second": rate and {
            "value": rate.gflops * 1e9, "low": rate.low * 1e9, "high": rate.high * 1e9,
            "of": rate.words},
        "best": {
            "gflops": estimate(advice.size), "images": estimate(advice.images),
            "steps": advice.images[0] / batch, "batch_size": batch,
            "passes": pictures and advice.images[0] / pictures, "loss": estimate(advice.loss)},
        "drawing": advice.drawing and {
            **dataclasses.asdict(advice.drawing), "share": 1 - advice.training / advice.gflops},
        "nearest": advice.nearest.name,
        "half_size_times_training": estimate(advice.half),
        "sizes": [{
            "model": s.name, "params": s.params, "gflops": s.gflops, "images": s.images,
            "steps": s.images / batch, "loss": finite(s.loss), "times_training": finite(s.times)}
            for s in advice.sizes],
        "law": {"E": law.offset, "A": law.factors[0], "alpha": law.exponents[0],
                "B": law.factors[1], "beta": law.exponents[1], "points": advice.points,
                "models": list(advice.models)},
        "replicates": advice.replicates, "replicates_with_best": advice.with_best,
        "times_beyond_measured": advice.training / advice.measured["compute"][1],
        "train_pictures": pictures, "notes": list(notes),
    }
