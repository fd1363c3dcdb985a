"""Trends that claims 1 and 2 are about: quality over training compute, and what decides quality
after fine-tuning."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, repeated
from ldm_scaling.study.curves import Point
from ldm_scaling.study.records import Record

STEPS = 50
"""At which the paper compares networks along their training."""

_ROUNDING = 1e-12
"""Relative slopes to which equal values may round."""


@dataclasses.dataclass(frozen=True)
class Trend:
    """Quality against training compute.

    Attributes:
      change: of the measure for ten times the compute: relative, -0.1 is 10% less, or in the
        measure's own unit.
      low, high: its 95% interval.
      relative: which of the two it is.
      probability: that more compute is better.
      points, sizes, lengths: networks, different sizes, different training lengths.
      sampler, steps: how they were sampled.
      span: largest compute over the smallest.
      without: networks of the records that were not sampled like that.
    """

    change: float
    low: float
    high: float
    relative: bool
    probability: float
    points: int
    sizes: int
    lengths: int
    sampler: str
    steps: int
    span: float
    without: int


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One trained network and what it reached.

    Attributes:
      model: its size's name.
      train_step: how long it was trained.
      params: parameters.
      gflops: of one call.
      point: at the sampler and steps that all are compared at.
    """

    model: str
    train_step: int
    params: int
    gflops: float
    point: Point

    @property
    def compute(self) -> float:
        """GFLOPs of a call x training steps (the paper's unit in Fig. 3); a published network
        without known steps counts as one."""
        return self.gflops * max(self.train_step, 1)


def networks(
    records: Sequence[Record], metric: str, select_block: int = 0, report_block: int = 1,
    choose_by: str | None = None, luck: bool = True,
) -> list[Network]:
    """Every trained network at the first sampler (DDIM) and the steps that the most of them were
    sampled with, each at its best guidance (by `metric`, or the measure that is named). Of several
    such step counts it is `STEPS`, the paper's, or else the largest. With `luck` replicates hold
    that of a training run, where sizes were trained several times."""
    records = repeated.merged(curves_lib.last_rounds(records), luck)
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for r in records:
        groups[r.identity.model, r.identity.train_step].append(r)
    curves = {
        key: curves_lib.quality_curves(
            curves_lib.distinct(group), metric, choose_by, select_block, report_block)
        for key, group in groups.items()
    }
    sampler, steps = _common(records, list(curves.values()))
    out = []
    for key, found in curves.items():
        first = groups[key][0]
        out += [Network(*key, first.params, first.gflops, p)
                for (_, s), curve in found.items() if s == sampler
                for p in curve if p.steps == steps]
    return sorted(out, key=lambda n: (n.params, n.train_step))


def training(
    records: Sequence[Record], metric: str, select_block: int = 0, report_block: int = 1
) -> Trend | None:
    """The straight line of the measure over log training compute; None below 3 sizes or computes.

    A measure that is smaller the better, and above 0, is fitted in its logarithm: the slope is
    the exponent of a power law. Another is fitted as it is. The slope's error adds up two parts:
    the scatter about the line and the paired replicates' spread. Each size was trained once, and
    its luck moves all of its points, at whatever length: the line is told from as many runs as
    there are sizes (t with sizes - 2 degrees).
    """
    # Of luck the scatter between sizes tells.
    found = networks(records, metric, select_block, report_block, luck=False)
    points, compute = [n.point for n in found], [n.compute for n in found]
    models, size_P = np.unique([n.model for n in found], return_inverse=True)
    if min(len(models), len({round(c, 9) for c in compute})) < 3:
        return None
    sign = labels.measure(metric).sign
    slope, error = _slope(np.log10(compute), points, sign, size_P)
    degrees = len(models) - 2
    half = scipy.stats.t.ppf(0.975, degrees) * error
    logs = _in_logs(points, sign)
    ends = [sign * (slope - half), sign * (slope + half)]
    change, low, high = (
        float(10**v - 1 if logs else v) for v in (sign * slope, min(ends), max(ends))
    )
    certain = 1.0 if slope < 0 else 0.0 if slope > 0 else 0.5
    probability = float(scipy.stats.t.cdf(-slope / error, degrees)) if error > 0 else certain
    return Trend(
        change, low, high, logs, probability, len(found), len(models),
        len({n.train_step for n in found}), points[0].sampler, points[0].steps,
        float(max(compute) / min(compute)),
        len({(r.identity.model, r.identity.train_step) for r in records}) - len(found),
    )


