"""The six claims: supported where planted, contradicted where the contrary is, else undecided."""

import dataclasses
import re

import numpy as np
import pytest
import scipy.stats

from ldm_scaling.study import curves, winners
from ldm_scaling.study.statistics import claims, trends, words
from ldm_scaling.study.statistics.claims import Evidence
from ldm_scaling.study.statistics.trends import Tuned
from tests.study import fake_records as fake
from tests.study import paper_records as paper

FD = "fd_effnetlite0"
SIZES = tuple(fake.CHANNELS)
# Larger sizes are worse throughout.
REVERSED = fake.Truth({m: 40.0 + 20 * k for k, m in enumerate(SIZES)})


def _judged(evidence, metric=FD):
    return {v.number: v for v in claims.verdicts(evidence, metric)}


def _renamed(records, sampler):
    return [dataclasses.replace(r, identity=dataclasses.replace(r.identity, sampler=sampler))
            for r in records if r.identity.sampler == "ddim"]


@pytest.fixture(scope="module")
def study():
    return fake.make()


def _fine_tuned(pretraining, length, noise, seed=0):
    rng, out = np.random.default_rng(seed), []
    for k in range(8):
        before = 30.0 - k
        for n in (1e3, 4e3, 1.6e4, 6.4e4):
            after = 20 + pretraining * before - length * np.log(n) + noise * rng.normal()
            out.append(Tuned(f"m{k}", before, n, after))
    return out


def test_true_claims_are_supported(study):
    found = _judged(Evidence.of(
        [*study, *_renamed(study, "codi")], super_resolution=study,
        fine_tuned=_fine_tuned(1.0, 0.2, 0.3),
    ))
    assert {n: v.outcome for n, v in found.items()} == dict.fromkeys(range(1, 7), "supported")
    for v in found.values():
        assert v.probability >= 0.95 and v.effect and v.test and v.headline
    low, high = found[1].interval
    assert low < high < 0
    low, high = found[3].interval
    assert 0 < low < high


def test_false_claims_are_contradicted():
    records = fake.make(REVERSED)
    turned = fake.Truth({m: 40.0 - 5 * k for k, m in enumerate(SIZES)}, bend=0.0)
    large = fake.make(turned)  # The largest wins everywhere.
    found = _judged(Evidence.of([*records, *_renamed(records, "lcm")], super_resolution=large,
                                fine_tuned=_fine_tuned(0.1, 3.0, 0.3)))
    assert {n: v.outcome for n, v in found.items()} == dict.fromkeys(range(1, 7), "contradicted")


@pytest.mark.parametrize("records", [
    [], fake.make(models=("c8",), samplers=("ddim",))[:3], fake.make(replicates=0),
], ids=["none", "three", "no replicates"])
def test_what_was_not_measured_is_undecided_and_said(records):
    found = _judged(Evidence.of(records))
    assert [n for n, v in found.items() if v.outcome != "undecided"] in ([], [1])
    assert "No records of fine-tuned members" in found[2].headline
    assert "No records of super-resolution" in found[5].headline
    assert "No records of distilled members" in found[6].headline
    if len(records) < 5:
        assert "No records of three or more" in found[1].headline
        assert "Not measured" in found[3].headline and "Not measured" in found[4].headline


def test_claim_4_needs_every_sampler_to_agree(study):
    """DDPM is replaced by a study in which the smallest size always wins."""
    other = [r for r in fake.make(REVERSED) if r.identity.sampler == "ddpm"]
    found = _judged(Evidence.of([r for r in study if r.identity.sampler != "ddpm"] + other))
    assert (found[3].outcome, found[4].outcome) == ("supported", "contradicted")
    found = _judged(Evidence.of([r for r in study if r.identity.sampler != "dpmpp_2m"]))
    assert found[4].outcome == "undecided" and "DPM-Solver++" in found[4].headline


def test_what_is_measured_in_part_is_said_with_the_verdict(study):
    """As of a sweep whose sizes finish one by one."""
    running = [r for r in study if r.identity.model != "c48" or (
        r.identity.sampler == "ddim" and r.identity.steps < 20)]
    found = _judged(Evidence.of(running, super_resolution=running))
    assert not found[4].tested and found[4].headline == (
        "Not measured fully yet: DDPM and DPM-Solver++ (2M).")
    assert "Judged without 2 cells of the grid" in found[3].because
    apart = [r for r in study if r.identity.model != "c48" or r.identity.sampler == "ddpm"]
    assert "Judged without 1 network of these records" in _judged(Evidence.of(apart))[1].because
    assert "Judged without 1 cell of the grid" in found[5].because
    assert "without" not in "".join(v.because for v in _judged(Evidence.of(study)).values())
    rows = _fine_tuned(1.0, 0.2, 0.3)
    assert "8 sizes, 4 lengths of fine-tuning, 1 cell of which not measured." == _judged(
        Evidence.of(study, fine_tuned=rows[1:]))[2].because


