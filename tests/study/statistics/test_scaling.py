"""From records and training runs to laws: the planted ones come back."""

import dataclasses
import warnings

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study.statistics import fits, scaling, trends
from ldm_scaling.study.statistics.laws import Law
from tests.study import fake_records as fake

FD = "fd_effnetlite0"
STEPS = (500, 2000, 8000, 32000)
BATCH = 64


def _records(law, noise, seed=0):
    """Five sizes at four training lengths, distances by a law of parameters and images."""
    rng, out = np.random.default_rng(seed), []
    exact = fake.make(fake.flat_truth(tuple(fake.CHANNELS)), samplers=("ddim",), guidance=(3.0,),
                      steps={"ddim": (4, 50)}, noise=0.05, shared=0.0, replicates=40)
    for step in STEPS:
        for model in fake.CHANNELS:
            own = np.exp(noise * rng.normal())
            for r in (r for r in exact if r.identity.model == model):
                value = own * law(np.array([[r.params, step * BATCH]]))[0]
                scale = value / 40.0
                out.append(dataclasses.replace(
                    r, identity=dataclasses.replace(r.identity, train_step=step),
                    metrics={FD: r.metrics[FD] * scale}, intervals={},
                    replicates={FD: [x * scale for x in r.replicates.get(FD, [])]}))
    return out


LAW = Law(20.0, (6e3, 4e3), (0.5, 0.4))


def test_rows_are_the_networks_and_their_compute():
    records = _records(LAW, 0.0)
    runs = scaling.of_records(records, FD, BATCH)
    assert len(runs.models) == 20 and runs.value_RN.shape == (40, 20)
    for m, params, images, gflops in zip(runs.models, runs.params_N, runs.images_N, runs.gflops_N,
                                         strict=True):
        r = next(r for r in records if r.identity.model == m)
        assert params == r.params and images / BATCH in STEPS
        assert gflops == pytest.approx(3 * r.gflops * images)
    assert {n.point.steps for n in trends.networks(records, FD)} == {50}


def test_the_law_of_size_and_images_comes_back():
    runs = scaling.of_records(_records(LAW, 0.005), FD, BATCH)
    found = runs.fitted("size and images", delta=0.005)
    true_N = LAW(runs.scales("size and images"))
    np.testing.assert_allclose(found.law(runs.scales("size and images")), true_N, rtol=0.015)
    low, high = found.predict(runs.scales("size and images"))
    assert np.mean((low <= true_N) & (true_N <= high)) >= 0.8
    foretold = runs.held_out("size and images", delta=0.005)
    assert len(foretold.measured) == len(STEPS) and foretold.error < 0.04


def test_losses_along_runs_give_the_same_law():
    law = Law(0.3, (9.0, 30.0), (0.3, 0.35))
    params = {"a": 10**5, "b": 4 * 10**5, "c": 16 * 10**5}
    gflops = {"a": 0.1, "b": 0.4, "c": 1.6}
    losses = {m: [(s, law(np.array([[n, s * BATCH]]))[0]) for s in (0, *STEPS) if s]
              for m, n in params.items()}
    runs = scaling.of_losses(losses, params, gflops, BATCH)
    found = runs.fitted("size and images", replicates=20).law
    assert fits.value(found, "alpha") == pytest.approx(0.3, rel=1e-4)
    assert fits.value(found, "beta") == pytest.approx(0.35, rel=1e-4)
    by_compute = runs.fitted("compute", delta=0.05, replicates=20)
    assert 0 < by_compute.law.exponents[0] < 1


