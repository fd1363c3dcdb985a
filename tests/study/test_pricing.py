"""What options cost: one reference, seconds of one measurement, training's share; and which of them
are asked for."""

import dataclasses
import re

import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import advice, advise_cli, pricing
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.pricing import Training
from tests.study import fake_records as fake
from tests.study.fake_records import cell, within


@pytest.fixture(scope="module")
def exact():
    return fake.make(noise=0.0, shared=0.0)


@pytest.fixture(scope="module")
def study():
    return fake.make()


def test_what_costs_1_is_said_and_is_one_thing(study):
    """Records of studies with other references, weighed together, count in calls of one."""
    found = within(study, 3.0)
    assert "A cost of 1 is one call of c48, 2.10 GFLOPs." in found.notes
    assert advise_cli.plain(found)["reference"] == {"model": "c48", "gflops": pytest.approx(2.1)}
    half = fake.norm_cost("c16")
    moved = [
        dataclasses.replace(r, norm_cost=r.norm_cost / half)
        if r.identity.model in ("c8", "c16") else r for r in study
    ]
    other = within(moved, 3.0)
    assert cell(other.best) == cell(found.best)
    assert [p.cost for p in other.front] == pytest.approx([p.cost for p in found.front])
    (note,) = [n for n in other.notes if "count cost in calls of c16" in n]
    assert note.endswith("all are counted in those of c48 here.")
    assert within(moved, 3.0, "gflops").options.reference is None
    alone = within([r for r in study if r.identity.model == "c8"], 3.0)
    assert "A cost of 1 is one call of a network of 2.10 GFLOPs." in alone.notes


def test_seconds_of_several_measurements_are_doubted(study):
    """What a picture takes beside its calls is no doubt, nor is a small difference."""
    def notes(change):
        return " ".join(within([change(r) for r in study], 100.0, "seconds").notes)

    def slow(r, factor, model, steps):
        there = r.identity.model == model and r.identity.steps >= steps
        return dataclasses.replace(
            r, seconds_per_image=r.seconds_per_image * (factor if there else 1))

    assert "one measurement" not in notes(lambda r: r) and "slower" not in notes(lambda r: r)
    more = notes(lambda r: dataclasses.replace(r, seconds_per_image=r.seconds_per_image + 1.0))
    assert "one measurement" not in more
    assert "one measurement" not in notes(lambda r: slow(r, 1.3, "c16", 50))
    told = notes(lambda r: slow(r, 3.0, "c16", 50))
    assert "places: those of c16 are not of one measurement" in told
    # What is not of calls may be any share: at least so many times.
    assert 1.5 < float(told.split("differ by up to ")[1].split()[0]) <= 3.0
    assert "--device=KIND" in told
    told = notes(lambda r: slow(r, 5.0, "c8", 0))
    assert "one measurement" not in told
    assert "places: c8 is up to" in told and "slower than c16" in told
    assert "slower" not in " ".join(within(study, 100.0, "cost").notes)


def test_what_was_not_timed_is_not_free(exact):
    """It takes no part in budgets in seconds, its device neither; of the rest nothing changes."""
    some = fake.untimed(exact, lambda i: i.model in ("c16", "c48"))
    rest = [r for r in exact if r.identity.model not in ("c16", "c48")]
    found, alone = within(some, 0.1, "seconds"), within(rest, 0.1, "seconds")
    assert [(cell(p), p.cost) for p in found.front] == [(cell(p), p.cost) for p in alone.front]
    assert "28 of 70 configurations, of c16 and c48, have no measured seconds" in found.notes[0]
    elsewhere = [dataclasses.replace(r, device="" if not r.seconds_per_image else r.device)
                 for r in some]
    assert cell(within(elsewhere, 0.1, "seconds").best) == cell(found.best)
    assert cell(within(some, 3.0).best) == cell(within(exact, 3.0).best)
    with pytest.raises(UserError, match="holds measured seconds .* a budget in cost or flops"):
        within(fake.untimed(exact), 0.1, "seconds")
    reported = fake.untimed(exact, lambda i: i.seed_block == 1)
    with pytest.raises(UserError, match="no record of the reported seed blocks .* seconds"):
        within(reported, 0.1, "seconds")


