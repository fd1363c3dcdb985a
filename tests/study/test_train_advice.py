"""Advice on training against planted laws, whose best size is known in closed form; and the
command, on the demo that is shipped."""

import dataclasses
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from scipy import optimize

from ldm_scaling import cli
from ldm_scaling.config import Data, Start, Study
from ldm_scaling.errors import UserError
from ldm_scaling.models.cost import Cost
from ldm_scaling.parallel import chips
from ldm_scaling.study import records, train_advice, train_budgets
from ldm_scaling.study.statistics import scaling
from ldm_scaling.study.statistics.laws import Law
from ldm_scaling.study.workdir import Workdir
from tests.study import fake_records as fake

ROOT = pathlib.Path(__file__).parents[2]
LAW = Law(0.1, (0.05, 12.0), (0.5, 0.45))  # Of GFLOPs of a call and pictures.
COSTS = {f"s{k}": Cost(int(1e7 * g), g) for k, g in enumerate(np.geomspace(0.02, 0.6, 5))}


def _losses(costs=COSTS, law=LAW, luck=0.0, noise=0.0, seed=0, lengths=8):
    """step -> loss along each size's run, of one picture a step."""
    rng = np.random.default_rng(seed)
    out = {}
    for m, c in costs.items():
        own = luck * rng.normal()
        out[m] = [
            (int(n), float(law(np.array([[c.gflops, n]]))[0] * np.exp(own + noise * rng.normal())))
            for n in np.linspace(0.1, 1, lengths) * 3e5]
    return out


def _runs(costs=COSTS, **kwargs):
    return scaling.of_losses(
        _losses(costs, **kwargs), {m: c.params for m, c in costs.items()},
        {m: c.gflops for m, c in costs.items()}, 1)