def test_several_runs_of_a_size_tell_its_luck():
    """They are no more sizes: how far a size lies from the law its runs share, and a law of five
    sizes that were trained three times each knows of five. It holds the truth as it should, where
    sizes lie off the law too; budgets count sizes, not runs."""
    law, steps = Law(0.1, (60.0, 300.0), (0.5, 0.45)), (500, 1000, 2000, 4000)
    params = {m: 430 * c**2 + 9000 * c for m, c in fake.CHANNELS.items()}
    gflops = {m: 1e-6 * n for m, n in params.items()}
    held, freedom = [], set()
    for seed in range(30):
        rng, losses = np.random.default_rng(seed), {}
        for m, n in params.items():
            off = rng.normal(0, 0.01)
            for run in (m, f"{m}_run1", f"{m}_run2"):
                luck = np.exp(off + rng.normal(0, 0.003))
                losses[run] = [(s, luck * law(np.array([[n, s * BATCH]]))[0]) for s in steps]
        every = scaling.of_losses(losses, params, gflops, BATCH)
        once = scaling.of_losses({m: losses[m] for m in params}, params, gflops, BATCH)
        assert every.models.count("c8") == 12 and every.each.count("c8_run2") == 4
        assert len(every.ends().models) == 15 and set(every.ends().images_N) == {4000.0 * BATCH}
        at = np.array([[params["c24"], 2000.0 * BATCH]])
        for runs in (every, once)[: 2 if seed == 0 else 1]:
            fit = runs.fitted("size and images", offset=False, replicates=100)
            freedom.add(fit.scatter_by(runs.models).freedom)
            low, high = fit.predict(at)
        held.append(low[0] <= law(at)[0] <= high[0])
    assert np.mean(held) > 0.85
    assert len(freedom) == 1
    under_way = losses | {"c8_run1": losses["c8_run1"][:2]}
    ends = scaling.of_losses(under_way, params, gflops, BATCH).ends()
    assert "c8_run1" not in ends.each and set(ends.images_N) == {4000.0 * BATCH}
    few = {m: losses[m] for m in [*list(params)[:3], "c8_run1", "c16_run1"]}
    assert not scaling.of_losses(few, params, gflops, BATCH).at_budgets().models


def test_the_warm_up_enters_no_law():
    runs = scaling.of_losses({"a": [(s, 1.0) for s in range(0, 101, 5)], "b": [(40, 1.0)]},
                             {"a": 1, "b": 2}, {"a": 1.0, "b": 2.0}, 1, settled=0.1)
    assert runs.images_N.min() == 10 and len(runs.models) == 19 + 1


def test_a_law_of_calls_and_images_gives_the_best_at_each_compute():
    """Whatever a parameter costs: here larger networks cost less for each."""
    law = Law(0.3, (2.0, 30.0), (0.3, 0.45))
    gflops = {f"m{k}": 0.02 * 2.0**k for k in range(6)}
    params = {m: int(1e6 * g**1.3) for m, g in gflops.items()}
    losses = {m: [(s, law(np.array([[g, s * BATCH]]))[0]) for s in STEPS]
              for m, g in gflops.items()}
    runs = scaling.of_losses(losses, params, gflops, BATCH)
    found = runs.fitted("call and images", replicates=2).law
    compute = np.geomspace(1e3, 1e6, 5)
    by_law = found.least(scaling.BACKWARD * compute, per=1.0)
    grid = np.geomspace(1e-4, 1e4, 20001)
    best = [law(np.stack([grid, c / grid], axis=1)).min() for c in compute]
    np.testing.assert_allclose(by_law, best, rtol=1e-4)
    assert found.least_exponent == pytest.approx(0.3 * 0.45 / 0.75, rel=1e-4)


def test_runs_meet_at_budgets_that_enough_of_them_pass():
    law = Law(0.3, (9.0, 30.0), (0.3, 0.35))
    params = {f"m{k}": int(1e5 * 2**k) for k in range(5)}
    gflops = {m: 1e-6 * n for m, n in params.items()}
    steps = np.unique(np.geomspace(500, 32000, 40).astype(int))
    losses = {m: [(s, law(np.array([[n, s * BATCH]]))[0]) for s in steps]
              for m, n in params.items()}
    runs = scaling.of_losses(losses, params, gflops, BATCH)
    met = runs.at_budgets(4)
    budgets, count = np.unique(met.gflops_N, return_counts=True)
    assert len(budgets) == 4 and count.min() >= 4 and count.max() == 5
    for k, m in enumerate(met.models):
        own = runs.some(np.array(runs.models) == m)
        assert own.gflops_N.min() <= met.gflops_N[k] * (1 + 1e-9)
        assert met.gflops_N[k] <= own.gflops_N.max() * (1 + 1e-9)
        assert met.gflops_N[k] == pytest.approx(3 * gflops[m] * met.images_N[k])
        true = law(np.array([[params[m], met.images_N[k]]]))[0]
        assert met.value_N[k] == pytest.approx(true, rel=1e-3)
    three = runs.some(np.isin(runs.models, ["m0", "m1", "m2"]))
    assert three.at_budgets().models == ()
    ends = runs.ends()
    assert set(ends.images_N) == {32000 * BATCH} and set(ends.models) == set(params)


