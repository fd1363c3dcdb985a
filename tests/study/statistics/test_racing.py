"""Races on planted Fréchet curves: images saved, the right rate chosen, no winner among equals."""

import math

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.study.statistics import racing
from ldm_scaling.study.statistics.racing import Race, Score

RATES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
STEPS = (4, 10, 50)
D, N = 12, 1536
REAL = ReferenceStats(Moments(10**6, np.zeros(D), np.eye(D) * (10**6 - 1)), "planted")
TOLERANCE = 0.013


def _planted(seed, steps, n=N, flat=False, noise_ND=None):
    """Features of every rate and their true distances; with `noise_ND` other step counts share it.

    Gaussians about a mean whose length is least at a rate that falls with steps, and whose spread
    shrinks as guidance rises. Prompts and noise, 90% of the variance, are common to all rates.
    """
    rng = np.random.default_rng([seed, steps])
    common_ND, features, truth = rng.normal(size=(n, D)), {}, {}
    common_ND = common_ND if noise_ND is None else noise_ND
    for rate in RATES:
        away = 0.0 if flat else np.log(rate / (7 * steps**-0.25))
        spread = 0.9 if flat else 1 - 0.05 * np.log(rate)
        mean_D = np.zeros(D)
        mean_D[0] = np.sqrt(10 + 60 / steps + 9 * away**2)
        own_ND = rng.normal(size=(n, D))
        features[rate] = mean_D + spread * (np.sqrt(0.9) * common_ND + np.sqrt(0.1) * own_ND)
        truth[rate] = mean_D[0] ** 2 + D * (1 - spread) ** 2
    return features, truth


@pytest.mark.parametrize("steps", STEPS)
def test_a_quarter_of_the_images_chooses_as_the_exhaustive_sweep_does(steps):
    """Stored features of one exhaustive sweep, 40 random orders of its prompts."""
    features, truth = _planted(0, steps)
    exhaustive = {rate: frechet_from_features(f, REAL) for rate, f in features.items()}
    # The planted truth is what the exhaustive sweep measures, to its noise and bias.
    assert max(abs(exhaustive[r] - truth[r]) / truth[r] for r in RATES) < 0.1
    regret, images = [], []
    for k in range(40):
        order_N = np.random.default_rng(k).permutation(N)
        found = racing.on_features(features, REAL, order_N=order_N, replicates=24).outcome()
        regret.append(exhaustive[found.choice] / min(exhaustive.values()) - 1)
        images.append(found.images)
    assert max(images) <= len(RATES) * N / 4
    assert np.mean(np.array(regret) <= TOLERANCE) >= 0.95


def test_steps_and_guidance_race_together_within_a_budget():
    """The best cell of a budget: any arms race, pairs as well. The most steps are not the best."""
    noise_ND = np.random.default_rng(1).normal(size=(N, D))
    features = {
        (n, rate): f for n in (4, 10, 20)
        for rate, f in _planted(0, n, noise_ND=noise_ND)[0].items() if rate in RATES[1::2]
    }
    for arm in [a for a in features if a[0] == 20]:
        features[arm] = features[arm] + 0.4 * np.eye(D)[0]
    exhaustive = {arm: frechet_from_features(f, REAL) for arm, f in features.items()}
    assert min(exhaustive, key=exhaustive.get)[0] == 10
    regret = []
    for k in range(20):
        order_N = np.random.default_rng(k).permutation(N)
        found = racing.on_features(features, REAL, order_N=order_N, replicates=16).outcome()
        regret.append(exhaustive[found.choice] / min(exhaustive.values()) - 1)
        assert found.images <= len(features) * N / 4
    assert np.mean(np.array(regret) <= TOLERANCE) >= 0.95


def test_the_choice_is_near_the_true_best_on_new_features_too():
    regret = []
    for seed in range(40):
        features, truth = _planted(seed, 10)
        found = racing.on_features(features, REAL, replicates=24).outcome()
        regret.append(truth[found.choice] / min(truth.values()) - 1)
    assert np.mean(np.array(regret) <= TOLERANCE) >= 0.95


def test_among_identical_arms_a_winner_is_declared_no_more_often_than_stated():
    """The null case, at an error rate large enough to be seen at all."""
    for error, most in ((0.05, 0.05), (0.5, 0.5)):
        declared = []
        for seed in range(40):
            features, _ = _planted(seed, 10, n=384, flat=True)
            race = racing.on_features(features, REAL, error=error, replicates=24)
            declared.append(race.outcome().decided)
        assert np.mean(declared) <= most


