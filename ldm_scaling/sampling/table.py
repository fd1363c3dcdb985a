"""A sampler as a table of linear coefficients, one row per call of the network."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.errors import UserError

# The jitted sampler is traced for tables padded to this many rows.
MAX_ROWS = 1000
COLUMNS = ("t", "p", "q", "a", "b0", "b1", "b2", "c")
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler: row r calls the network once and goes from node r to node r + 1.

        m0 = p x + q F                             the network's x0, from its output F
        x' = a x + b0 m0 + b1 m1 + b2 m2 + c z     m1, m2 the two x0 before; z standard normal

    When the network's x0 is right, x = alpha x0 + sigma eps must become alpha' x0 + sigma' eps':

        signal  a alpha + b0 + b1 + b2 = alpha'
        noise   (a sigma)^2 + c^2 = sigma'^2

    Both are checked here, for every row that does not claim an exception. A node without noise
    (sigma' = 0) is reached by x' = m0.

    Attributes:
        name: solver, options, spacing and steps: what records call it.
        t: (R,) what the network is told.
        p, q: (R,) from x and F to x0.
        a, b0, b1, b2, c: (R,) the row.
        alpha, sigma: (R+1,) the nodes that the rows go between.
        keeps_signal, keeps_noise: (R,) bool or one for all; False where a row breaks the
            invariant on purpose, as DDPM's larger variance does.

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
    b1: np.ndarray
    b2: np.ndarray
    c: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    keeps_signal: np.ndarray | bool = True
    keeps_noise: np.ndarray | bool = True

    def __post_init__(self):
        rows = len(np.atleast_1d(self.t))
        shapes = dict.fromkeys(COLUMNS, (rows,)) | dict.fromkeys(("alpha", "sigma"), (rows + 1,))
        for field, shape in shapes.items():
            array = np.array(getattr(self, field), dtype=np.float64)
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
        signal = self.a * self.alpha[:-1] + self.b0 + self.b1 + self.b2
        noise = np.hypot(self.a * self.sigma[:-1], self.c)
        self._check("signal", signal, self.alpha[1:], self.keeps_signal)
        self._check("noise", noise, self.sigma[1:], self.keeps_noise)

    def _check(self, what: str, got_R: np.ndarray, wanted_R: np.ndarray, claimed_R: np.ndarray):
        broken = np.flatnonzero(claimed_R & (np.abs(got_R - wanted_R) > _TOLERANCE))
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

    def padded(self, max_rows: int = MAX_ROWS) -> dict[str, np.ndarray]:
        """What the jitted sampler takes: the float32 columns, padded with zeros, and the count.

        Tables padded to one length share one compiled program.

        Returns:
            `COLUMNS`, each (max_rows,) float32, and "n", int32.

        Raises:
            UserError: if the table has more rows than that.
        """
        if self.calls > max_rows:
            raise UserError(
                f"table {self.name!r} has {self.calls} rows, more than max_rows={max_rows}: "
                "raise max_rows or take fewer steps"
            )
        pad = (0, max_rows - self.calls)
        arrays = {column: np.pad(getattr(self, column), pad).astype(np.float32)
                  for column in COLUMNS}
        return arrays | {"n": np.array(self.calls, np.int32)}