def test_the_best_size_is_the_planted_laws():
    """All of it: training is three calls' FLOPs on each picture."""
    runs = _runs()
    budget = 10 * runs.gflops_N.max()
    assert runs.gflops_N.max() == pytest.approx(3 * 0.6 * 3e5)
    found = train_advice.advise(runs, budget, COSTS)
    least = optimize.minimize_scalar(
        lambda logn: LAW(np.array([[np.exp(logn), budget / 3 / np.exp(logn)]]))[0],
        bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    assert found.size[0] == pytest.approx(np.exp(least.x), rel=2e-3)
    assert 3 * found.size[0] * found.images[0] == pytest.approx(budget)
    assert found.loss[0] == pytest.approx(least.fun, rel=1e-4)
    assert found.measured["compute"][1] == runs.gflops_N.max()
    for s in found.sizes:
        assert 3 * s.gflops * s.images == pytest.approx(budget)
        true = LAW(np.array([[s.gflops, s.images]]))[0]
        assert s.loss == pytest.approx(true, rel=1e-4) and s.loss >= found.loss[0]
        if np.isfinite(s.times):
            pictures = s.times * budget / 3 / s.gflops
            assert LAW(np.array([[s.gflops, pictures]]))[0] == pytest.approx(least.fun, rel=1e-3)
        else:  # Not with all the pictures there are.
            assert LAW(np.array([[s.gflops, 1e30]]))[0] > least.fun
    assert found.nearest.name == min(
        COSTS, key=lambda m: abs(np.log(COSTS[m].gflops / np.exp(least.x))))


@pytest.mark.parametrize("law", [LAW, Law(0.0, (3.0, 40.0), (0.3, 0.6))])
def test_the_price_of_another_size(law):
    """Of the best it is 1, of half the FLOPs the same at every budget, in closed form."""
    a, b = law.exponents
    for budget in (1e4, 1e9):
        n, d = law.best_split(budget, 3.0)
        assert law.off_best(n, budget, 3.0) == pytest.approx(1)
        rest = 1 - (law.factors[0] * n**-a * (2**a - 1)) / (law.factors[1] * d**-b)
        assert rest == pytest.approx(1 - b / a * (2**a - 1))  # As a A / n^a = b B / d^b.
        half, double = law.off_best(n * np.array([0.5, 2.0]), budget, 3.0)
        assert half == pytest.approx(0.5 * rest ** (-1 / b)) and double > 1


@pytest.mark.parametrize("share", [1e-6, 0.3, 3.0, 10.0])
def test_drawing_from_the_same_budget(share):
    """The least of the law on F x (3 D + calls), found by SciPy; smaller, and trained for longer
    for its size, than without drawing; with all but none of that the same."""
    runs = _runs()
    budget = 10 * runs.gflops_N.max()
    alone, images = LAW.best_split(budget, 3.0)
    drawing = train_advice.Drawing(max(int(share * images / 8), 1), 24)
    calls = drawing.all_calls
    found = train_advice.advise(runs, budget, COSTS, drawing)

    def loss(log_images):
        pictures = np.exp(log_images)
        return LAW(np.array([[budget / (3 * pictures + calls), pictures]]))[0]

    least = optimize.minimize_scalar(loss, bounds=(0, 20), method="bounded",
                                     options={"xatol": 1e-10})
    assert found.images[0] == pytest.approx(np.exp(least.x), rel=5e-3)
    assert found.loss[0] == pytest.approx(least.fun, rel=1e-4)
    assert found.size[0] * (3 * found.images[0] + calls) == pytest.approx(budget)
    assert found.training == pytest.approx(budget - found.size[0] * calls)
    if share < 1e-5:
        assert found.size[0] == pytest.approx(alone, rel=1e-3)
    else:
        assert found.size[0] < alone
        assert found.images[0] / found.size[0] > images / alone
    for s in found.sizes:
        left = budget - s.gflops * calls
        assert s.images == pytest.approx(max(left, 0) / 3 / s.gflops)
        assert np.isinf(s.loss) if left < 0 else s.loss >= found.loss[0]
        if np.isfinite(s.times):
            pictures = (s.times * budget / s.gflops - calls) / 3
            assert LAW(np.array([[s.gflops, pictures]]))[0] == pytest.approx(least.fun, rel=1e-3)


def test_a_size_that_drawing_leaves_nothing_for_is_not_named():
    """Where the next larger is nearer to the best, and has no pictures to train on."""
    runs = _runs()
    budget = runs.gflops_N.max()
    for calls in np.geomspace(0.2, 0.9, 8) * budget / COSTS["s2"].gflops:
        found = train_advice.advise(runs, budget, COSTS, train_advice.Drawing(1, int(calls)))
        losses = [s.loss for s in found.sizes]
        assert found.nearest.loss == min(losses) < np.inf and found.nearest.images > 0
        assert not found.sizes[-1].images


def test_where_drawing_leaves_nothing():
    runs = _runs()
    small = Law(0.1, (0.05, 200.0), (0.2, 0.6))  # Whose best lie far below all sizes, undrawn.
    alone = train_advice.advise(_runs(law=small), 1e-2 * runs.gflops_N.min(), COSTS)
    assert alone.size[0] < 0.01 * COSTS["s0"].gflops
    with pytest.raises(UserError, match="drawing takes all.*100,000,000,000 calls of s0, the "):
        train_advice.advise(
            runs, runs.gflops_N.max(), COSTS, train_advice.Drawing(1_000_000_000, 100))


def test_intervals_hold_the_truth_beyond_what_was_measured():
    """Ten times beyond, each size with its own luck: the size, the loss and the price of half."""
    held = []
    for seed in range(16):
        runs = _runs(luck=0.005, noise=0.002, seed=seed)
        budget = 10 * runs.gflops_N.max()
        found = train_advice.advise(runs, budget, COSTS)
        best = LAW.best_split(budget, 3.0)[0]
        truth = {"size": best, "images": budget / 3 / best, "loss": LAW.least(budget, 3.0)[0],
                 "half": LAW.off_best(best / 2, budget, 3.0)}
        ends = {name: getattr(found, name)[1:] for name in truth}
        held.append([low <= truth[name] <= high for name, (low, high) in ends.items()])
        assert ends["size"][1] / ends["size"][0] < 30
    assert (np.mean(held, axis=0) >= 0.85).all()


def test_what_no_law_can_tell_is_refused():
    few = {m: COSTS[m] for m in ("s0", "s2", "s4")}
    with pytest.raises(UserError, match="needs losses of 4 sizes at 3 lengths .* 24 losses of 3"):
        train_advice.advise(_runs(few), 1e6, COSTS)
    with pytest.raises(UserError, match=r"of 1 size \(s0\) at"):
        train_advice.advise(_runs({"s0": COSTS["s0"]}), 1e6, COSTS)
    with pytest.raises(UserError, match="at 2 lengths: .*train.validate_every"):
        train_advice.advise(_runs(lengths=2), 1e6, COSTS)
    worse = Law(0.1, (0.05, 12.0), (-0.5, 0.45))  # Larger networks are worse.
    with pytest.raises(UserError, match="tell no best size: .*both must help"):
        train_advice.advise(_runs(law=worse), 1e6, COSTS)
    for far in (1e-3, 1e20, 1e300, np.inf):
        with pytest.raises(UserError, match="law says nothing of what lies so far"):
            train_advice.advise(_runs(), far, COSTS)


@pytest.mark.parametrize("text, value, unit, chips_", [
    ("1e18 flops", 1e9, "gflops", False), ("3 exaflops", 3e9, "gflops", False),
    ("2 EFLOPs", 2e9, "gflops", False), ("20 pflops", 2e7, "gflops", False),
    ("300 h", 1.08e6, "seconds", False), ("2days", 172800, "seconds", False),
    ("20 gpu hours", 72000, "seconds", True), ("20 GPU-hours", 72000, "seconds", True),
    ("1.5 chip hours", 5400, "seconds", True), ("90 min", 5400, "seconds", False),
])  # fmt: skip
def test_budgets_of_training(text, value, unit, chips_):
    found = train_budgets.parse(text)
    assert (found.unit, found.of_chips) == (unit, chips_) and found.value == pytest.approx(value)


@pytest.mark.parametrize("text", ["3 cost", "20 gpu flops", "h", "-1 h", "0 h", "1e400 flops",
                                  "gpu hours", "3 apples"])
def test_what_is_no_budget_of_training(text):
    with pytest.raises(UserError, match="is no budget of training; write one as"):
        train_budgets.parse(text)


def test_a_rate_is_the_median_of_the_sizes():
    """3 x 2 GFLOPs a call x 100 steps of 10 pictures in 60 s are 100 GFLOP/s."""
    def rows(seconds):
        return [(50, "time/productive_seconds", seconds / 2),
                (100, "time/productive_seconds", seconds), (100, "validation/loss", 1.0)]

    curves = {"a": rows(60), "b": rows(30), "c": rows(600), "d": []}
    rate = train_budgets.of_curves(curves, dict.fromkeys(curves, 2.0), 10)
    assert (rate.gflops, rate.low, rate.high) == pytest.approx((100, 10, 200))
    assert "3 sizes" in rate.words
    one = {"a": rows(60)[1:2]}  # Of the last step alone: from the first one on.
    assert train_budgets.of_curves(one, {"a": 2.0}, 10).gflops == pytest.approx(100)
    assert train_budgets.of_curves(one, {"a": 2.0}, 10, start=50).gflops == pytest.approx(50)
    later = {"a": [(1000 + step, name, value) for step, name, value in rows(60)]}
    assert train_budgets.of_curves(later, {"a": 2.0}, 10).gflops == pytest.approx(100)
    assert train_budgets.of_curves({"d": []}, {"d": 2.0}, 10) is None
    h100 = train_budgets.of_chip("H100", 0.5)
    assert h100.gflops == chips.by_name("h100").bf16_flops / 2e9
    with pytest.raises(UserError, match="--device=abacus: .* h100"):
        train_budgets.of_chip("abacus", None)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    place = tmp_path_factory.mktemp("shipped")
    with tarfile.open(ROOT / "colab" / "data" / "demo.tar.xz") as packed:
        packed.extractall(place, [m for m in packed.getmembers() if "checkpoints" not in m.name],
                          filter="data")
    return place / "demo"


def run(capsys, *arguments):
    status = cli.main(["advise", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def _home(place, study=None, costs=COSTS, **kwargs):
    """A workdir of members that trained by the law."""
    home = Workdir(place)
    home.bind(study or Study())
    (one, *_) = fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, replicates=0)
    batch = (study or Study()).train.batch_size
    for m, c in costs.items():
        records.write(home / "records", dataclasses.replace(
            one, params=c.params, gflops=c.gflops,
            identity=dataclasses.replace(one.identity, model=m, train_step=300_000 // batch)))
        home.member(m).mkdir(parents=True)
        (home.member(m) / "curves.csv").write_text("step,name,value\n" + "".join(
            f"{n // batch},validation/loss,{loss}\n" for n, loss in _losses(costs, **kwargs)[m]))
    return home.path


_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"


def test_the_documented_answer(capsys, demo):
    """What docs/advise.md shows is what is printed, to some per cent of its numbers."""
    block = re.search(r"    \$ (ldm-scaling advise [^\n]*--train-budget.*?\n)((?:    .*\n|\n)+)",
                      (ROOT / "docs" / "advise.md").read_text())
    assert '--records=runs/shipped/demo --train-budget="2 h"' in block[1]
    status, out, err = run(capsys, f"--records={demo}", "--train-budget=2 h")
    assert status == 0, err
    shown, printed = block[2].split(), out.split()
    assert [re.sub(_NUMBER, "#", w) for w in shown] == [re.sub(_NUMBER, "#", w) for w in printed]
    numbers = ([float(n.replace(",", "")) for n in re.findall(_NUMBER, " ".join(words))]
               for words in (shown, printed))
    np.testing.assert_allclose(*numbers, rtol=0.05)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_answer_for_programs(capsys, demo):
    flags = (f"--records={demo}", "--format=json")
    found = json.loads(run(capsys, *flags, "--train-budget=2 h")[1])
    flops, best = found["training_flops"], found["best"]
    assert flops == pytest.approx(7200 * found["flops_per_second"]["value"])
    assert 3e9 * best["gflops"]["value"] * best["images"]["value"] == pytest.approx(flops)
    assert best["steps"] * 64 == pytest.approx(best["images"]["value"])
    assert best["passes"] * 10_000 == pytest.approx(best["images"]["value"])
    assert {s["model"] for s in found["sizes"]} == {"c8", "c12", "c16", "c24", "c32", "c48", "c64"}
    same = json.loads(run(capsys, *flags, f"--train-budget={flops} flops")[1])
    assert same["best"] == found["best"] and same["flops_per_second"] is None
    half = json.loads(run(capsys, *flags, "--train-budget=20 gpu hours", "--device=v5e",
                          "--utilisation=0.5")[1])
    assert half["training_flops"] == pytest.approx(72_000 * 197e12 / 2)
    assert half["drawing"] is None
    both = json.loads(run(capsys, *flags, "--train-budget=2 h", "--pictures=10000",
                          "--calls=40")[1])
    share, best = both["drawing"].pop("share"), both["best"]
    assert both["drawing"] == {"pictures": 10_000, "calls": 40}
    assert both["flops"] == pytest.approx(flops)
    assert both["times_beyond_measured"] == pytest.approx(
        (1 - share) * found["times_beyond_measured"])
    assert share * flops == pytest.approx(4e14 * best["gflops"]["value"])
    assert both["training_flops"] == pytest.approx((1 - share) * flops)
    assert best["gflops"]["value"] < found["best"]["gflops"]["value"]


def test_training_and_drawing_in_words(capsys, demo):
    flags = (f"--records={demo}", "--train-budget=2 h", "--calls=40")
    status, out, err = run(capsys, *flags, "--pictures=1000000")
    assert all(run(capsys, *flags, f"--pictures={n}")[1] == out for n in ("1e6", "1_000_000"))
    said = " ".join(out.split())
    assert status == 2 and "drawing takes all of the budget: 40,000,000 calls of c8" in err
    status, out, err = run(capsys, *flags, "--pictures=200000")
    said = " ".join(out.split())
    assert status == 0, err
    assert said.startswith("For 2 h of training and 200,000 pictures of 40 calls, ")
    assert re.search(r"of the budget \d+% trains and \d+% draws", said) and "none none" in said
    assert "fewer FLOPs than the smallest network's" in said
    assert "nearest is c8: " in said
    assert all(len(line) <= 100 for line in out.splitlines())
    status, _, err = run(capsys, f"--records={demo}", "--budget=3 cost", "--calls=40")
    assert status == 2 and "--calls goes with --train-budget" in err


def test_what_is_said_of_the_reach(capsys, tmp_path):
    """Beyond, within and below what was measured; of the data; of a rate that falls."""
    base = Study()
    steady = dataclasses.replace(
        base, train=dataclasses.replace(base.train, learning_rate_decay="none"),
        data=dataclasses.replace(base.data, source="openmoji", train_pictures=200_000))
    falls = dataclasses.replace(
        steady, train=dataclasses.replace(base.train, learning_rate_decay="cosine"))
    away = dataclasses.replace(steady, data=Data(source="folder:nowhere"))
    places = {name: _home(tmp_path / name, study) for name, study in
              {"steady": steady, "falls": falls, "away": away}.items()}

    def said(place, budget):
        status, out, err = run(capsys, f"--records={place}", f"--train-budget={budget}")
        assert status == 0, err
        return " ".join(out.split())

    out = said(places["steady"], "300 tflops")
    assert "lies within what was measured" in out and "passes over" not in out
    assert "learning rate falls" not in out
    out = said(places["steady"], "5400 tflops")  # 10 times the most.
    assert "The budget is 10.0 times the most" in out and "the law goes on" in out
    out = said(places["steady"], "1e20 flops")
    assert "beyond what the data hold" in out and "the largest is s4" in out
    assert "below what was measured" in said(places["steady"], "1 tflops")
    assert "learning rate falls along these runs (cosine)" in said(places["falls"], "300 tflops")
    assert "is not known: they are not here" in said(places["away"], "300 tflops")
    hardly = _home(tmp_path / "hardly", steady, law=Law(0.1, (0.002, 12.0), (0.5, 0.45)), luck=0.04,
                   noise=0.002, seed=5)  # Sizes differ by their luck.
    out = said(hardly, "300 tflops")
    assert int(re.search(r"(\d+) of 200 replicates", out)[1]) < 190
    assert "too narrow for want of the others: these runs hardly tell one" in out
    status, _, err = run(capsys, f"--records={places['steady']}", "--train-budget=300 h")
    assert status == 2 and "keep no seconds of training: give --device=h100" in err
    status, _, err = run(capsys, f"--records={places['steady']}", "--train-budget=1e18 flops",
                         "--member=s0,s1,s2")
    assert status == 2 and "of 3 sizes (s0, s1, s2)" in err
    lost = places["steady"] / "models" / "s1" / "curves.csv"
    lost.unlink()
    status, _, err = run(capsys, f"--records={places['steady']}", "--train-budget=1e18 flops")
    assert status == 2 and f"{lost} is not there" in err


@pytest.mark.parametrize("arguments, part", [
    (["--budget=3 cost"], "--train-budget chooses what to train and --budget how to draw"),
    (["--pictures=5"], "--pictures=N and --calls=K go together"),
    (["--calls=5"], "--pictures=N and --calls=K go together"),
    *((["--calls=5", f"--pictures={n}"], f"'{n}' is not a whole number above 0")
      for n in ("1.5", "1e-3", "0", "-1e6", "1,000", "nan", "inf", "1e999999", "1e")),
    (["--pictures=1000000000000", "--calls=99"], "drawing takes all of the budget"),
    (["--sampler=ddim"], "--sampler is of drawing"),
    (["--max-steps=5"], "--max-steps is of drawing"), (["--metric=psnr"], "--metric is of drawing"),
    (["--device=h100"], "--device says what a time is in FLOPs"),
    (["--utilisation=0.5"], "it goes with --device"), (["--utilisation=2"], "is no share"),
    (["--member=c8,c99"], "--member=c99: there are c16, c24, c32, c8"),
    (["--published"], "the paper publishes none"),
    (["--train-budget=20 gpu hours"], "do not say how many chips"),
    (["--train-budget=20 cost"], "is no budget of training"),
    (["--train-budget=20 h", "--device=cpu"], "knows the peaks of"),
])
def test_what_does_not_go_together(capsys, demo, arguments, part):
    status, out, err = run(capsys, f"--records={demo}", "--train-budget=1e18 flops", *arguments)
    assert status == 2 and not out and part in err and err.count("\n") == 1


def test_where_there_is_no_study_of_ones_own(capsys, tmp_path, demo):
    status, _, err = run(capsys, "--train-budget=300 h")
    assert status == 2 and "needs --records=WORKDIR" in err and "the paper publishes none" in err
    status, _, err = run(capsys, "--budget=300 gpu hours")
    assert status == 2 and '--train-budget="300 h"' in err
    status, _, err = run(capsys, "--utilisation=0.4")
    assert status == 2 and "--utilisation goes with --train-budget" in err
    further = _home(tmp_path / "further", Study(start=Start(str(tmp_path), 40, hash="theirs")))
    status, _, err = run(capsys, f"--records={further}", "--train-budget=1e18 flops")
    assert status == 2 and "began with those of another study" in err
    status, _, err = run(capsys, f"--records={further},{demo}", "--train-budget=1e18 flops")
    assert status == 2 and "are several workdirs" in err
    two = _home(tmp_path / "two", costs={"c8": COSTS["s0"], "dit_s2": COSTS["s1"]})
    status, _, err = run(capsys, f"--records={two}", "--train-budget=1e18 flops")
    assert status == 2 and "follow no one law" in err
