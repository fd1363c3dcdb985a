"""Advice against studies whose truth is known: what is best within a budget, and how sure."""

import dataclasses
import json
import pathlib
import re
import shutil
import tarfile
import textwrap

import numpy as np
import pytest

from ldm_scaling import cli
from ldm_scaling.config import Consistency, Start, Study, Sweep
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import advice, advise_cli, budgets, cost_cli, cost_files, records, table_1
from ldm_scaling.study import options as options_lib
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.cost_files import CostFile, MemberCost, Timing
from ldm_scaling.study.costing import Price
from ldm_scaling.study.pricing import Training
from ldm_scaling.study.workdir import Workdir
from tests.study import fake_records as fake
from tests.study.fake_records import cell, within

ROOT = pathlib.Path(__file__).parents[2]
FD = "fd_effnetlite0"
TRUTH = fake.Truth()
CELLS = {
    (m, s, n): min((TRUTH.distance(m, s, n, w), w) for w in fake.GUIDANCE)
    for m in fake.CHANNELS for s in fake.STEPS for n in fake.STEPS[s]
}
COSTS = sorted({fake.norm_cost(m) * n for m, _, n in CELLS})


def best_of_truth(budget, cost=lambda m, s, n: fake.norm_cost(m) * n):
    """(distance, cell, guidance) of the true best, by looking at all."""
    (distance, guidance), cell = min(
        (CELLS[cell], cell) for cell in CELLS if cost(*cell) <= budget * (1 + 1e-12)
    )
    return distance, cell, guidance


@pytest.fixture(scope="module")
def exact():
    return fake.make(noise=0.0, shared=0.0)


@pytest.fixture(scope="module")
def study():
    return fake.make()


def test_the_true_best_at_and_between_all_costs(exact):
    options = options_lib.of_records(exact, "cost")
    between = [(a + b) / 2 for a, b in zip(COSTS, COSTS[1:])]
    for budget in [*COSTS, *between, np.inf]:
        found = advice.advise(options, Budget(float(budget), "cost"))
        distance, true, guidance = best_of_truth(budget)
        assert cell(found.best) == true and found.best.guidance == guidance
        assert found.best.value == pytest.approx(distance)
        # The runner-up is the true best without that size.
        others = {c: v for c, v in CELLS.items() if c[0] != true[0]
                  and fake.norm_cost(c[0]) * c[2] <= budget}
        if others:
            assert cell(found.runner_up) == min(others, key=others.get)
        else:
            assert found.runner_up is None or found.runner_up.model == true[0]