def test_parts_that_are_undecided_contradict_nothing_together():
    for seed in range(20):
        records = fake.make(fake.flat_truth(SIZES), guidance=(3.0,), seed=seed)
        parts, together = winners.crossovers(
            curves.quality_curves(records, FD), FD, SIZES, fake.STEPS)
        alone = {words.judge_alone(c.probability, c.alone)[0] for c in parts.values()}
        if alone == {"undecided"} and together <= 0.05:
            break
    assert alone == {"undecided"} and together <= 0.05
    assert _judged(Evidence.of(records))[4].outcome == "undecided"


def test_claim_4_is_about_solvers_by_their_whole_names(study):
    """One of one's own stands for none, whatever it is called; options and spacings change nothing.
    """
    rest = [r for r in study if r.identity.sampler != "ddim"]
    found = _judged(Evidence.of([*rest, *_renamed(study, "ddim_early")]))
    assert found[4].outcome == "undecided" and "DDIM" in found[4].headline
    found = _judged(Evidence.of([*rest, *_renamed(study, "ddim:eta=0.5")]))
    assert found[4].outcome != "undecided"
    assert not Evidence.of(_renamed(study, "lcm_own")).distilled
    assert Evidence.of(_renamed(study, "lcm:final=zero")).distilled


def test_equal_sizes_support_nothing_more_often_than_stated():
    """Null: claims 1, 3 and 5 hold for no truth; each errs in at most one study of twenty."""
    wrong = {1: 0, 3: 0, 5: 0}
    for seed in range(120):
        records = fake.make(fake.flat_truth(SIZES), samplers=("ddim",), guidance=(3.0,),
                            steps={"ddim": (4, 10, 50)}, replicates=100, seed=seed)
        found = _judged(Evidence.of(records, super_resolution=records))
        for number in wrong:
            wrong[number] += found[number].outcome == "supported"
    assert all(n <= 0.05 * 120 + 2 * np.sqrt(0.05 * 0.95 * 120) for n in wrong.values())


@dataclasses.dataclass(frozen=True)
class _OneEnd(fake.Truth):
    """Sizes that are equal at the smallest budget or the largest one, and rank clearly at the
    other, as claim 3 has it."""

    equal: str = "low"

    def distance(self, model, sampler, steps, guidance):
        place = 6 * SIZES.index(model)
        if steps == 4:
            return 100.0 + (0 if self.equal == "low" else place)
        return 60.0 - (0 if self.equal == "high" else place)


@pytest.mark.parametrize("equal", ["low", "high"])
def test_sizes_that_are_equal_at_one_budget_support_no_crossing(equal):
    """Null: one smaller of five equal sizes nearly always wins, or one larger: claims 3 and 6 are
    supported in at most one study of twenty all the same; claim 4 asks more."""
    wrong, trials = dict.fromkeys((3, 4, 6), 0), 120
    for seed in range(trials):
        records = fake.make(_OneEnd(equal=equal), samplers=("ddim",), guidance=(3.0,),
                            steps={"ddim": (4, 200)}, replicates=200, seed=seed)
        every = [r for s in ("ddim", "ddpm", "dpmpp_2m") for r in _renamed(records, s)]
        found = _judged(Evidence.of([*every, *_renamed(records, "lcm")]))
        for number in wrong:
            wrong[number] += found[number].outcome == "supported"
    assert all(n <= 0.05 * trials + 2 * np.sqrt(0.05 * 0.95 * trials) for n in wrong.values())
    records = fake.make(_OneEnd(equal="no"), samplers=("ddim",), guidance=(3.0,),
                        steps={"ddim": (4, 200)})
    assert _judged(Evidence.of(records))[3].outcome == "supported"


