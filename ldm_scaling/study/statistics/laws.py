"""Saturating power laws: L = E + sum_k A_k / x_k^alpha_k, of one scale (compute) or two (N, D)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.errors import UserError

_LARGEST_LOG = 700.0
"""Beyond it exp of a float is infinite, or 0."""
_STEPS = 50
"""Of Newton's method; about five are enough."""


@dataclasses.dataclass(frozen=True)
class Law:
    """A saturating power law.

    Attributes:
      offset: E, what no scale removes; 0 where the law has none.
      factors: A_k, one per scale.
      exponents: alpha_k, one per scale.
    """

    offset: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]

    def __post_init__(self):
        if not self.factors or len(self.factors) != len(self.exponents):
            raise UserError(
                f"a law has one exponent per factor, got {len(self.factors)} factors and "
                f"{len(self.exponents)} exponents"
            )
        if self.offset < 0 or min(self.factors) < 0:
            raise UserError(
                f"a law's offset and factors are not negative, got {self.offset} and {self.factors}"
            )

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """L at scales (N, K), or (N,) where the law has one."""
        return self._at(np.log(scales(x, len(self.factors))))

    def _at(self, logx_NK: np.ndarray) -> np.ndarray:
        """L at log scales (N, K): a factor and a scale may both be beyond what a float holds."""
        with np.errstate(divide="ignore", over="ignore"):
            terms_NK = np.exp(np.log(self.factors) - np.array(self.exponents) * logx_NK)
        return self.offset + terms_NK.sum(axis=1)

    def best_split(
        self, flops: np.ndarray, per: float = 6.0, besides: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) with the least L on flops = per x N x (D + besides): Hoffmann et al. 2022, eq. 4,
        and with `besides` the problem of Sardana et al. 2024 (arXiv 2401.00448, eq. 2).

        Args:
          flops: of training, and of what is `besides`.
          per: FLOPs for one parameter and one sample.
          besides: samples that take as much and teach nothing, such as those that a network draws.

        Raises:
          UserError: unless the law has two scales with positive factors and exponents.
        """
        with np.errstate(over="ignore"):
            n, d = np.exp(self._log_split(flops, per, besides))
        return n, d

    def least(self, flops: np.ndarray, per: float = 6.0, besides: float = 0.0) -> np.ndarray:
        """The least L, at `best_split`: with nothing `besides` itself a saturating power law, with
        the same offset and `least_exponent`. Arguments and errors are those of `best_split`."""
        return self._at(self._log_split(np.atleast_1d(flops), per, besides).T)

    def off_best(
        self, n: np.ndarray, flops: np.ndarray, per: float = 6.0, besides: float = 0.0
    ) -> np.ndarray:
        """What a size away from the best costs: how many times `flops` it takes for the L that
        `best_split` has on them; infinite where no D gives it that (eq. 2 of Hoffmann et al. 2022,
        solved for D).

        Args:
          n: sizes.
          flops, per, besides: those of `best_split`, which raises as this does.
        """
        log_n, log_d = self._log_split(flops, per, besides)
        (a, b), (alpha, beta) = np.log(self.factors), self.exponents
        left = np.exp(a - alpha * log_n) + np.exp(b - beta * log_d) - self.factors[0] / n**alpha
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            d = np.where(left > 0, np.exp((b - np.log(left)) / beta), np.inf)
        return per * n * (d + besides) / flops

    def has_best(self, flops: np.ndarray, per: float = 6.0, besides: float = 0.0) -> bool:
        """Whether `best_split` of all these budgets exists and is a finite number above 0: more of
        either scale must help, and visibly. That of a flat law, its exponents all but 0, is not."""
        if not self._splits:
            return False
        return bool((np.abs(self._log_split(flops, per, besides)) < _LARGEST_LOG).all())

    @property
    def _splits(self) -> bool:
        return len(self.factors) == 2 and min(*self.factors, *self.exponents) > 0

    def _log_split(self, flops: np.ndarray, per: float, besides: float) -> np.ndarray:
        """Log (N, D) of `best_split`, first axis."""
        if not self._splits:
            raise UserError(
                "the best split of a training budget needs a law of two scales, size and data, "
                f"both with positive factor and exponent; got {self}"
            )
        (a, b), (alpha, beta) = np.log(self.factors), self.exponents
        product = np.log(np.asarray(flops, np.float64) / per)
        with np.errstate(over="ignore", invalid="ignore"):
            n = (np.log(alpha) + a - np.log(beta) - b + beta * product) / (alpha + beta)
        d = product - n
        if besides:
            # Where more of N and of D are worth the same, in log D: all but straight, so that
            # Newton's steps meet it from anywhere.
            log_besides = np.log(besides)
            for _ in range(_STEPS):
                both = np.logaddexp(d, log_besides)
                off = (beta + 1) * d + (alpha - 1) * both - alpha * product + (
                    np.log(alpha) + a - np.log(beta) - b)
                d = d - off / (beta + 1 + (alpha - 1) * np.exp(d - both))
            n = product - np.logaddexp(d, log_besides)
        return np.stack([n, d])

    @property
    def least_exponent(self) -> float:
        """alpha beta / (alpha + beta) of a law of two scales: how fast `least` falls."""
        alpha, beta = self.exponents
        return alpha * beta / (alpha + beta)


def scales(x: np.ndarray, k: int | None = None) -> np.ndarray:
    """Scales as a positive matrix (N, K). Raises `UserError` where one is not."""
    x_NK = np.asarray(x, np.float64)
    x_NK = x_NK[:, None] if x_NK.ndim == 1 else x_NK
    if x_NK.ndim != 2 or (k is not None and x_NK.shape[1] != k):
        raise UserError(f"scales of shape {x_NK.shape} do not fit a law of {k} scales")
    if not (np.isfinite(x_NK).all() and (x_NK > 0).all()):
        raise UserError("scales such as parameters and FLOPs are finite and above 0")
    return x_NK


def log_prediction(
    parameters_SP: np.ndarray, logx_NK: np.ndarray, offset: bool
) -> tuple[np.ndarray, np.ndarray]:
    """log L and its derivatives for S sets of parameters at once.

    log L = logsumexp(a_k - alpha_k log x_k [, e]): nothing overflows, and nothing is negative.

    Args:
      parameters_SP: a_1..a_K, alpha_1..alpha_K and, with `offset`, e = log E.
      logx_NK: log scales.
      offset: whether the law has an E.

    Returns:
      log L (S, N), its Jacobian (S, N, P).
    """
    k = logx_NK.shape[1]
    a_SK, alpha_SK = parameters_SP[:, :k], parameters_SP[:, k : 2 * k]
    terms = a_SK[:, None] - alpha_SK[:, None] * logx_NK
    if offset:
        e_SN1 = np.broadcast_to(parameters_SP[:, 2 * k, None, None], (*terms.shape[:2], 1))
        terms = np.concatenate([terms, e_SN1], axis=2)
    # Written out: SciPy's logsumexp takes longer than all the rest on arrays as small as these.
    top_SN = terms.max(axis=2)
    share = np.exp(terms - top_SN[..., None])
    sum_SN = share.sum(axis=2)
    log_SN = top_SN + np.log(sum_SN)
    share /= sum_SN[..., None]
    parts = [share[..., :k], -share[..., :k] * logx_NK]
    return log_SN, np.concatenate([*parts, share[..., k:]], axis=2)