def _common(records, curves) -> tuple[str | None, int]:
    """The sampler, and the steps that the most networks were sampled with, see `networks`."""
    count: dict[tuple[str, int], int] = defaultdict(int)
    for found in curves:
        for (_, sampler), points in found.items():
            for p in points:
                count[sampler, p.steps] += 1
    if not count:
        return None, 0
    order = curves_lib.samplers(records)
    first = [s for s in order if any(s == name for name, _ in count)]
    sampler = (first or sorted({s for s, _ in count}))[0]
    steps = max((n, s == STEPS, s) for (name, s), n in count.items() if name == sampler)[2]
    return sampler, steps


def _in_logs(points: Sequence[Point], sign: int) -> bool:
    return sign > 0 and all(p.value > 0 and (p.replicates_R > 0).all() for p in points)


def _slope(
    logc_P: np.ndarray, points: Sequence[Point], sign: int, size_P: np.ndarray
) -> tuple[float, float]:
    """Slope of the loss per decade, in log10 or in its own unit, and its standard error, of points
    that are of runs numbered `size_P`."""
    loss_P = sign * np.array([p.value for p in points])
    sizes = {p.replicates_R.size for p in points}
    loss_PR = sign * np.stack([p.replicates_R for p in points]) if sizes != {0} and len(
        sizes) == 1 else loss_P[:, None]
    if _in_logs(points, sign):
        loss_P, loss_PR = np.log10(loss_P), np.log10(loss_PR)
    slope = float(np.polyfit(logc_P, loss_P, 1)[0])
    slope = slope if abs(slope) > _ROUNDING * np.abs(loss_P).max() else 0.0
    slopes_R = np.polyfit(logc_P, loss_PR, 1)[0]
    spread = float(slopes_R.std(ddof=1)) if slopes_R.size > 1 else 0.0
    return slope, float(np.hypot(_error(logc_P, loss_P, size_P), spread))


