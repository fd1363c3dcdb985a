"""Fits of saturating power laws: Hoffmann's approach 3, converged; intervals by bootstrap.

The loss is Huber's, of log residuals (Hoffmann et al. 2022, section 3.3), minimised from a grid of
starts by L-BFGS. It is *summed* over points and tolerances are tight: averaged, its gradients are
so small that the original optimiser stopped before convergence (Besiroglu et al. 2024,
arXiv 2404.10102). Scales are centred on a log axis first, which takes most of the correlation
between factors and exponents away.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import arrays
from ldm_scaling.study.statistics import laws
from ldm_scaling.study.statistics.laws import Law
from ldm_scaling.study.statistics.scatter import Scatter

DELTA = 1e-3
"""Where Huber's loss turns linear, in log L (Hoffmann et al.'s). Most residuals of a noisier
quantity, a Fréchet distance say, lie beyond: give its own noise then."""

_STARTS = {"alpha": (0.0, 0.5, 1.0, 1.5, 2.0), "a": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
           "e": (-1.0, -0.5, 0.0, 0.5, 1.0)}


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law.

    Attributes:
      law: the estimate.
      objective: the sum of Huber losses at it.
      residuals_N: log y - log L.
      delta: see `DELTA`.
      offset: whether E was fitted.
      replicates: laws of the bootstrap replicates; empty before `bootstrap`.
      scatter: how the points scatter by run, of a bootstrap by run; None where they were taken as
        independent.
      luck_R: standard deviation of a run's offset in each replicate, of a bootstrap by run.
      spread_R: what `noise` is multiplied by in each replicate, of a bootstrap of residuals.
    """

    law: Law
    objective: float
    residuals_N: np.ndarray
    delta: float
    offset: bool
    replicates: tuple[Law, ...] = ()
    scatter: Scatter | None = None
    luck_R: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    spread_R: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(1))

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """(low, high) of a parameter by name: "E", "A", "alpha", and "B", "beta" of the second
        scale. Percentiles of the replicates. Raises `UserError` without replicates, and, as the
        other intervals do, of a bootstrap by run whose `Scatter.freedom` is 0 or below."""
        low, high = self._ends(np.array([value(one, name) for one in self._replicates]), level)
        return float(low), float(high)

    def predict(self, x: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the law, not of new noisy points, at scales (N, K)."""
        return self._ends(np.stack([one(x) for one in self._replicates]), level)

    def predict_new(
        self, x: np.ndarray, level: float = 0.95, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) for new measurements at scales (N, K): the law's doubt and their noise; after
        a bootstrap by run, measurements of a new run with its own luck."""
        law_RN = np.stack([one(x) for one in self._replicates])
        rng = np.random.default_rng(seed)
        # Each law several times, so that few replicates do not make the noise's tails rough.
        law_RN = np.repeat(law_RN, 10, axis=0)
        if self.scatter is None:
            spread_R1 = np.repeat(self.spread_R, len(law_RN) // len(self.spread_R))[:, None]
            noise_RN = spread_R1 * rng.choice(self.noise, law_RN.shape)
        else:
            luck_R1 = np.repeat(self.luck_R, 10)[:, None]
            noise_RN = luck_R1 * rng.normal(size=law_RN.shape)
            noise_RN = noise_RN + rng.choice(self.scatter.within_N, law_RN.shape)
        return self._ends(law_RN * np.exp(noise_RN), level)

    @property
    def freedom(self) -> int:
        """Points, less the parameters; at 0 the law goes through any."""
        return len(self.residuals_N) - 2 * len(self.law.factors) - self.offset

    @property
    def noise(self) -> np.ndarray:
        """Log residuals, centred and scaled up by what the fit took away from them (N,)."""
        centred_N = self.residuals_N - self.residuals_N.mean()
        return centred_N * np.sqrt(len(centred_N) / max(self.freedom, 1))

    def scatter_by(self, runs: Sequence[object]) -> Scatter:
        """How the points scatter within and between runs, given the run of each point (N,).

        Factor and exponent of the size, and the level, are known by runs alone; a second scale's,
        the length of training, from inside them, unless each run has one point.
        """
        _, run_N = np.unique(np.asarray(runs), return_inverse=True)
        points_G = np.bincount(run_N)
        n, g, p = len(run_N), len(points_G), 2 * len(self.law.factors) + self.offset
        between = p if points_G.max() == 1 else min(p, 2 + self.offset)
        mean_G = np.bincount(run_N, self.residuals_N) / points_G
        freedom = g - between
        sd = float(np.sqrt((mean_G**2).sum() / freedom)) if freedom > 0 else 0.0
        within_N = self.residuals_N - mean_G[run_N]
        scale = np.sqrt(n / max(n - g - (p - between), 1))
        return Scatter(run_N, sd, freedom, within_N * scale)

    @property
    def _replicates(self) -> tuple[Law, ...]:
        if not self.replicates:
            raise UserError("an interval of a fit needs replicates: call fits.bootstrap on it")
        if self.scatter is not None and self.scatter.freedom < 1:
            runs = int(self.scatter.run_N.max()) + 1
            raise UserError(
                f"a law goes through any luck of {runs} runs, so its replicates tell no interval: "
                f"fit it to {runs + 1 - self.scatter.freedom} or more"
            )
        return self.replicates

    @staticmethod
    def _ends(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2), axis=0)
        return low, high


def value(law: Law, name: str) -> float:
    """A law's parameter by its letter: E, A, alpha, B, beta."""
    place = {"E": (law.offset,), "A": law.factors[:1], "alpha": law.exponents[:1],
             "B": law.factors[1:2], "beta": law.exponents[1:2]}.get(name, ())
    if not place:
        raise UserError(f"a law of {len(law.factors)} scales has no parameter {name!r}")
    return place[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """Points with log scales centred, and how many parameters they are fitted by."""

    logx_NK: np.ndarray
    centre_K: np.ndarray
    logy_N: np.ndarray
    offset: bool
    delta: float

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, offset: bool, delta: float) -> _Problem:
        x_NK, y_N = laws.scales(x), np.asarray(y, np.float64)
        need = 2 * x_NK.shape[1] + offset
        if y_N.shape != x_NK.shape[:1] or not (np.isfinite(y_N).all() and (y_N > 0).all()):
            raise UserError(
                f"{len(x_NK)} scales and values of shape {y_N.shape}: a law is fitted to one "
                "finite value above 0 per point"
            )
        logx_NK = np.log(x_NK)
        near_NK = np.unique(np.round(logx_NK, 9), axis=0)  # Equal up to rounding counts once.
        places, distinct = len(near_NK), [len(set(one)) for one in near_NK.T]
        told = _told(near_NK)
        if told < need or min(distinct) < 2 + offset:
            raise UserError(
                f"{len(y_N)} points at {places} places, of {distinct} distinct values of their "
                f"scales, tell {told} of a law's {need} parameters: it needs as many places, "
                "that share values of their scales, and 3 values of each scale with an offset, 2 "
                "without (of one of two scales 3): measure at more, or fit fewer parameters"
            )
        if not delta > 0:
            raise UserError(f"delta is a size of log residuals, above 0; got {delta}")
        centre_K = logx_NK.mean(axis=0)
        return cls(logx_NK - centre_K, centre_K, np.log(y_N), offset, delta)

    @property
    def scales(self) -> int:
        return self.logx_NK.shape[1]

    def starts(self) -> np.ndarray:
        """Hoffmann's grid, as parameters about the centred scales (S, P).

        In data of other units than theirs a factor A of the grid can lie far off, so each
        exponent also starts with terms that share the smallest loss seen."""
        grid = [*[_STARTS["a"]] * self.scales, *[_STARTS["alpha"]] * self.scales]
        grid += [_STARTS["e"]] if self.offset else []
        out = np.array(list(itertools.product(*grid)))
        k = self.scales
        out[:, :k] -= out[:, k : 2 * k] * self.centre_K
        low = self.logy_N.min()
        own = np.array(list(itertools.product(
            *[(low - 3, low - 1.5, low - 0.5)] * k, *[(0.1, 0.3, 0.6, 1.2)] * k,
            *([(low - 2, low - 0.7, low - 0.1)] if self.offset else []),
        )))
        return np.concatenate([out, own])

    def rough(self, parameters_SP: np.ndarray) -> np.ndarray:
        """The objective on some 40 of the points, to tell good starts from bad ones."""
        some, out = slice(None, None, max(1, len(self.logy_N) // 40)), []
        for chunk in np.array_split(parameters_SP, max(1, len(parameters_SP) // 512)):
            log_SN, _ = laws.log_prediction(chunk, self.logx_NK[some], self.offset)
            out.append(_huber(self.logy_N[some] - log_SN, self.delta).sum(axis=1))
        return np.concatenate(out)

    def value_and_gradient(self, parameters_P: np.ndarray) -> tuple[float, np.ndarray]:
        log_1N, jacobian = laws.log_prediction(parameters_P[None], self.logx_NK, self.offset)
        residual_N = self.logy_N - log_1N[0]
        slope_N = np.clip(residual_N, -self.delta, self.delta)
        return _huber(residual_N, self.delta).sum(), -(slope_N @ jacobian[0])

    def law(self, parameters_P: np.ndarray) -> Law:
        k = self.scales
        a_K, alpha_K = parameters_P[:k], parameters_P[k : 2 * k]
        with np.errstate(over="ignore"):
            factors_K = np.exp(np.clip(a_K + alpha_K * self.centre_K, -700, 700))
        offset = float(np.exp(parameters_P[2 * k])) if self.offset else 0.0
        return Law(offset, tuple(map(float, factors_K)), tuple(map(float, alpha_K)))

    def parameters(self, law: Law) -> np.ndarray:
        alpha_K = np.array(law.exponents)
        a_K = np.log(np.maximum(law.factors, 1e-300)) - alpha_K * self.centre_K
        e = [np.log(max(law.offset, 1e-12))] if self.offset else []
        return np.array([*a_K, *alpha_K, *e])


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _told(places_PK: np.ndarray) -> int:
    """How many numbers a sum of terms, one of each scale and of any value at each of its own, tells
    at these places of one scale or two: with two as many as values, but for one in each set of
    places that hang together, where a constant may move from one term to the other."""
    if places_PK.shape[1] == 1:
        return len(places_PK)
    first_P, second_P = (np.unique(one, return_inverse=True)[1] for one in places_PK.T)
    shape = (first_P.max() + 1, second_P.max() + 1)
    met = scipy.sparse.coo_array((np.ones(len(places_PK)), (first_P, second_P)), shape)
    graph = scipy.sparse.block_array([[None, met], [met.T, None]])
    apart, _ = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return sum(shape) - apart


@arrays.one_blas_thread()
def fit(
    x: np.ndarray, y: np.ndarray, *, offset: bool = True, delta: float = DELTA, tries: int = 24
) -> Fit:
    """Fits L = E + sum_k A_k / x_k^alpha_k to values above 0.

    Args:
      x: scales (N, K) such as parameters and images seen, or (N,) such as compute.
      y: values (N,): a validation loss, a distance.
      offset: whether to fit E; without, the law is a plain power law.
      delta: see `DELTA`.
      tries: starts, of the grid's best, that L-BFGS goes on from.

    Raises:
      UserError: on values that are not positive, fewer points than parameters, and fewer distinct
        values of the scales than tell the law: 3 of each with an offset; without one 2, and of one
        of two scales 3.
    """
    problem = _Problem.of(x, y, offset, delta)
    starts = problem.starts()
    starts = starts[np.argsort(problem.rough(starts), kind="stable")[:tries]]
    found = [
        scipy.optimize.minimize(
            problem.value_and_gradient, start, jac=True, method="L-BFGS-B",
            options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 30},
        )
        for start in starts
    ]
    # L-BFGS creeps along the valley between E and the exponents; Newton's steps end it.
    best = np.stack([f.x for f in sorted(found, key=lambda f: f.fun)[:4]])
    polished, objective = _newton(
        problem, best, np.ones((len(best), len(problem.logy_N))), tolerance=1e-12
    )
    winner = polished[np.argmin(objective)]
    log_1N, _ = laws.log_prediction(winner[None], problem.logx_NK, offset)
    return Fit(problem.law(winner), float(objective.min()), problem.logy_N - log_1N[0], delta,
               offset)


def _newton(
    problem: _Problem, start_SP: np.ndarray, weight_SN: np.ndarray,
    logy_SN: np.ndarray | None = None, *, tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """S weighted fits at once, by Levenberg and Marquardt's steps on reweighted least squares.

    Huber's loss is that of least squares with weights min(1, delta / |residual|); every step is
    kept only where it lowers the loss itself. A fit ends when ten steps have each lowered it by
    less than `tolerance` of itself.
    """
    x_SP, loss_S = np.array(start_SP), np.empty(len(start_SP))
    logy_SN = np.broadcast_to(problem.logy_N if logy_SN is None else logy_SN, weight_SN.shape)
    live = np.arange(len(x_SP))
    x, weight, logy = x_SP, weight_SN, logy_SN

    def look(x, weight, logy):
        log, jacobian = laws.log_prediction(x, problem.logx_NK, problem.offset)
        residual = logy - log
        return residual, jacobian, (weight * _huber(residual, problem.delta)).sum(axis=1)

    residual, jacobian, loss = look(x, weight, logy)
    damping, calm = np.full(len(x), 1e-3), np.zeros(len(x), int)
    unit = np.eye(x.shape[1])
    for _ in range(200):
        size = np.maximum(np.abs(residual), 1e-300)
        weighted = jacobian * (weight * np.minimum(1.0, problem.delta / size))[..., None]
        transposed = weighted.swapaxes(1, 2)
        hessian = transposed @ jacobian
        gradient = transposed @ residual[..., None]
        diagonal = np.einsum("spp->sp", hessian)
        diagonal = diagonal + 1e-12 * diagonal.sum(axis=1, keepdims=True) + 1e-300
        damped = hessian + unit * (damping[:, None] * diagonal)[:, None]
        step = np.clip(np.linalg.solve(damped, gradient)[..., 0], -2.0, 2.0)
        new = look(x + step, weight, logy)
        better = new[2] <= loss
        gain = np.where(better, loss - new[2], 0.0)
        calm = np.where(gain <= tolerance * loss, calm + 1, 0)
        x = np.where(better[:, None], x + step, x)
        residual = np.where(better[:, None], new[0], residual)
        jacobian = np.where(better[:, None, None], new[1], jacobian)
        loss = np.where(better, new[2], loss)
        damping = np.clip(np.where(better, damping / 5, damping * 8), 1e-12, 1e12)
        x_SP[live], loss_S[live] = x, loss
        going = calm < 10
        if not going.any():
            break
        if not going.all():
            live, x, weight, logy = live[going], x[going], weight[going], logy[going]
            residual, jacobian, loss = residual[going], jacobian[going], loss[going]
            damping, calm = damping[going], calm[going]
    return x_SP, loss_S


@arrays.one_blas_thread()
def bootstrap(
    fitted: Fit, x: np.ndarray, y: np.ndarray, *, replicates: int = 200, seed: int = 0,
    method: Literal["pairs", "residuals"] = "pairs", y_RN: np.ndarray | None = None,
    runs: Sequence[object] | None = None,
) -> Fit:
    """The fit with the laws of bootstrap replicates, all fitted at once from its own estimate.

    Args:
      fitted: from `fit` on the same points.
      x, y: the points.
      replicates: how many.
      seed: of the drawing.
      method: "pairs" draws points with replacement: for many points at scales that might have been
        others. "residuals" keeps the scales and draws log residuals anew: for few points at scales
        that were chosen, where a draw without the largest size says nothing. What few residuals
        say of their own spread is little too, so each replicate has its own (times freedom / chi^2,
        as in `Scatter.draw`).
      y_RN: replicates of the values themselves, of paired records say: these are fitted instead.
      runs: the training run of each point (N,), of which several may be of one: residuals are
        then drawn by run, see `Scatter`, whatever the method.

    Raises:
      UserError: as `fit`, and for residuals of no more points than the law has parameters.
    """
    problem = _Problem.of(x, y, fitted.offset, fitted.delta)
    n, rng = len(problem.logy_N), np.random.default_rng(seed)
    weight_RN, logy_RN = np.ones((replicates, n)), None
    scatter, luck_R, spread_R = None, np.zeros(0), np.ones(1)
    if y_RN is not None:
        y_RN = np.asarray(y_RN, np.float64)
        if y_RN.ndim != 2 or y_RN.shape[1] != n or not (y_RN > 0).all():
            raise UserError(
                f"replicates of shape {y_RN.shape} do not fit {n} points, or are not above 0"
            )
        logy_RN, weight_RN = np.log(y_RN), np.ones(y_RN.shape)
    elif runs is not None:
        scatter = fitted.scatter_by(runs)
        noise_RN, luck_R = scatter.draw(replicates, rng)
        logy_RN = problem.logy_N - fitted.residuals_N + noise_RN
    elif method == "pairs":
        weight_RN = rng.multinomial(n, np.full(n, 1 / n), replicates).astype(float)
    elif method == "residuals":
        if (freedom := fitted.freedom) < 1:
            raise UserError(
                f"a law of {n - freedom} parameters goes through any {n} points, so its residuals "
                f"tell no interval: fit it to {n - freedom + 1} or more"
            )
        fit_N = problem.logy_N - fitted.residuals_N
        noise_RN = rng.choice(fitted.noise, (replicates, n))
        spread_R = np.sqrt(freedom / rng.chisquare(freedom, replicates))
        logy_RN = fit_N + spread_R[:, None] * noise_RN
    else:
        raise UserError(f"a fit's bootstrap is of 'pairs' or 'residuals', not {method!r}")
    start_RP = np.tile(problem.parameters(fitted.law), (len(weight_RN), 1))
    found_RP, _ = _newton(problem, start_RP, weight_RN, logy_RN, tolerance=1e-6)
    return dataclasses.replace(fitted, replicates=tuple(problem.law(p) for p in found_RP),
                               scatter=scatter, luck_R=luck_R, spread_R=spread_R)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How well a law of the smaller sizes foretells the largest.

    Attributes:
      fit: on all but the held-out points.
      measured, predicted: their values, in order.
      low, high: 95% intervals for new measurements there.
      error: root mean square of predicted / measured - 1.
      covered: share of the measured values inside their intervals.
    """

    fit: Fit
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    error: float
    covered: float


def without(
    x: np.ndarray, y: np.ndarray, last_N: np.ndarray, *, offset: bool = True,
    delta: float = DELTA, replicates: int = 200, seed: int = 0,
    method: Literal["pairs", "residuals"] = "residuals", runs: Sequence[object] | None = None,
) -> HeldOut:
    """Fits without the points that are marked in last_N, and predicts these.

    Args:
      x, y: the points, as for `fit`.
      last_N: which of them are held out.
      offset, delta, replicates, seed, method, runs: see `fit` and `bootstrap`.

    Raises:
      UserError: when what is left cannot be fitted, or by residuals leaves none, see `bootstrap`.
    """
    x_NK, y_N = laws.scales(x), np.asarray(y, np.float64)
    rest = (x_NK[~last_N], y_N[~last_N])
    fitted = bootstrap(fit(*rest, offset=offset, delta=delta), *rest, replicates=replicates,
                       seed=seed, method=method,
                       runs=None if runs is None else np.asarray(runs)[~last_N])
    predicted = fitted.law(x_NK[last_N])
    low, high = fitted.predict_new(x_NK[last_N], seed=seed)
    measured = y_N[last_N]
    return HeldOut(
        fitted, tuple(measured.tolist()), tuple(predicted.tolist()), tuple(low.tolist()),
        tuple(high.tolist()), float(np.sqrt(np.mean((predicted / measured - 1) ** 2))),
        float(np.mean((low <= measured) & (measured <= high))),
    )