def test_the_front_is_what_nothing_cheaper_equals(exact):
    options = options_lib.of_records(exact, "cost")
    found = advice.front(options.points)
    for p, q in zip(found, found[1:]):
        assert p.cost < q.cost and p.chosen_by > q.chosen_by
    for p in options.points:
        assert any(f.cost <= p.cost and f.chosen_by <= p.chosen_by for f in found)
    # Each of it is the advice for a budget of its own cost.
    for p in found:
        assert advice.advise(options, Budget(p.cost, "cost")).best is p
    limit = found[len(found) // 2].cost
    assert advice.front(options.points, limit) == found[: len(found) // 2 + 1]


def test_what_is_reported_chooses_nothing(study):
    rng = np.random.default_rng(3)
    scrambled = [
        dataclasses.replace(r, metrics={k: v * rng.uniform(0.2, 5) for k, v in r.metrics.items()})
        if r.identity.seed_block == 1 else r for r in study
    ]
    for budget in COSTS[::7]:
        one, other = within(study, budget), within(scrambled, budget)
        assert cell(one.best) == cell(other.best)
        assert list(map(cell, one.front)) == list(map(cell, other.front))
        assert [one.runner_up and cell(one.runner_up)] == [other.runner_up
                                                           and cell(other.runner_up)]


def test_expectations_hold_the_truth_at_the_stated_rate():
    """Picking the best of many flatters nothing: it is valued where it was not picked."""
    inside, errors, beaten = [], [], []
    for seed in range(120):
        found = within(fake.make(models=("c8", "c16", "c24"), samplers=("ddim",), seed=seed,
                                 noise=1.5, shared=0.5), 6.0)
        p = found.best
        true = TRUTH.distance(*cell(p), p.guidance)
        inside.append(p.low <= true <= p.high)
        errors.append(p.value - true)
        q = found.runner_up
        lead = TRUTH.distance(*cell(q), q.guidance) - true
        beaten.append(found.duel.low <= lead <= found.duel.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.06)
    assert np.mean(beaten) == pytest.approx(0.95, abs=0.06)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(len(errors))


def test_equal_sizes_are_told_to_be_equal():
    """Ties go to the cheapest and the smallest rate; the other is as good with probability 1/2."""
    models = ("c8", "c16", "c24")
    flat = fake.make(fake.flat_truth(models), models=models, noise=0.0, shared=0.0)
    found = within(flat, 30.0)
    assert found.best.model == "c8" and found.best.steps == 4
    assert found.best.guidance == min(fake.GUIDANCE)
    assert found.other_is_better == 0.5 and found.duel.advantage == 0
    assert len(found.front) == 1
    # With noise no size is often declared the better one for sure.
    sure = [
        abs(within(fake.make(fake.flat_truth(models), models=models, samplers=("ddim",), seed=seed),
                   30.0).other_is_better - 0.5) > 0.475
        for seed in range(60)
    ]
    assert np.mean(sure) < 0.15


def test_a_large_gap_is_sure(study):
    found = within(study, COSTS[-1])
    assert found.best.model == "c48" and found.other_is_better < 0.05
    assert found.duel.low > 0


def test_flops_count_guided_pairs_twice(exact):
    """All rates here are guided, so both units order alike, by 2 x the FLOPs of cost 1."""
    for budget in COSTS[::5]:
        one = within(exact, budget * (1 + 1e-9))
        other = within(exact, 2 * 2.1 * budget * (1 + 1e-9), "gflops")
        assert cell(one.best) == cell(other.best)
        assert other.best.cost == pytest.approx(4.2 * one.best.cost)


def test_unguided_points_cost_half_the_flops():
    half = fake.make(noise=0, shared=0, guidance=(1.0,), models=("c8",), samplers=("ddim",))
    found = within(half, 1e6, "gflops")
    assert found.best.cost == pytest.approx(2.1 * fake.norm_cost("c8") * 50)
    # A distilled network takes the rate as an input: no pairs either.
    distilled = [
        dataclasses.replace(r, task="consistency", told=True, identity=dataclasses.replace(
            r.identity, guidance=3.0)) for r in half
    ]
    assert within(distilled, 1e6, "gflops").best.cost == pytest.approx(found.best.cost)


def prices(exact, seconds, decoder=0.05):
    """Every size as quick as the others: `seconds` a guided pair."""
    flops = {r.identity.model: (r.gflops, r.norm_cost) for r in exact}
    return {
        m: Price(m, *flops[m], 1.0, 1.0, "Chip", {
            ("network", 1): seconds / 2, ("guided", 1): seconds, ("decoder", 1): decoder,
            ("text", 1): 0.01,
        })
        for m in flops
    }


def test_seconds_of_a_device_decide_otherwise(exact):
    """Where all sizes are equally quick, only the steps are limited and the best size wins."""
    chip = prices(exact, 0.1)
    for steps in (4, 6, 10, 20, 50):
        found = within(exact, 0.1 * steps + 0.06 + 1e-9, "seconds", prices=chip)
        _, true, _ = best_of_truth(steps, cost=lambda m, s, n: n)
        assert cell(found.best) == true and found.best.model == "c48"
        assert found.best.cost == pytest.approx(0.1 * true[2] + 0.06)
    assert "on Chip" in found.options.unit_label and "decoder and text" in found.options.unit_label
    # At a cost of four steps of the smallest, the smallest wins.
    assert within(exact, COSTS[0]).best.model == "c8"


def test_sizes_that_the_device_could_not_hold_take_no_part(exact):
    chip = prices(exact, 0.1)
    chip["c48"] = dataclasses.replace(chip["c48"], seconds={})
    found = within(exact, 100.0, "seconds", prices=chip)
    assert found.best.model == "c32"
    assert found.notes[0].startswith("c48: no measured seconds")
    shown = advise_cli.text(found).splitlines()
    assert shown[2].startswith("  c48: no measured seconds at batch size 1 on Chip")
    assert len([line for line in shown if "c48: no measured" in line]) == 1
    with pytest.raises(UserError, match="below the cheapest.* c48: no measured seconds at batch"):
        within(exact, 0.1, "seconds", prices=chip)
    with pytest.raises(UserError, match="at batch size 3 on Chip: run  ldm-scaling cost "
                                        "--member=c16,c24,c32,c48,c8 --batch=3"):
        within(exact, 1.0, "seconds", prices=chip, batch=3)
    other = {m: dataclasses.replace(p, gflops=3 * p.gflops) for m, p in chip.items()}
    with pytest.raises(UserError, match="they are of different networks"):
        within(exact, 1.0, "seconds", prices=other)


def test_seconds_of_the_records_themselves(exact):
    budget = 0.3
    found = within(exact, budget, "seconds")

    def seconds(m, s, n):
        return 0.004 + 0.011 * (0.15 + fake.norm_cost(m)) * n

    assert cell(found.best) == best_of_truth(budget, cost=seconds)[1]
    assert "2 CPU cores" in found.options.unit_label
    moved = [dataclasses.replace(exact[0], device="a TPU"), *exact[1:]]
    with pytest.raises(UserError, match="2 CPU cores and a TPU.*--device=KIND"):
        within(moved, budget, "seconds")


def test_more_blocks_narrow_the_interval(study):
    third = [
        dataclasses.replace(r, identity=dataclasses.replace(r.identity, seed_block=2))
        for r in fake.make(seed=9) if r.identity.seed_block == 1
    ]
    one, both = within(study, 20.0), within([*study, *third], 20.0, report_blocks=(1, 2))
    assert both.options.blocks == 2 and both.best.choosing_images == 512
    assert cell(one.best) == cell(both.best)
    assert both.best.high - both.best.low < 0.85 * (one.best.high - one.best.low)


def test_a_single_size_is_weighed_against_its_own(exact):
    found = within([r for r in exact if r.identity.model == "c8"], 3.0)
    assert found.runner_up.model == "c8" and found.runner_up is not found.best


def test_notes_say_what_is_lacking(study):
    assert any("allows all that was measured" in n for n in within(study, 1e9).notes)
    part = [r for r in study if (r.identity.model, r.identity.steps) != ("c48", 50)]
    assert any(n.startswith("2 of 70 cells") for n in within(part, 20.0).notes)
    bare = fake.make(replicates=0)
    found = within(bare, 20.0)
    assert found.duel is None and found.other_is_better is None and found.best.low is None
    assert any("no interval" in n for n in found.notes)


def test_cells_of_other_numbers_of_pictures_are_left_out(study):
    """A distance is larger with fewer pictures: sizes that had more would win by that alone."""
    def some(models, images, more=0.0):
        return [
            dataclasses.replace(r, metrics={FD: r.metrics[FD] + more}, identity=dataclasses.replace(
                r.identity, num_images=images)) for r in study if r.identity.model in models]

    mixed = within([*some(("c8", "c16", "c24"), 512), *some(("c32",), 64, -1000.0)], 20.0)
    alone = within(some(("c8", "c16", "c24"), 512), 20.0)
    assert cell(mixed.best) == cell(alone.best) and mixed.best.value == alone.best.value
    said = [n for n in mixed.notes if "does not compare" in n]
    assert said == [
        f"14 cells of c32 were measured on 64 pictures of seed block {b} and not 512, which does "
        "not compare, and left out." for b in (0, 1)]
    assert [n for n in mixed.notes if n not in said] == list(alone.notes)
    # As many of either, and one cell of one block not yet measured: both blocks keep one number.
    larger = some(("c24", "c32"), 1024)
    last = next(r for r in larger if r.identity.seed_block == 1).identity
    halves = [*some(("c8", "c16"), 512), *(r for r in larger if (
        r.identity.seed_block, r.identity.model, r.identity.sampler, r.identity.steps
    ) != (1, last.model, last.sampler, last.steps))]
    assert within(halves, 20.0).best.value == within(some(("c8", "c16"), 512), 20.0).best.value


def test_a_contradicted_choice_is_graded(study):
    """From noise to nearly sure, by how often the runner-up is better in what is reported."""
    points = {p.model: p for p in options_lib.of_records(study, "cost").points
              if (p.sampler, p.steps) == ("ddim", 20)}
    base = dataclasses.replace(points["c8"], value=100.0, replicates_R=np.zeros(200))
    for above, words in ((40, None), (120, "looks better (0.60): the two are hard to tell apart"),
                         (180, "is probably better (0.90), against the choice"),
                         (196, "is better (probability 0.98), against the choice")):
        lead_R = (np.arange(200) + 0.5 - above) / 10
        other = dataclasses.replace(base, model="c16", chosen_by=base.chosen_by + 1.0,
                                    value=float(100 + lead_R.mean()), replicates_R=lead_R)
        options = dataclasses.replace(
            options_lib.of_records(study, "cost"), points=(base, other), notes=())
        found = advice.advise(options, Budget(100.0, "cost"))
        assert found.best.model == "c8" and found.other_is_better == pytest.approx(above / 200)
        said = " ".join(found.notes)
        assert (words in said) if words else ("On the reporting" not in said)
        noise = "the first leads by 1.00, and chance alone moves such a lead by 9.45"
        assert noise in said and "--config.sweep.more_blocks" in said
        ahead = found.duel.advantage >= 0
        shown = advise_cli.text(found)
        assert ("(the first leads by" in shown) == ahead and "by -" not in shown
        assert ("(the first is behind by" in shown) != ahead
    # The choosing block is one, where several report, and has a race's pictures.
    alone = dataclasses.replace(options, blocks=4)
    raced = dataclasses.replace(options, points=(
        base, dataclasses.replace(other, choosing_images=other.num_images // 4)))
    for some in (alone, raced):
        said = " ".join(advice.advise(some, Budget(100.0, "cost")).notes)
        assert "moves such a lead by 18.9" in said
    clear = dataclasses.replace(other, chosen_by=base.chosen_by + 50.0)
    options = dataclasses.replace(options, points=(base, clear))
    assert "within noise" not in " ".join(advice.advise(options, Budget(100.0, "cost")).notes)


def test_long_names_that_begin_alike_are_told_apart(study):
    name = "my_very_long_experimental_backbone_of_a_long_name_v"
    some = [dataclasses.replace(r, identity=dataclasses.replace(
        r.identity, sampler="dpmpp_2m:solver_type=heun,final=zero,eta=0.123456789",
        model=f"{name}{r.identity.model[1:]}")) for r in study if r.identity.sampler == "ddim"]
    found = within(some, 100.0)
    table = advise_cli.text(found).split("up to this one:")[1]
    lines = table.splitlines()
    at = next(line for line in lines if "size" in line).index("size")
    names = "".join(line[at:].split("  ")[0] for line in lines)
    assert "…" not in table and all(p.model in names for p in found.front)


def test_what_cannot_be_answered(study):
    with pytest.raises(UserError, match=r"0.1 cost is below the cheapest.*c8 with .* 4 steps"):
        within(study, 0.1)
    with pytest.raises(UserError, match="metric 'fid' is in no record; there are fd_effnetlite0"):
        within(study, 3.0, metric="fid")
    with pytest.raises(UserError, match="on block 5; the records are of blocks 0 and 1: finish"):
        within(study, 3.0, report_blocks=(5,))
    with pytest.raises(UserError, match="chosen on seed block 1"):
        within(study, 3.0, select_block=1)
    with pytest.raises(UserError, match="needs options in it"):
        advice.advise(options_lib.of_records(study, "cost"), budgets.parse("3 s"))


# --- Table 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3.5, 6.4, 20.0, 49.9, 50.0, 1000.0])
def test_table_1_says_which_size_at_50_steps(budget):
    found = advice.advise(table_1.options("cost"), Budget(budget, "cost"))
    able = [m for m in zoo.PAPER if m.published.norm_cost * 50 <= budget + 1e-9]
    assert found.best.model == min(able, key=lambda m: m.published.fid).name
    assert (found.best.sampler, found.best.steps, found.best.guidance) == ("ddim", 50, 7.5)
    assert found.best.low is None and found.duel is None and found.other_is_better is None
    said = " ".join(found.notes)
    for words in ("supports little", "one step count (50)", "no error bars"):
        assert words in said


def test_table_1_cannot_say():
    with pytest.raises(UserError, match="below the cheapest.*39m.*Table 1 has 50 steps alone"):
        advice.advise(table_1.options("cost"), Budget(3.0, "cost"))
    with pytest.raises(UserError, match="Table 1 has no seconds: give --device"):
        table_1.options("seconds")
    with pytest.raises(UserError, match="'lpips' is not in Table 1; there are fid, clip"):
        table_1.options("cost", "lpips")
    clip = advice.advise(table_1.options("cost", "clip"), Budget(np.inf, "cost"))
    assert clip.best.model == "5b" and clip.best.value == 0.314
    assert "less than 1% in CLIP score" in (said := " ".join(clip.notes)) and "FID" not in said


def test_table_1_has_its_own_digits():
    """Values as printed; of costs it says that they are, and FLOPs not."""
    found = advice.advise(table_1.options("cost"), budgets.parse("35 cost"))
    assert "FID 22.15 at 33.5 cost" in advise_cli.text(found)
    assert "A cost of 1 is one call of 866m, 790 GFLOPs. Costs are as printed" in " ".join(
        found.notes)
    other = advice.advise(table_1.options("gflops"), budgets.parse("40 tflops"))
    assert other.best.model == "318m" and "as printed" not in " ".join(other.notes)


def test_table_1_on_a_device():
    chip = {
        m.name: Price(m.name, 1.0, 1.0, device="Chip", seconds={
            ("network", 1): 0.001, ("guided", 1): 0.002, ("decoder", 1): 0.01, ("text", 1): 0.01})
        for m in zoo.PAPER[:3]
    }
    options = table_1.options("seconds", prices=chip)
    found = advice.advise(options, budgets.parse("120 ms"))
    assert found.best.model == "145m" and found.best.cost == pytest.approx(0.12)
    assert any("223m" in n and "5b" in n for n in found.notes)
    for price in chip.values():  # As where text comes from published weights.
        del price.seconds["text", 1]
    options = table_1.options("seconds", prices=chip)
    assert options.unit_label.endswith("with decoder")
    found = advice.advise(options, budgets.parse("120 ms"))
    assert found.best.model == "145m" and found.best.cost == pytest.approx(0.11)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("workdir")
    for r in fake.make(models=("c8", "c48")):
        # As `make`'s, but each under its own key.
        records.write(place / "records", r)
    return place


@pytest.fixture
def costs(tmp_path, folder):
    """A file of a device on which all is quick."""
    place = tmp_path / "costs"
    found = CostFile("NVIDIA H100 80GB HBM3", "gpu")
    for m in ("c8", "c48"):
        flops = 2.1 * fake.norm_cost(m)
        found = found.plus(
            MemberCost(m, fake.CHANNELS[m], 1, flops, flops, fake.norm_cost(m), "c48", "decoder",
                       1.0, "text", 1.0),
            *(Timing(part, name, 1, "key", "float32", 0.001, 0.001, 0.001, 0.001, 5, 1)
              for part, name in (("network", m), ("guided", m), ("decoder", "decoder"),
                                 ("text", "text"))),
        )
    cost_files.write(place / cost_files.file_name(found.device_kind), found)
    return place


def test_sizes_that_need_more_memory_are_left_out(capsys, tmp_path, exact, costs):
    (path,) = costs.iterdir()
    found = cost_files.read(path)
    large = [dataclasses.replace(t, bytes=int(9e9)) for t in found.timings
             if (t.part, t.name) == ("guided", "c48")]
    cost_files.write(path, found.plus(*large))
    for r in exact:
        if r.identity.model in ("c8", "c48"):
            records.write(tmp_path / "records", r)
    flags = (f"--records={tmp_path / 'records'}", "--budget=10 s", "--device=h100",
             f"--costs={costs}")
    assert run(capsys, *flags)[1].startswith("For 10.0 s: c48")
    held = run(capsys, *flags, "--memory=9 GB")[1]
    assert held.startswith("For 10.0 s: c48") and "Left out" not in held
    out = run(capsys, *flags, "--memory=8 GiB")[1]
    assert out.startswith("For 10.0 s: c8") and "lower bound" not in out
    said = "Left out, for the largest of their programs needs more than 8.59 GB at batch size 1: " \
        "c48 (9 GB, a guided pair of c48)."
    assert said in " ".join(" ".join(out.split("\n")[2:4]).split())
    cost_files.write(path, dataclasses.replace(cost_files.read(path), platform="cpu"))
    out = run(capsys, *flags, "--memory=8 GB")[1]
    assert "a CPU's is a lower bound" in " ".join(out.split())
    small = run(capsys, *flags, "--memory=0.5e-6 MB")
    assert small[0] == 2 and "the least that drawing takes is" in small[2]
    text = [dataclasses.replace(t, bytes=int(1e10)) for t in found.timings if t.part == "text"]
    cost_files.write(path, cost_files.read(path).plus(*text))
    said = "the least that drawing takes is 10 GB, of the text encoder at batch size 1"
    assert said in run(capsys, *flags, "--memory=9 GB")[2]
    guided = [dataclasses.replace(t, bytes=int(2e10)) for t in found.timings if t.part == "guided"]
    cost_files.write(path, cost_files.read(path).plus(*guided))
    said = "the least that drawing takes is 20 GB, of a guided pair of c8 at batch size 1"
    assert said in run(capsys, *flags, "--memory=9 GB")[2]


def run(capsys, *arguments):
    status = cli.main(["advise", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_names_everything(capsys, folder):
    status, out, err = run(capsys, f"--records={folder}", "--budget=5 cost")
    assert (status, err) == (0, "")
    first = out.splitlines()[0]
    assert first.startswith("For 5.00 cost: c8, ") and "steps, guidance" in first
    assert "Runner-up: c48" in out and "probability" in out and "seed block 0" in out
    assert max(map(len, out.splitlines())) <= 100
    # A workdir, its folder of records and its files, also twice, are the same.
    files = ",".join(map(str, (folder / "records").glob("*.json")))
    for places in ([f"{folder}/records"], [files], [f"{folder},{files}"], [files, str(folder)]):
        flags = [f"--records={place}" for place in places]
        assert run(capsys, *flags, "--budget=5 cost") == (0, out, "")


def test_the_readme_shows_what_the_shipped_demo_says(capsys, tmp_path):
    with tarfile.open(ROOT / "colab" / "data" / "demo.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    readme = (ROOT / "README.md").read_text("utf-8")
    (budget,) = re.findall(r'    ldm-scaling advise --records=runs/shipped/demo --(.*)"\n', readme)
    name, value = budget.split('="')
    out = run(capsys, f"--records={tmp_path}/demo", f"--{name}={value}")[1]
    said, _ = out.split("\n\n", 1)
    assert len(said.splitlines()) >= 4 and f"\n\n{textwrap.indent(said, ' ' * 4)}\n\n" in readme


def test_a_doubt_of_seconds_stands_beneath_the_first_line_and_there_alone(capsys, tmp_path, study):
    uneven = [dataclasses.replace(r, seconds_per_image=3 * r.seconds_per_image)
              if r.identity.model == "c8" and r.identity.steps > 6 else r for r in study]
    for r in uneven:
        records.write(tmp_path / "records", r)
    out = run(capsys, f"--records={tmp_path}", "--budget=1s")[1]
    said = " ".join(out.split())
    (doubt,) = (n for n in within(uneven, 1.0, "seconds").notes if "change places" in n)
    assert said.count(doubt) == 1 and said.index(doubt) < said.index("Runner-up")
    assert "In seconds that are" not in run(capsys, f"--records={tmp_path}", "--budget=1 cost")[1]


def test_every_printed_cost_can_be_typed(capsys, folder):
    """As a budget it gives the row that it stands in."""
    _, out, _ = run(capsys, f"--workdir={folder}", "--budget=40 cost")
    rows = [line.split() for line in out.split("95%\n")[1].splitlines()[1:] if line.strip()]
    rows = rows[: next(k for k, row in enumerate(rows) if row[0] == "In")]
    assert len(rows) > 3
    for cost, size, *_ in rows:
        first = run(capsys, f"--records={folder}", f"--budget={cost} cost")[1].splitlines()[0]
        assert f": {size}, " in first
        table = run(capsys, f"--records={folder}", f"--budget={cost} cost")[1]
        assert f"\n  {cost} " in table.replace("\n ", "\n  ") or f" {cost} " in table


def test_the_command_counts_training_by_the_workdirs_batches(capsys, tmp_path, study):
    homes = {n: Workdir(tmp_path / str(n)) for n in (64, 128)}
    for n, home in homes.items():
        config = Study()
        home.bind(dataclasses.replace(config, train=dataclasses.replace(
            config.train, batch_size=n)))
        for r in study:
            if (r.identity.model == "c8") == (n == 64):
                records.write(home / "records", r)
    flags = ["--pictures=1000", "--budget=1 pflops"]
    out = " ".join(run(capsys, f"--records={homes[64].path}", *flags)[1].split())
    assert "spread over 1,000 pictures" in out and "x 64 examples" in out
    status, _, err = run(capsys, *(f"--records={h.path}" for h in homes.values()), *flags)
    assert status == 2 and "batches of 128 and 64" in err
    (tmp_path / "bare").mkdir()
    shutil.copytree(homes[64] / "records", tmp_path / "bare" / "records")
    status, _, err = run(capsys, f"--records={tmp_path}/bare", *flags)
    assert status == 2 and "study.json is not there" in err
    for flag in ("--pictures=5", "--select-block=0", "--report-blocks=2"):
        status, _, err = run(capsys, flag, "--budget=1 pflops")
        assert status == 2 and err.endswith(f"{flag.partition('=')[0]} goes with --records\n")
    further = Workdir(tmp_path / "further")
    further.bind(Study(start=Start(str(tmp_path), 40, hash="as it was trained there")))
    shutil.copytree(homes[64] / "records", further / "records")
    status, _, err = run(capsys, f"--records={further.path}", *flags)
    assert status == 2 and "began with those of another study" in err


def test_the_command_weighs_what_it_is_asked_to(capsys, folder):
    _, out, _ = run(capsys, f"--records={folder}", "--sampler=ddim,ddpm", "--member=c48",
                    "--max-steps=10", "--format=json")
    found = json.loads(out)
    assert {p["model"] for p in found["front"]} == {"c48"}
    assert {p["sampler"] for p in found["front"]} <= {"ddim", "ddpm"}
    assert max(p["steps"] for p in found["front"]) == 10


def test_the_command_for_programs(capsys, folder):
    status, out, _ = run(capsys, f"--records={folder}", "--format=json", "--budget=1e11 flops")
    found = json.loads(out)
    assert status == 0 and found["unit"] == "gflops" and found["budget"] == 100
    assert {"model", "sampler", "steps", "guidance", "value", "low", "high"} <= set(found["best"])
    assert found["best"]["gflops"] <= 100
    assert 0 <= found["probability_runner_up_is_better"] <= 1
    assert [p["gflops"] for p in found["front"]] == sorted(p["gflops"] for p in found["front"])
    published = json.loads(run(capsys, "--published", "--format=json")[1])
    assert published["source"] == "published" and published["budget"] is None
    assert published["best"]["model"] == "5b" and published["best"]["low"] is None
    assert published["probability_runner_up_is_better"] is None


def test_the_command_on_a_device(capsys, folder, costs):
    flags = [f"--records={folder}", f"--costs={costs}", "--budget=30ms"]
    status, out, _ = run(capsys, *flags, "--device=h100")
    # 20 steps and two more milliseconds fit; all sizes are equally quick.
    assert status == 0 and "For 0.0300 s: c48, " in out and "20 steps" in out.splitlines()[0]
    assert "NVIDIA H100 80GB HBM3" in out
    status, _, err = run(capsys, *flags, "--device=v5e")
    assert status == 2 and "ldm-scaling cost" in err and "NVIDIA H100" in err and "v5e" in err


def test_the_command_takes_seconds_of_the_workdirs_own_autoencoder(capsys, tmp_path, folder, costs):
    """Of a second study on the same device with a slow one the members' rows lie beside them."""
    (path,) = costs.iterdir()
    found, config = cost_files.read(path), Study(members=("c8", "c48"))
    config = dataclasses.replace(config, data=dataclasses.replace(
        config.data, side=64, text_length=zoo.get("c8").spec.context_length))
    ours = cost_cli.around(config, "c8").names
    for m in found.members:
        found = found.plus(dataclasses.replace(m, decoder=ours[0], text=ours[1], tokens=ours[2]), *(
            dataclasses.replace(t, name=name, seconds=seconds) for t in found.timings
            for part, name, seconds in (("decoder", ours[0], 0.02), ("text", ours[1], 0.001))
            if t.part == part))
    cost_files.write(path, found)
    flags = [f"--costs={costs}", "--device=h100", "--budget=30ms", "--format=json"]
    status, _, err = run(capsys, f"--records={folder}", *flags)
    assert status == 2 and "several autoencoders" in err
    home = Workdir(tmp_path / "home")
    home.bind(config)
    shutil.copytree(folder / "records", home / "records")
    best = json.loads(run(capsys, f"--records={home.path}", *flags)[1])["best"]
    assert best["seconds"] == pytest.approx(0.021 + 0.001 * best["steps"])
    # Of a third one nothing was measured.
    cost_files.write(path, dataclasses.replace(found, members=[
        m for m in found.members if m.around != ours]))
    status, _, err = run(capsys, f"--records={home.path}", *flags)
    assert status == 2 and "no measured seconds of c48, c8" in err and "--config" in err


@pytest.mark.parametrize("arguments, parts", [
    (["--records=nowhere"], ["--records=nowhere", "no such folder or file"]),
    (["--records=EMPTY"], ["no records there", "ldm-scaling sweep"]),
    (["--records=STUDY"], ["no records there", "ldm-scaling sweep"]),
    (["--records=STUDY/study.json"], ["is no record", "16 hex digits"]),
    (["--budget=3 apples"], ["'3 apples'", "20ms", "3 cost", "1 gflops", "one picture"]),
    (["--budget=1 cost"], ["below the cheapest", "39m"]),
    (["--budget=400ms"], ["no seconds", "--device"]),
    (["--budget=400ms", "--device=h100", "--costs=EMPTY"], ["h100", "ldm-scaling cost"]),
    (["--budget=3 cost", "--device=h100"], ["--device goes with a budget in seconds"]),
    (["--budget=3 s", "--batch=2"], ["go with --device"]),
    (["--published", "--records=EMPTY"], ["give one"]),
    (["--batch=0"], ["give 1 or more"]),
    (["--budget=3 s", "--memory=8 GB"], ["--memory goes with --device"]),
    (["--budget=3 s", "--memory=8"], ["--memory='8' is no memory", "8 GiB"]),
    (["--task=dreambooth"], ["--task goes with --records"]),
    (["--bugdet=3"], ["--bugdet=3", "advise --help"]),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_line(capsys, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "STUDY").mkdir()
    (tmp_path / "STUDY" / "study.json").write_text("{}")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_a_damaged_record_and_other_tasks(capsys, tmp_path):
    found = fake.make(models=("c8",), samplers=("ddim",))
    for r in found:
        records.write(tmp_path / "one", r)
        other = dataclasses.replace(r, task="dreambooth", identity=dataclasses.replace(
            r.identity, model_hash="tuned"))
        records.write(tmp_path / "both", r)
        records.write(tmp_path / "both", other)
    status, _, err = run(capsys, f"--records={tmp_path}/both")
    assert status == 2 and "--task=dreambooth or text_to_image" in err
    assert run(capsys, f"--records={tmp_path}/both", "--task=text_to_image")[:2] == run(
        capsys, f"--records={tmp_path}/one")[:2]
    bad = "0" * 16
    (tmp_path / "one" / f"{bad}.json").write_text("{")
    status, _, err = run(capsys, f"--records={tmp_path}/one")
    assert status == 2 and f"{bad}.json is damaged" in err


def test_another_measure_keeps_the_rate_that_is_reported(exact):
    """A sweep reports at the best rate by FD: a cell more is none less, and the measure asked for
    decides between the cells."""
    one, other = (options_lib.of_records(exact, "cost", m) for m in (FD, "caption_agreement"))
    assert {(*cell(p), p.guidance) for p in one.points} == {
        (*cell(p), p.guidance) for p in other.points}
    assert any("best FD of each cell" in note for note in other.notes)
    assert not any("of each cell" in note for note in one.notes)
    best = max(other.points, key=lambda p: TRUTH.agreement(*cell(p), p.guidance))
    assert advice.advise(other, Budget(np.inf, "cost")).best is best
    # Where its own best rates are reported, they are what counts.
    alone = [r for r in exact if r.identity.seed_block == 0]
    alone += [dataclasses.replace(r, identity=dataclasses.replace(r.identity, seed_block=1))
              for r in alone]
    own = options_lib.of_records(alone, "cost", "caption_agreement")
    assert {p.guidance for p in own.points} == {max(fake.GUIDANCE)}


def test_the_longest_training_counts(exact):
    early = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=500),
                                 metrics={k: v / 2 for k, v in r.metrics.items()}) for r in exact]
    one, both = within(exact, 9.0), within([*early, *exact], 9.0)
    assert cell(one.best) == cell(both.best) and one.best.value == both.best.value
    assert any("longest training is used (2,000 steps)" in note for note in both.notes)


def test_cells_of_a_shorter_training_are_named(exact):
    """A longer checkpoint with few cells lacks those that a shorter one has: the grid is whole."""
    def longer(r):
        return dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=4000))

    more = [longer(r) for r in exact if r.identity.model == "c8" and r.identity.steps == 4]
    notes = within([*exact, *more], 9.0).notes
    assert not [n for n in notes if "of the grid" in n]
    assert [n for n in notes if "shorter" in n] == [
        "Cells that only a shorter training has take no part: 11 of c8 after 4,000 steps, measured "
        "after 2,000."]
    paid = within([*exact, *more], 900.0, "gflops", training=Training(64, 1000))
    assert len(paid.options.points) == 73
    assert not [n for n in paid.notes if "shorter" in n or "no part" in n]


def test_a_longer_training_that_is_half_measured_leaves_the_shorter_one(exact):
    """Its second block is not there yet: what is trained already answers, and its share is told."""
    def longer(r):
        return dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=4000))

    half = [longer(r) for r in exact if r.identity.seed_block == 0]
    found = within([*exact, *half], 900.0, "gflops", training=Training(64, 1000))
    alone = within(exact, 900.0, "gflops", training=Training(64, 1000))
    assert cell(found.best) == cell(alone.best) and found.best.train_step == 2000
    assert any("takes no part: no configuration" in n for n in found.notes)
    some = [longer(r) for r in exact if r.identity.model == "c8" and (
        r.identity.seed_block == 0 or r.identity.steps > 4)]
    found = within([*exact, *some], 900.0, "gflops", training=Training(64, 1000))
    assert not any("shorter" in n for n in found.notes)
    assert {p.train_step for p in found.options.points if p.model == "c8"} == {2000, 4000}


def test_cells_that_were_not_measured_are_counted(exact):
    lone = [r for r in exact if (r.identity.model, r.identity.steps) != ("c8", 4)]
    assert any(n == "3 of 70 cells of the grid are not measured and take no part."
               for n in within(lone, 9.0).notes)


def test_advice_needs_the_block_that_chooses(study):
    with pytest.raises(UserError, match="on seed block 0, of which there is no record"):
        within([r for r in study if r.identity.seed_block == 1], 3.0)


@pytest.mark.parametrize("text", ["1e306 tflops", "5e-324 ms"])
def test_a_budget_that_no_number_holds_is_none(text):
    with pytest.raises(UserError, match="is no budget"):
        budgets.parse(text)


@pytest.mark.parametrize("value", [0.67543218, 0.675, 1.0, 12345678.9, 3.3e-7])
def test_the_least_budget_can_be_typed(value):
    typed = budgets.enough(value)
    assert typed * (1 + 1e-9) >= value and typed <= value * (1 + 1e-4)
    assert float(f"{typed:.5g}") == typed


def test_a_workdir_names_its_blocks(capsys, tmp_path):
    study = Study(sweep=Sweep(
        num_images=512, select_block=1, report_block=2, more_blocks=(3,)))
    home = Workdir(tmp_path / "own")
    home.bind(study)
    moved = {0: 1, 1: 2, 2: 3}
    for r in fake.make(models=("c8", "c48"), samplers=("ddim",), report_blocks=(1, 2)):
        records.write(home / "records", dataclasses.replace(r, identity=dataclasses.replace(
            r.identity, seed_block=moved[r.identity.seed_block])))
    for place in (home.path, home / "records"):
        status, out, err = run(capsys, f"--records={place}")
        assert (status, err) == (0, "") and "on seed block 1, reported on 2 and 3" in out
    asked = run(capsys, f"--records={home.path}", "--report-blocks=3")[1]
    assert "on seed block 1, reported on 3 (" in asked
    other = Workdir(tmp_path / "other")
    other.bind(Study())
    shutil.copytree(home / "records", other / "records")
    status, _, err = run(capsys, f"--records={home.path},{other.path}")
    assert status == 2 and "other seed blocks" in err and "--report-blocks" in err


def test_members_and_students_share_one_budget(exact):
    """A planted student that is better than all takes what it can pay for; one that is worse none
    of it; and each is valued as its own records say."""
    members, budget = within(exact, 3.0), 3.0
    good = [*exact, *fake.students(exact, better=30.0)]
    found = within(good, budget)
    assert (found.best.model, found.best.task, found.best.sampler) == ("c16", "consistency", "codi")
    alone = within([r for r in good if r.task == "consistency"], budget)
    assert cell(alone.best) == cell(found.best) and alone.best.value == found.best.value
    for said in ("Text to image (70 cells) and Consistency distillation (4 cells)", "In brackets"):
        assert any(said in note for note in found.notes)
    assert not any("together" in note for note in alone.notes)
    # The runner-up is of another network, be it of the same size.
    assert (found.runner_up.model, found.runner_up.task) == ("c8", "consistency")
    lone = within([*exact, *fake.students(exact, better=30.0, models=("c16",))], budget)
    assert (lone.runner_up.model, lone.runner_up.task) == (members.best.model, "text_to_image")
    bad = within([*exact, *fake.students(exact, better=-30.0)], budget)
    assert cell(bad.best) == cell(members.best) and bad.best.task == "text_to_image"
    assert all(p.task == "text_to_image" for p in bad.front)


def test_students_of_two_methods_of_one_task_are_weighed_against_each_other(exact):
    """By CoDi and by LCM: each is a network of its own, of several settings of a method one
    counts, and what does not compare with the rest takes no part without the other."""
    def lcm(better, setting="lcm_1", **more):
        return fake.students(
            exact, better=better, sampler="lcm", setting=setting, told=True, **more)

    codi = fake.students(exact, better=25.0, models=("c16",))
    both = [*exact, *codi, *lcm(30.0, models=("c16",))]
    found, backward = (within(some, 3.0) for some in (both, both[::-1]))
    for one in (found, backward):
        assert [(p.model, p.task, p.sampler) for p in (one.best, one.runner_up)] == [
            ("c16", "consistency", "lcm"), ("c16", "consistency", "codi")]
    assert within([*exact, *codi, *lcm(5.0)], 3.0).best.sampler == "codi"
    of = "Consistency distillation by CoDi (2 cells) and Consistency distillation by LCM (2 cells)"
    assert any(of in note for note in found.notes)
    # One call of a student that is told its rate is one evaluation, of another two.
    cost = {p.sampler: p.cost for p in options_lib.of_records(both, "gflops").points
            if (p.task, p.steps) == ("consistency", 4)}
    assert cost["codi"] == pytest.approx(2 * cost["lcm"])
    longer = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, train_step=400))
              for r in lcm(40.0, "lcm_2", models=("c16",))]
    options = options_lib.of_records([*both, *longer], "cost")
    assert len([p for p in options.points if p.sampler == "lcm"]) == 2
    assert any("of which lcm_2 (400 steps" in note for note in options.notes)
    preferred = options_lib.of_records([*both, *longer], "cost", settings=("codi_1", "lcm_1"))
    assert any("of which lcm_1 (200 steps" in note for note in preferred.notes)
    other = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, reference_hash="no"))
             for r in lcm(30.0)]
    apart = within([*exact, *codi, *other], 3.0)
    assert apart.best.sampler == "codi" and any(
        note.startswith("Consistency distillation by LCM takes no part") and
        "copy its records, whose sampler is lcm, to a folder of their own" in note
        for note in apart.notes)
    # As the note says.
    assert within(other, 3.0).best.sampler == "lcm"