def test_only_the_longest_training_counts_for_the_budget_claims(study):
    def shorter(r):
        identity = dataclasses.replace(r.identity, train_step=200, model_hash="early")
        metrics = {k: 1.5 * v for k, v in r.metrics.items()}
        drawn = {k: [1.5 * x for x in v] for k, v in r.replicates.items()}
        return dataclasses.replace(r, identity=identity, metrics=metrics, replicates=drawn)

    both = _judged(Evidence.of([*study, *map(shorter, study)]))
    alone = _judged(Evidence.of(study))
    assert both[3] == alone[3] and both[4] == alone[4]
    assert "differ in size and training length" in both[1].because
    assert "cannot be told apart" in alone[1].because


def _scaled(exponent, seed, noise=0.01):
    """Distances that fall as a power of compute, for five sizes at three training lengths."""
    rng, out = np.random.default_rng(seed), []
    for step in (1000, 4000, 16000):
        for r in fake.make(fake.flat_truth(SIZES), samplers=("ddim",), guidance=(3.0,),
                           steps={"ddim": (4, 50)}, noise=0.3, shared=0.0, seed=seed + step):
            own = np.random.default_rng([seed, step, r.base_channels])  # Of the trained network.
            factor = (r.gflops * step) ** exponent * np.exp(noise * own.normal())
            identity = dataclasses.replace(r.identity, train_step=step)
            out.append(dataclasses.replace(
                r, identity=identity, metrics={FD: r.metrics[FD] * factor},
                replicates={FD: [x * factor for x in r.replicates.get(FD, [])]}, intervals={}))
    rng.shuffle(out)
    return out


def test_the_trend_recovers_a_planted_exponent_at_the_stated_rate():
    hit = []
    for seed in range(60):
        found = trends.training(_scaled(-0.05, seed), FD)
        assert (found.points, found.sizes, found.lengths, found.steps) == (15, 5, 3, 50)
        hit.append(found.low <= 10**-0.05 - 1 <= found.high)
    assert np.mean(hit) >= 0.9


@pytest.mark.parametrize("sizes, apart", [(3, 1.0), (5, 0.4)])
def test_checkpoints_of_one_run_are_not_independent(sizes, apart):
    """Null: quality is each run's luck. Four checkpoints of it support claim 1 no more often."""
    rng, sure, trials = np.random.default_rng(0), [], 400
    size_P = np.repeat(np.arange(sizes), 4)
    x_P = apart * size_P + 0.3 * np.tile(np.arange(4), sizes)
    for _ in range(trials):
        y_P = rng.normal(size=sizes)[size_P] + 0.1 * rng.normal(size=len(x_P))
        slope, error = np.polyfit(x_P, y_P, 1)[0], trends._error(x_P, y_P, size_P)
        sure.append(scipy.stats.t.cdf(-slope / error, sizes - 2) >= 0.95)
    assert np.mean(sure) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_trend_of_one_network_a_size_is_least_squares():
    x_P, y_P = np.arange(6.0), np.random.default_rng(1).normal(size=6)
    plain = scipy.stats.linregress(x_P, y_P).stderr
    assert trends._error(x_P, y_P, np.arange(6)) == pytest.approx(plain)
    # Of one more checkpoint there is nothing to tell its noise by: that between runs stands for it.
    x_P, size_P = np.append(x_P, 5.5), np.append(np.arange(6), 5)
    assert 0.5 * plain < trends._error(x_P, np.append(y_P, y_P[-1]), size_P) < plain


def test_equal_values_are_no_trend_whatever_they_round_to():
    exact = fake.make(fake.flat_truth(SIZES[:3]), models=SIZES[:3], noise=0.0, shared=0.0)
    for value in (40.0, 0.1, 2284.7):
        some = [dataclasses.replace(r, metrics={FD: value}, intervals={},
                                    replicates={k: [value] * 9 for k in r.replicates})
                for r in exact]
        found = trends.training(some, FD)
        assert (found.change, found.probability) == (0.0, 0.5)


def test_two_sizes_are_no_trend():
    records = [r for r in _scaled(-0.05, 0) if r.identity.model in ("c8", "c32")]
    assert trends.training(records, FD) is None
    assert "three or more sizes" in _judged(Evidence.of(records))[1].headline


def test_the_trend_follows_a_measure_where_higher_is_better():
    found = trends.training(fake.make(guidance=(3.0,)), "caption_agreement")
    assert found.low > 0 and found.probability > 0.95