def test_of_a_guidance_interval_the_rows_within_are_paid_twice(study):
    """In FLOPs; the paper's cost is of calls. Records that do not tell have paid for all."""
    record = next(r for r in study if r.calls == 10 and r.identity.guidance != 1)
    i, calls = record.identity, {}
    for pairs in (None, 10, 4, 0):
        some = [dataclasses.replace(record, guided_calls=pairs)]
        for unit in ("gflops", "cost"):
            price = pricing.of_points(some, unit, None, pricing.COUNTED[unit])
            one = record.gflops if unit == "gflops" else record.norm_cost
            calls[pairs, unit] = price(i) / one
    assert [calls[n, "gflops"] for n in (None, 10, 4, 0)] == pytest.approx([20, 20, 14, 10])
    assert {round(calls[n, "cost"], 9) for n in (None, 10, 4, 0)} == {10}
    # One table has one number of them: a record that does not tell is paid as one that does.
    told = dataclasses.replace(record, guided_calls=4)
    earlier = dataclasses.replace(record, guided_calls=None)
    for some in ([told, earlier], [earlier, told]):
        price = pricing.of_points(some, "gflops", None, pricing.COUNTED["gflops"])
        assert price(i) / record.gflops == pytest.approx(14)
    # Rows that evaluate once take half the seconds: no sign of another measurement.
    half = dataclasses.replace(
        record, guided_calls=0, seconds_per_image=record.seconds_per_image / 2)
    assert not pricing.doubts([record, half])


def test_training_is_spread_over_the_pictures(exact):
    """3 x GFLOPs x examples over N; with few pictures the small sizes pay off."""
    for pictures in (10**3, 10**9):
        training = Training(64, pictures)
        options = options_lib.of_records(exact, "gflops", training=training)
        plain = options_lib.of_records(exact, "gflops")
        for p, q in zip(options.points, plain.points, strict=True):
            share = 3 * 2.1 * fake.norm_cost(p.model) * 2000 * 64 / pictures
            assert p.cost == pytest.approx(q.cost + share)
        (note,) = [n for n in options.notes if n.startswith("Counted are sampling and a share")]
        assert f"over {pictures:,} pictures" in note and "64 examples" in note
    few, many = (
        advice.advise(options_lib.of_records(exact, "gflops", training=Training(64, n)),
                      Budget(210.0, "gflops")).best.model for n in (2_000, 10**9))
    assert few != "c48" == many
    with pytest.raises(UserError) as said:
        within(exact, 60.0, "gflops", training=Training(64, 500))
    share = 3 * 2.1 * fake.norm_cost("c8") * 2000 * 64 / 500
    assert f"of which {share:.5g} GFLOPs are its training, spread over 500 pictures; it" in str(
        said.value)
    assert "a budget is of drawing" not in str(said.value)
    n = int(re.search(r"suffices for --pictures=(\d+) and more", str(said.value))[1])
    assert within(exact, 60.0, "gflops", training=Training(64, n)).best.model == "c8"
    with pytest.raises(UserError, match="below the cheapest"):
        within(exact, 60.0, "gflops", training=Training(64, int(n / 1.01)))
    with pytest.raises(UserError, match="no number of pictures is enough, for drawing alone takes"):
        within(exact, 1e-3, "gflops", training=Training(64, 1))
    with pytest.raises(UserError, match="--pictures goes with a budget in FLOPs"):
        options_lib.of_records(exact, "cost", training=training)
    with pytest.raises(UserError, match="--task=text_to_image is advice on members alone"):
        options_lib.of_records(
            [*exact, *fake.students(exact)], "gflops", training=training)
    published = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=0))
                 for r in exact]
    with pytest.raises(UserError, match="was not trained here"):
        options_lib.of_records(published, "gflops", training=training)