def _error(x_P: np.ndarray, y_P: np.ndarray, size_P: np.ndarray) -> float:
    """Standard error of a slope where the points of one run share an offset by chance.

    The slope is a mean of that between the runs' means and that within runs, weighted by how far x
    spreads in each; both have an error by what they leave over. Of one point a run it is least
    squares'.
    """
    count_G = np.bincount(size_P)

    def parts(v_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean_P = (np.bincount(size_P, v_P) / count_G)[size_P]
        return mean_P - v_P.mean(), v_P - mean_P

    freedom = (len(count_G) - 2, len(x_P) - len(count_G) - 1)
    variance, spread, left = 0.0, 0.0, 0.0
    for x, y, free in zip(parts(x_P), parts(y_P), freedom, strict=True):
        square = float(x @ x)
        if free > 0:  # Else that between runs, which is no smaller, stands for it.
            left = float(np.sum((y - x * (x @ y) / (square or 1.0)) ** 2)) / free
        variance += square * left
        spread += square
    return float(np.sqrt(variance)) / spread


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One fine-tuned network.

    Attributes:
      model: the size.
      pretraining: its loss before fine-tuning (a distance, say): smaller is better.
      length: of fine-tuning, in steps or compute.
      downstream: its loss after.
    """

    model: str
    pretraining: float
    length: float
    downstream: float


def fine_tuned(
    pretrained: Sequence[Record], records: Sequence[Record], metric: str, blocks: tuple[int, int]
) -> list[Tuned]:
    """What each member reached before and after fine-tuning of several lengths, as losses, each at
    the sampler and steps that `networks` compares.

    Args:
      pretrained: text-to-image records of one training length.
      records: of the fine-tuned members, at any steps of fine-tuning.
      metric: of both.
      blocks: seed blocks that choose and are reported.
    """
    records = [r for r in records if metric in r.metrics]
    if not pretrained or not records:
        return []
    sign = labels.measure(metric).sign
    own = repeated.first_runs(pretrained)
    before = {n.model: sign * n.point.value for n in networks(own, metric, *blocks)}
    after = networks(records, metric, *curves_lib.own_blocks(records, *blocks))
    return [
        Tuned(n.model, before[n.model], n.train_step, sign * n.point.value)
        for n in after if n.model in before
    ]


@dataclasses.dataclass(frozen=True)
class Shares:
    """What explains downstream quality.

    Attributes:
      pretraining: share of the variance that a line in pretraining quality explains.
      length: share that the length of fine-tuning explains, in whatever shape.
      low, high: 95% interval of the first less the second.
      probability: that the first is larger, or that better pretraining goes with better downstream:
        the smaller of the two.
      sizes, lengths: how many.
    """

    pretraining: float
    length: float
    low: float
    high: float
    probability: float
    sizes: int
    lengths: int


def downstream(rows: Sequence[Tuned]) -> Shares | None:
    """Shares of variance, averaged over both orders of entering (Lindeman, Merenda, Gold 1980).

    Interval and probability leave out one size after the other (jackknife, Student's t with sizes
    - 2 degrees): the runs of one size share its pretraining. In simulations where chance alone
    decides either call is made in 0 to 8% of cases; drawing so few sizes with replacement instead
    contradicts in a quarter to a half. None below 4 sizes or where not each has 2 lengths.
    """
    by_model: dict[str, list[Tuned]] = defaultdict(list)
    for row in rows:
        by_model[row.model].append(row)
    if len(by_model) < 4 or min(len({r.length for r in g}) for g in by_model.values()) < 2:
        return None
    order = sorted(by_model)
    number_N = np.array([order.index(r.model) for r in rows])
    # All sizes, and then without each.
    kept_RM = np.vstack([np.ones(len(order)), 1 - np.eye(len(order))])
    pre_R, length_R, slope_R = _shares(rows, kept_RM[:, number_N])
    more, rises = (_jackknife(v_R[0], v_R[1:]) for v_R in (pre_R - length_R, slope_R))
    low, high = np.clip(more.interval(0.95), -1, 1)
    return Shares(
        float(pre_R[0]), float(length_R[0]), float(low), float(high),
        float(min(more.sf(0), rises.sf(0))), len(order), len({r.length for r in rows}),
    )


def _jackknife(value: float, without_M: np.ndarray) -> Any:
    """Student's t about a value of M sizes by what it is without each of them: a `scipy`
    distribution."""
    error = np.sqrt((len(without_M) - 1) / len(without_M) * ((without_M - value) ** 2).sum())
    return scipy.stats.t(len(without_M) - 2, value, max(error, np.finfo(float).tiny))


def _shares(rows: Sequence[Tuned], weight_RN: np.ndarray) -> tuple[np.ndarray, ...]:
    """Both shares and the slope over pretraining, for R weightings of the rows."""
    y_N = np.array([r.downstream for r in rows])
    y_N = y_N - y_N.mean()
    pre_N1 = np.array([r.pretraining for r in rows])[:, None]
    pre_N1 = (pre_N1 - pre_N1.mean()) / (pre_N1.std() or 1.0)
    lengths = np.unique([r.length for r in rows])
    factor = (np.array([r.length for r in rows])[:, None] == lengths[1:]).astype(float)
    ones_N1 = np.ones((len(y_N), 1))

    def left(*columns) -> tuple[np.ndarray, np.ndarray]:
        """Weighted sum of squares that these do not explain, and their coefficients."""
        design = np.concatenate([ones_N1, *columns], axis=1)
        normal = np.einsum("rn,np,nq->rpq", weight_RN, design, design, optimize=True)
        beta = np.einsum("rpq,nq,rn,n->rp", np.linalg.pinv(normal, hermitian=True), design,
                         weight_RN, y_N, optimize=True)
        return (weight_RN * (y_N - beta @ design.T) ** 2).sum(axis=1), beta

    total_R = left()[0]
    total_R = np.where(total_R > 0, total_R, 1.0)
    (first, _), (second, _), (both, beta) = left(pre_N1), left(factor), left(pre_N1, factor)
    first, second, both = (1 - v / total_R for v in (first, second, both))
    return (first + both - second) / 2, (second + both - first) / 2, beta[:, 1]