def _scores(rng, arms, gap, noise, replicates=100):
    """Losses of arms, the first better by `gap`, and replicates that scatter as they do."""
    shared, shared_R = rng.normal(), rng.normal(size=replicates)
    out = {}
    for k in range(arms):
        loss = 30 + shared + noise * rng.normal() + gap * (k > 0)
        out[k] = Score(loss, loss + shared_R + noise * rng.normal(size=replicates))
    return out


def _run(rng, arms, gap, noise=0.5, error=0.05):
    race = Race(tuple(range(arms)), racing.schedule(arms, 1024), error)
    while not race.over:
        scores = _scores(rng, arms, gap, noise * math.sqrt(race.rounds[-1] / race.span[1]))
        race = race.tell({a: scores[a] for a in race.live})
    return race.outcome()


@pytest.mark.parametrize("arms", [2, 3, 8])
def test_the_error_rate_holds_in_many_races_and_a_clear_winner_is_declared(arms):
    """Two arms leave the least slack: there the stated rate is nearly used up."""
    rng = np.random.default_rng(arms)
    null = [_run(rng, arms, 0.0, error=0.2) for _ in range(800)]
    assert np.mean([o.decided for o in null]) <= 0.2 + 2 * np.sqrt(0.16 / 800)
    if arms == 2:
        assert np.mean([o.decided for o in null]) > 0.1
    clear = [_run(rng, arms, 20.0) for _ in range(50)]
    assert all(o.decided and o.choice == 0 and o.tied == () for o in clear)


def test_what_cannot_be_told_apart_is_named():
    rng = np.random.default_rng(0)
    tied = [_run(rng, 4, 0.0) for _ in range(200)]
    assert all(o.choice not in o.tied and bool(o.tied) != o.decided for o in tied)
    assert {a for o in tied for a in o.tied} == {0, 1, 2, 3}


@pytest.mark.parametrize("arms, images, saving", [(8, 1024, 4), (5, 777, 4), (2, 200, 2),
                                                  (11, 5000, 6.5)])
def test_halving_draws_so_many_times_fewer(arms, images, saving):
    rounds = racing.schedule(arms, images, saving)
    assert len(rounds) == math.ceil(math.log2(arms)) and rounds[-1] <= images
    assert all(b == 2 * a for a, b in zip(rounds, rounds[1:], strict=False))
    rng = np.random.default_rng(0)
    race = Race(tuple(range(arms)), rounds)
    while not race.over:
        noisy = _scores(rng, arms, 0.0, 1.0)
        race = race.tell({a: noisy[a] for a in race.live})
    assert arms * images / race.images >= saving
    assert len(race.told[-1]) <= 2


def test_a_beaten_arm_stops_before_its_half_does():
    scores = {a: Score(10.0 + 50 * (a > 0), np.linspace(-1, 1, 50) * (1 + a)) for a in range(8)}
    race = Race(tuple(range(8)), (16, 32, 64)).tell(scores)
    assert race.live == (0,)  # And goes on alone, to as many images as other races' choices.
    assert race.span == (16, 32)
    race = race.tell({0: scores[0]}).tell({0: scores[0]})
    assert race.over and race.images == 8 * 16 + 48
    assert race.outcome().decided


def test_a_race_is_a_function_of_its_scores():
    """Told the same again, from the beginning, it stands where it stood."""
    features, _ = _planted(3, 10, n=384)
    race = racing.on_features(features, REAL, replicates=30)
    again = Race(race.arms, race.rounds, race.error)
    for scores in race.told:
        assert again.live == tuple(scores)
        again = again.tell(scores)
    assert again.outcome() == race.outcome()


def test_ties_go_to_the_first_arm():
    race = Race(("b", "a"), (16,))
    same = Score(1.0, np.zeros(10))
    assert race.tell({"a": same, "b": same}).outcome().choice == "b"


def test_mistakes_are_named():
    with pytest.raises(UserError, match="12 images an arm: 16 are needed.*sweep.num_images"):
        racing.schedule(8, 100)
    with pytest.raises(UserError, match="at least 2 different arms"):
        Race((1, 1), (16,))
    with pytest.raises(UserError, match="rise"):
        Race((1, 2), (16, 16))
    race = Race((1, 2), (16,))
    with pytest.raises(UserError, match="goes on"):
        race.outcome()
    with pytest.raises(UserError, match=r"run by \(1, 2\)"):
        race.tell({1: Score(0.0, np.zeros(9))})
    with pytest.raises(UserError, match="paired replicates"):
        race.tell({1: Score(0.0, np.zeros(9)), 2: Score(0.0, np.zeros(8))})
    with pytest.raises(UserError, match="share prompts and noise"):
        racing.on_features({1: np.zeros((64, D)), 2: np.zeros((65, D))}, REAL)