def early(records, worse, steps=500, blocks=(0, 1)):
    """The records' checkpoints after fewer steps: one cell of each size, its distance larger."""
    return [
        dataclasses.replace(
            r, metrics={k: v + worse for k, v in r.metrics.items()},
            replicates={k: [x + worse for x in v] for k, v in r.replicates.items()},
            identity=dataclasses.replace(r.identity, train_step=steps))
        for r in records if (r.identity.sampler, r.identity.steps) == ("ddim", 10)
        and r.identity.seed_block in blocks
    ]


def test_with_pictures_each_checkpoint_is_an_option(exact):
    """One that is a little worse pays where few pictures are drawn, and at its own share."""
    both = [*early(exact, 2.0), *exact]
    options = options_lib.of_records(both, "gflops", training=Training(64, 1000))
    longest = options_lib.of_records(exact, "gflops", training=Training(64, 1000))
    some = [p for p in options.points if p.train_step == 500]
    assert {cell(p) for p in some} == {(m, "ddim", 10) for m in fake.CHANNELS}
    assert len(options.points) == len(longest.points) + len(some)
    for p in some:
        (q,) = [q for q in longest.points if cell(q) == cell(p)]
        assert p.value == pytest.approx(q.value + 2) and p.guidance == q.guidance
        assert p.taught == pytest.approx(q.taught / 4)
        assert p.cost - p.taught == pytest.approx(q.cost - q.taught)
    assert any("and Text to image along training (5 cells)" in n for n in options.notes)
    assert not any("no earlier checkpoint" in n for n in options.notes)
    (share,) = [n for n in options.notes if n.startswith("Counted are")]
    assert "after" not in share and share in longest.notes
    few, many = (within(both, 90.0, "gflops", training=Training(64, n)) for n in (600, 10**9))
    assert few.best.train_step == 500 and many.best.train_step == 2000
    assert few.runner_up.model != few.best.model and few.duel is not None
    assert f"{few.best.model}, DDIM, 10 steps, guidance 3, trained 500 steps" in advise_cli.text(
        few)
    row = advise_cli.plain(few)["best"]
    assert row["train_steps"] == 500 and row["training_gflops"] == few.best.taught
    only = options_lib.only(options, ("c8",)).points
    assert {p.train_step for p in only} == {500, 2000}
    # Training is not counted, so none other than the longest takes part.
    assert {p.train_step for p in options_lib.of_records(both, "gflops").points} == {2000}
    assert "trained" not in advise_cli.text(within(both, 60.0, "gflops"))


@pytest.mark.parametrize("blocks, why", [
    ((1,), "on seed block 0, of which there is no record"), ((0, 1), "on seed blocks [1] and not")])
def test_checkpoints_that_lack_a_block_take_no_part(exact, blocks, why):
    records = [*exact, *early(exact, -20.0, blocks=blocks)]
    if blocks == (0, 1):  # Which a second one that reports lacks.
        records += [dataclasses.replace(r, identity=dataclasses.replace(r.identity, seed_block=2))
                    for r in exact if r.identity.seed_block == 1]
    options = options_lib.of_records(
        records, "gflops", training=Training(64, 1000), report_blocks=(1, 2))
    assert {p.train_step for p in options.points} == {2000}
    (note,) = [n for n in options.notes if "takes no part" in n]
    assert note.startswith("Text to image along training takes no part: ") and why in note


def test_only_what_was_asked_for_is_weighed(exact):
    options = options_lib.of_records(exact, "cost")
    some = options_lib.only(options, ("c8", "c48"), ("ddim",), 10)
    assert {cell(p) for p in some.points} == {
        (m, "ddim", n) for m in ("c8", "c48") for n in (4, 6, 10)}
    assert some.notes[-1] == "As asked, of c8, c48, ddim and at most 10 steps alone."
    assert options_lib.only(options) is options
    for asked, message in (
        ({"models": ("c9",)}, "--member=c9: there are c16, c24, c32, c48, c8"),
        ({"samplers": ("heun",)}, "--sampler=heun: there are ddim, ddpm, dpmpp_2m"),
        ({"most_steps": 3}, "--max-steps=3: the fewest that there are is 4"),
    ):
        with pytest.raises(UserError, match=message):
            options_lib.only(options, **asked)