def test_a_measure_about_0_changes_in_its_own_unit():
    """By 0.004 for ten times the compute, as planted: no share of a mean near 0, no exponents."""
    def moved(r):
        def kid(value):
            return 1e-6 * (value - 40.0) - 0.004 * np.log10(r.gflops)

        return dataclasses.replace(
            r, metrics={"kid_clean": kid(r.metrics[FD])}, intervals={},
            replicates={"kid_clean": [kid(v) for v in r.replicates.get(FD, ())]})

    records = [moved(r) for r in fake.make(fake.flat_truth(SIZES), guidance=(3.0,))]
    found = trends.training(records, "kid_clean")
    assert not found.relative and found.low < -0.004 < found.high
    assert found.change == pytest.approx(-0.004, rel=0.01)
    said = _judged(Evidence.of(records), "kid_clean")[1]
    assert re.fullmatch(r"-0\.0040\d|-0\.0039\d", said.effect.split()[0])
    assert "%" not in said.effect and "changes KID (clean) by -0.00" in said.headline


def test_a_large_change_is_a_factor():
    records = fake.make(REVERSED, guidance=(3.0,))
    grown = [dataclasses.replace(r, metrics={FD: r.metrics[FD] * r.gflops**2}, intervals={},
                                 replicates={}) for r in records]
    said = _judged(Evidence.of(grown))[1]
    factor = float(said.effect.split(" times the FD")[0])
    low, high = said.interval
    assert 100 < low < factor < high and "makes FD" in said.headline


@pytest.mark.parametrize("pretraining, length, larger", [(1.0, 0.2, True), (0.1, 3.0, False)])
def test_shares_of_variance_find_the_planted_cause(pretraining, length, larger):
    found = trends.downstream(_fine_tuned(pretraining, length, 0.0))
    assert found.pretraining + found.length == pytest.approx(1.0)  # Nothing else varies.
    assert (found.pretraining > found.length) == larger
    assert (found.low > 0) == larger and found.sizes == 8 and found.lengths == 4


@pytest.mark.parametrize("sizes, luck", [(4, 0.0), (4, 1.0), (8, 1.0)])
def test_where_nothing_matters_the_share_is_no_evidence(sizes, luck):
    """Null: downstream quality is noise, or each size's luck. Claim 2 is then decided either way
    in few cases, also with few sizes."""
    decided = []
    for seed in range(50):
        rng = np.random.default_rng([seed, sizes])
        lucky = dict(zip([f"m{k}" for k in range(8)], luck * rng.normal(size=8)))
        rows = [dataclasses.replace(r, downstream=r.downstream + lucky[r.model])
                for r in _fine_tuned(0.0, 0.0, 0.5, seed) if int(r.model[1:]) < sizes]
        decided.append(trends.downstream(rows).probability)
    assert np.mean(np.array(decided) >= 0.95) <= 0.08
    assert np.mean(np.array(decided) <= 0.05) <= 0.15


def test_too_few_fine_tuned_sizes_say_nothing():
    rows = _fine_tuned(1.0, 0.2, 0.1)
    assert trends.downstream([r for r in rows if r.model in ("m0", "m1", "m2")]) is None
    assert trends.downstream([r for r in rows if r.length == 1e3]) is None


def test_records_are_told_apart_by_their_task():
    """Members fine-tuned for super-resolution, on the report block alone: what they reach follows
    what they reached before, whose part in the variance is planted as the larger, and small ones
    win small budgets. Text to image is judged as without them."""
    exact = {"noise": 1e-3, "shared": 1e-3}
    main = paper.grid(**exact)
    fine_tuned = paper.super_resolution(**exact)
    evidence = Evidence.of([*main, *fine_tuned, *paper.distilled(), *paper.dreambooth()])
    assert {r.task for r in evidence.records} == {"text_to_image"}
    assert {r.task for r in evidence.super_resolution} == {"super_resolution"}
    assert {r.task for r in evidence.distilled} == {"consistency"}

    rows = trends.fine_tuned(main, fine_tuned, paper.FID, (0, 1))
    assert {(r.model, r.length) for r in rows} == {
        (m, t) for m in paper.SIZES for t in (5_000, 10_000, 20_000)
    }
    for r in rows:  # As planted, at 50 steps.
        far = paper.floor(r.model) * (20_000 / r.length) ** 0.1 + 40 / 50
        assert r.downstream == pytest.approx(0.6 * far, rel=0.02)
    found = _judged(evidence, paper.FID)
    assert found[2].tested and found[5].tested and found[5].outcome == "supported"
    assert found[1] == _judged(Evidence.of(main), paper.FID)[1]