def test_of_a_told_student_a_call_is_one_evaluation(exact):
    """In FLOPs it costs half of its teacher's guided pair; in the paper's cost as much."""
    both = [*exact, *fake.students(exact, "guided_distillation", told=True, models=("c8",),
                                   sampler="ddim", steps=(4,))]
    for unit, factor in (("cost", 1.0), ("gflops", 2.0)):
        points = {p.task: p.cost for p in options_lib.of_records(both, unit).points
                  if p.model == "c8" and p.sampler == "ddim" and p.steps == 4}
        assert points["text_to_image"] == pytest.approx(factor * points["guided_distillation"])


def test_a_told_student_takes_its_sizes_seconds(exact):
    """The embedding of its rate is 2% of a small network's FLOPs, and no other network."""
    told = fake.students(exact, "guided_distillation", told=True, models=("c8",), sampler="ddim",
                         steps=(4,))
    chip = prices(exact, 0.1)
    for more, weighed in ((1.02, True), (0.9, False), (1.5, False)):
        both = [*exact, *(dataclasses.replace(r, gflops=more * r.gflops) for r in told)]
        if not weighed:
            with pytest.raises(UserError, match="c8 takes .* they are of different networks"):
                options_lib.of_records(both, "seconds", prices=chip)
            continue
        points = {p.task: p.cost for p in options_lib.of_records(
            both, "seconds", prices=chip).points if p.model == "c8" and p.sampler == "ddim"
            and p.steps == 4}
        assert points["text_to_image"] == pytest.approx(4 * 0.1 + 0.06)
        assert points["guided_distillation"] == pytest.approx(4 * 0.05 + 0.06)


