"""A sampler as a table of linear coefficients, one row per call of the network."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.guidance import NONE, Correction

# The jitted sampler is traced for tables padded to this many rows.
MAX_ROWS = 1000
COLUMNS = (
    "t", "p", "q", "g", "kx", "ky", "k0", "k1", "k2", "k3", "a", "b0", "b1", "b2", "c",
    "s",
)  # fmt: skip
_TOLERANCE = 1e-9


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("rows", "n"),
    meta_fields=("correction", "sparing"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """A table as the jitted sampler takes it.

    Attributes:
        rows: (max_rows, len(COLUMNS)) float32, zeros behind the table's own.
        n: int32, how many those are.
        correction: the table's, which is compiled in: another one is another program.
        sparing: whether some rows take no guidance; compiled in too, as they then evaluate the
            network once.
    """

    rows: Any
    n: Any
    correction: Correction = NONE
    sparing: bool = False


@jax.tree_util.register_static  # So that the jitted sampler can refuse one that is not padded.
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SamplerTable:
    """A sampler: row r calls the network once and goes from node r to node r + 1.

        F  = F_u + (1 + g (w - 1)) (F_c - F_u)         guided at rate w, if at all
        m0 = p x + q F                                 the network's x0
        y  = kx x + ky y1 + k0 m0 + k1 m1 + k2 m2 + k3 m3
        x' = a y + b0 m0 + b1 m1 + b2 m2 + c z         z standard normal

    A sample starts from x = s z, with s = sqrt(alpha^2 + sigma^2) of the first node: what an x0 of
    unit variance would have there, and 1 wherever variance is preserved.

    m1, m2, m3 are the x0 of the rows before and y1 is the y before. Only a predictor-corrector
    (UniPC) corrects where it stands; everywhere else y = x, which is what the defaults say.

    When the network's x0 is right, x = alpha x0 + sigma eps must become alpha' x0 + sigma' eps':

        signal  a alpha + b0 + b1 + b2 = alpha'        kx alpha + ky alpha1 + sum of k = alpha
        noise   (a sigma)^2 + c^2 = sigma'^2           kx sigma + ky sigma1 = sigma

    All four are checked here, to rounding of the row's nodes, for every row that does not claim an
    exception. A node without noise (sigma' = 0) is reached by x' = m0, in LCM and CoDi by their
    consistency function, c_skip x + c_out m0.

    Columns may be given as one number for all rows.

    Attributes:
        name: solver, options, spacing and steps: what records call it.
        t: (R,) what the network is told.
        p, q: (R,) from x and F to x0.
        a, b0, b1, b2, c: (R,) the step.
        kx, ky, k0, k1, k2, k3: (R,) the correction before it.
        g: (R,) the share of guidance that the row takes: 0 is none, 1 the rate that is asked for.
        alpha, sigma: (R+1,) the nodes that the rows go between.
        s: (R,) the scale of the first x, in every row.
        keeps_signal, keeps_noise: (R,) bool or one for all; False where a row breaks the
            invariant on purpose, as DDPM's larger variance does.
        correction: what the sampler does that no row can say; a program of its own.

    All arrays are float64.

    Raises:
        UserError: if an invariant does not hold or a number is not finite.
    """

    name: str
    t: np.ndarray
    p: np.ndarray
    q: np.ndarray
    a: np.ndarray
    b0: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    b1: np.ndarray | float = 0.0
    b2: np.ndarray | float = 0.0
    c: np.ndarray | float = 0.0
    kx: np.ndarray | float = 1.0
    ky: np.ndarray | float = 0.0
    k0: np.ndarray | float = 0.0
    k1: np.ndarray | float = 0.0
    k2: np.ndarray | float = 0.0
    k3: np.ndarray | float = 0.0
    g: np.ndarray | float = 1.0
    s: np.ndarray = dataclasses.field(init=False)
    keeps_signal: np.ndarray | bool = True
    keeps_noise: np.ndarray | bool = True
    correction: Correction = NONE

    def __post_init__(self):
        rows = len(np.atleast_1d(self.t))
        scale = np.hypot(np.atleast_1d(self.alpha)[0], np.atleast_1d(self.sigma)[0])
        object.__setattr__(self, "s", scale)
        shapes = dict.fromkeys(COLUMNS, (rows,)) | dict.fromkeys(("alpha", "sigma"), (rows + 1,))
        for field, shape in shapes.items():
            array = np.array(getattr(self, field), dtype=np.float64)
            if array.ndim == 0 and field in COLUMNS:
                array = np.full(shape, array)
            if array.shape != shape:
                raise UserError(
                    f"table {self.name!r}: {field} has shape {array.shape}, not {shape}"
                )
            bad = np.flatnonzero(~np.isfinite(array))
            if bad.size:
                raise UserError(
                    f"table {self.name!r}: {field} is {array[bad[0]]} in row {bad[0]} of {rows}: "
                    "every coefficient must be finite"
                )
            array.setflags(write=False)
            object.__setattr__(self, field, array)
        for field in ("keeps_signal", "keeps_noise"):
            array = np.broadcast_to(np.asarray(getattr(self, field), bool), (rows,))
            object.__setattr__(self, field, array)
        here, before = self.alpha[:-1], np.append(0.0, self.alpha[:-2])
        corrected = self.k0 + self.k1 + self.k2 + self.k3 + self.kx * here + self.ky * before
        self._check("signal", corrected, here, self.keeps_signal)
        signal = self.a * here + self.b0 + self.b1 + self.b2
        self._check("signal", signal, self.alpha[1:], self.keeps_signal)
        here, before = self.sigma[:-1], np.append(0.0, self.sigma[:-2])
        self._check("noise", self.kx * here + self.ky * before, here, self.keeps_noise)
        noise = np.hypot(self.a * here, self.c)
        self._check("noise", noise, self.sigma[1:], self.keeps_noise)

    def _check(self, what: str, got_R: np.ndarray, wanted_R: np.ndarray, claimed_R: np.ndarray):
        scale = np.hypot(self.alpha, self.sigma)  # A factor that all nodes share changes nothing.
        tolerance_R = _TOLERANCE * np.maximum(scale[:-1], scale[1:])
        broken = np.flatnonzero(claimed_R & (np.abs(got_R - wanted_R) > tolerance_R))
        if broken.size:
            r = broken[0]
            raise UserError(
                f"table {self.name!r}: row {r} of {len(got_R)} leaves {what} {got_R[r]!s} where "
                f"its node has {wanted_R[r]!s}: mend the row, or mark it keeps_{what}=False if "
                "that is meant"
            )

    @property
    def calls(self) -> int:
        """R, the number of network calls per sample (guidance, two at once, counts as one)."""
        return len(self.t)

    @property
    def guided_calls(self) -> int:
        """How many of the calls are two at once where samples are guided."""
        return int(np.count_nonzero(self.g))

    @property
    def partly(self) -> bool:
        """Whether some rows take guidance and others none."""
        return 0 < self.guided_calls < self.calls

    @property
    def gain(self) -> float:
        """How large samples of standard normal data come out, fresh noise aside, over how large
        they should be: the network's x0 is alpha x / (alpha^2 + sigma^2) then. 1 where the steps
        are short; below where they are long, as x0 of much noise is the mean alone."""
        names = ("kx", "ky", "k0", "k1", "k2", "k3", "a", "b0", "b1", "b2")
        mean_R = self.alpha[:-1] / (self.alpha[:-1] ** 2 + self.sigma[:-1] ** 2)
        rows = np.stack([mean_R, *(getattr(self, name) for name in names)], axis=1).tolist()
        x, y, m1, m2, m3 = float(self.s[0]), 0.0, 0.0, 0.0, 0.0
        for mean, kx, ky, k0, k1, k2, k3, a, b0, b1, b2 in rows:
            m0 = mean * x
            y = kx * x + ky * y + k0 * m0 + k1 * m1 + k2 * m2 + k3 * m3
            x = a * y + b0 * m0 + b1 * m1 + b2 * m2
            m1, m2, m3 = m0, m1, m2
        return abs(x) / float(np.hypot(self.alpha[-1], self.sigma[-1]))

    def with_guidance(self, weights_R: np.ndarray, suffix: str = "weighted") -> SamplerTable:
        """The table whose rows take these shares of the guidance, times those they took before.

        Args:
            weights_R: one a row: 0 is no guidance, 1 the rate that is asked for. A row's rate is
                1 + weight (rate - 1).
            suffix: for the table's name.

        Raises:
            UserError: for another number of them, or one that is not finite.
        """
        weights_R = np.asarray(weights_R, np.float64)
        if weights_R.shape != self.g.shape:
            raise UserError(
                f"table {self.name!r}: guidance weights of shape {weights_R.shape}: give one for "
                f"each of the {self.calls} rows"
            )
        g = self.g * weights_R
        return dataclasses.replace(self, name=f"{self.name}-{suffix}", g=g)

    def with_guidance_interval(self, low: float = 0.0, high: float = np.inf) -> SamplerTable:
        """The table with guidance only where low <= sigma / alpha <= high.

        Source: Kynkäänniemi et al. 2024 (Applying Guidance in a Limited Interval).

        Raises:
            UserError: unless 0 <= low <= high.
        """
        if not 0 <= low <= high:
            raise UserError(
                f"guidance_low={low}, guidance_high={high}: give two noise levels sigma / alpha, "
                "the lower first"
            )
        with np.errstate(divide="ignore"):
            noise_R = self.sigma[:-1] / self.alpha[:-1]
        inside_R = (low <= noise_R) & (noise_R <= high)
        return self if inside_R.all() else self.with_guidance(inside_R, f"guided{low:g}-{high:g}")

    def rows(self, dtype: Any = np.float32) -> np.ndarray:
        """The rows as a sampler takes them: (R, len(COLUMNS)), cast once, here."""
        return np.stack([getattr(self, column) for column in COLUMNS], axis=1).astype(dtype)

    def padded(self, max_rows: int = MAX_ROWS) -> Padded:
        """What the jitted sampler takes: the rows, padded with zeros, their count and the
        correction.

        Tables padded to one length share one compiled program, but for their corrections, and
        those with guidance in some rows only another.

        Raises:
            UserError: if the table has more rows than that.
        """
        if self.calls > max_rows:
            raise UserError(
                f"table {self.name!r} has {self.calls} rows, more than max_rows={max_rows}: "
                "raise max_rows or take fewer steps"
            )
        rows = np.pad(self.rows(), ((0, max_rows - self.calls), (0, 0)))
        sparing = self.guided_calls < self.calls
        return Padded(rows, np.array(self.calls, np.int32), self.correction, sparing)