@pytest.mark.parametrize(("longest", "count"), [(9.0, 5), (100.0, 60)])
def test_budgets_that_lie_close_together_stay_apart(longest, count):
    """Runs that meet over an eighth of their compute, and many budgets over more of it."""
    law = Law(0.3, (60.0, 60.0), (0.4, 0.4))
    params = {f"m{k}": 1000 * 2**k for k in range(4)}
    gflops = {m: 1e-6 * n for m, n in params.items()}
    steps = np.geomspace(600, 600 * longest, 9)
    losses = {m: [(s, law(np.array([[n, s]]))[0]) for s in steps] for m, n in params.items()}
    runs = scaling.of_losses(losses, params, gflops, 1)
    met = runs.at_budgets(count)
    assert np.ptp(np.diff(np.log(np.unique(met.gflops_N)))) < 1e-12
    assert np.diff(np.log(np.unique(met.gflops_N))).max() < 0.05
    found = runs.frontier(count, replicates=20)
    assert [p.points for p in found.profiles] == [4] * count
    assert found.exponent == pytest.approx(0.5, abs=0.05)


def test_budgets_read_off_the_same_runs_do_not_count_as_apart():
    """Equal exponents: the best size grows as the root of the compute, within the interval."""
    law, hit = Law(0.3, (60.0, 60.0), (0.4, 0.4)), []
    params = {f"m{k}": int(200 * 1.7**k) for k in range(8)}
    steps = np.geomspace(30, 32000, 14).astype(int)
    for seed in range(16):
        rng = np.random.default_rng(seed)
        losses = {}
        for m, n in params.items():
            luck = rng.normal(0, 0.002)
            losses[m] = [(s, law(np.array([[n, s]]))[0] * np.exp(luck + rng.normal(0, 0.004)))
                         for s in steps]
        runs = scaling.of_losses(losses, params, {m: 1e-6 * n for m, n in params.items()}, 1)
        found = runs.frontier(replicates=100)
        low, high = found.exponent_interval
        hit.append(low <= 0.5 <= high)
    assert np.mean(hit) >= 0.85


def test_where_a_law_passes_through_any_luck_there_is_no_interval():
    """Of runs that are as many as what a law takes of them nothing is left to tell luck by."""
    runs = scaling.of_records(_records(LAW, 0.02), FD, BATCH)
    four = runs.some(np.isin(runs.models, ["c8", "c16", "c24", "c32"]))
    with pytest.raises(UserError, match="any luck of 3 runs.*fit it to 4 or more"):
        four.held_out("size and images", delta=0.02, replicates=4)
    ends = four.some(np.array([3, 5, 9, 14]))  # Of each size one, of several lengths.
    found = ends.fitted("call and images", offset=False, delta=0.02, replicates=4)
    assert found.law.exponents
    at = ends.scales("call and images")
    for ask in (lambda: found.interval("alpha"), lambda: found.predict(at),
                lambda: found.predict_new(at)):
        with pytest.raises(UserError, match="any luck of 4 runs.*fit it to 5 or more"):
            ask()
    low, high = four.fitted("size and images", delta=0.02, replicates=40).interval("alpha")
    assert low < high


def test_mistakes_are_named():
    runs = scaling.of_records(_records(LAW, 0.0), FD, BATCH)
    with pytest.raises(UserError, match="fitted by size, images, compute.*not by 'cost'"):
        runs.fitted("cost")
    with pytest.raises(UserError, match="no network has a reported record"):
        scaling.of_records([], FD, BATCH)
    one = runs.some(np.array(runs.models) == "c8")
    with warnings.catch_warnings(), pytest.raises(UserError, match="0 of 0 training budgets"):
        warnings.simplefilter("error")
        one.frontier()
    with pytest.raises(UserError, match="train.validate_every"):
        scaling.of_losses({"a": []}, {"a": 1}, {"a": 1.0}, BATCH)