def test_tasks_that_do_not_compare_take_no_part(exact):
    few = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, num_images=64))
           for r in fake.students(exact, better=30.0)]
    reported = [r for r in fake.students(exact, better=30.0) if r.identity.seed_block == 1]
    one_rate = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, guidance=2.0))
                for r in reported]
    drawn = [dataclasses.replace(r, replicates={k: v[:50] for k, v in r.replicates.items()})
             for r in fake.students(exact, better=30.0)]
    other = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, reference_hash="no"))
             for r in fake.students(exact, better=30.0)]
    for students, why in (
        (few, "measured with 64 pictures a cell and not 512"),
        (other, "measured with other reference statistics"),
        (reported, "on seed block 0, of which there is no record"),
        (one_rate, "give its sweep a second rate"),
        (drawn, "measured with 50 replicates and not 200"),
    ):
        found = within([*exact, *students], 3.0)
        assert found.best.task == "text_to_image"
        assert any(note.startswith("Consistency distillation takes no part") and why in note
                   for note in found.notes), found.notes
    # Nor does a task that no picture of a prompt is of.
    with pytest.raises(UserError, match="--task=deblurring or text_to_image,consistency"):
        within([*fake.students(exact), *exact, *fake.students(exact, "deblurring")], 3.0)
    # On another device cascades are not timed, members are.
    first = records.First("c8", "ddim", 4, "leading", 1.0, 0.0, 0.21, 0.1, 4)
    cascades = [
        dataclasses.replace(r, first=first, identity=dataclasses.replace(
            r.identity, model="c8+c16", first=first.spelling))
        for r in fake.students(exact, "cascade", 80.0, sampler="ddim", models=("c16",))
    ]
    assert within([*exact, *cascades], 50.0).best.model == "c8+c16"
    timed = within([*exact, *cascades], 50.0, "seconds", prices=prices(exact, 0.1))
    assert timed.best.task == "text_to_image"
    assert any("timed in their sweep alone, so not" in note for note in timed.notes)


def test_the_command_weighs_students_and_names_them(capsys, tmp_path, study):
    for r in [*study, *fake.students(study, better=30.0)]:
        records.write(tmp_path, r)
    _, out, err = run(capsys, f"--records={tmp_path}", "--budget=3 cost")
    assert not err and out.startswith("For 3.00 cost: c16 (consistency), CoDi, 6 steps, guidance ")
    found = json.loads(run(capsys, f"--records={tmp_path}", "--budget=3 cost", "--format=json")[1])
    assert (found["best"]["model"], found["best"]["task"]) == ("c16", "consistency")
    both = run(capsys, f"--records={tmp_path}", "--budget=3 cost",
               "--task=text_to_image, consistency")
    assert both[:2] == (0, out)
    one = run(capsys, f"--records={tmp_path}", "--budget=3 cost", "--task=text_to_image")[1]
    assert "(consistency)" not in one
    status, _, err = run(capsys, f"--records={tmp_path}", "--task=text_to_image,deblurring")
    assert status == 2 and "--task=deblurring: the records are of consistency, text_to_image" in err


def test_a_workdirs_last_config_says_which_students_count(capsys, tmp_path, exact):
    config = Study(consistency=Consistency(method="codi"))
    home = Workdir(tmp_path)
    home.bind(config)
    mine, name = config.consistency.setting, "codi_0"
    assert mine.startswith("codi_") and mine > name  # By name the other would be taken.
    for r in [*exact, *fake.students(exact, better=5.0, setting=mine),
              *fake.students(exact, better=50.0, setting=name)]:
        records.write(home / "records", r if not r.setting else dataclasses.replace(
            r, identity=dataclasses.replace(r.identity, model_hash=r.setting)))
    out = " ".join(run(capsys, f"--records={home.path}")[1].split())
    assert f"of which {mine} (200 steps of training) is used, and not codi_0" in out


def test_students_that_lack_a_block_cost_members_none():
    members = fake.make(models=("c8", "c16"), samplers=("ddim",), report_blocks=(1, 2))
    students = fake.students(members, better=30.0)
    asked = {"report_blocks": (1, 2)}
    both = within([*members, *students], 3.0, **asked)
    assert "reported on 1 and 2 (" in both.notes[0] and both.best.task == "consistency"
    fewer = [r for r in students if r.identity.seed_block < 2]
    found = within([*members, *fewer], 3.0, **asked)
    assert "reported on 1 and 2 (" in found.notes[0] and found.best.task == "text_to_image"
    assert any("takes no part: it was measured on seed blocks [1] and not [1, 2]" in note
               for note in found.notes)


def test_members_that_raced_compare_with_students_that_did_not(exact):
    """A race's records tell the number of pictures in their reference's hash."""
    raced = [
        dataclasses.replace(r, round=1, identity=dataclasses.replace(
            r.identity, reference_hash="ref, 512")) if r.identity.seed_block == 0 else r
        for r in exact
    ]
    assert within([*raced, *fake.students(exact, better=30.0)], 3.0).best.task == "consistency"


def test_seconds_compare_on_one_device_alone(exact):
    """What was measured elsewhere, a shorter training included, has no say in them."""
    away = [dataclasses.replace(r, device="Chip") for r in fake.students(exact, better=30.0)]
    assert within([*exact, *away], 3.0).best.task == "consistency"
    found = within([*exact, *away], 1.0, "seconds")
    assert found.best.task == "text_to_image"
    assert any("measured on Chip and not 2 CPU cores" in note for note in found.notes)
    early = [dataclasses.replace(r, device="Chip", identity=dataclasses.replace(
        r.identity, train_step=500)) for r in exact]
    assert cell(within([*early, *exact], 1.0, "seconds").best) == cell(found.best)


def test_what_cost_counts_of_told_students_is_said(exact):
    told = fake.students(exact, "guided_distillation", told=True, sampler="ddim")
    for unit, said in (("cost", True), ("gflops", False)):
        notes = within([*exact, *told], 1e6, unit).notes
        assert any("a budget in flops counts two and one" in note for note in notes) == said
    plain = within([*exact, *fake.students(exact)], 3.0)
    assert not any("told its rate" in note for note in plain.notes)
