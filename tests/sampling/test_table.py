"""A table refuses rows that lose signal or noise, and packs for the jitted sampler."""

import dataclasses

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.table import COLUMNS

SD = schedule.get("sd")
TABLE = solvers.make("ddim", SD, 7, eta=0.5)


def changed(column, row, value, **fields):
    array = np.array(getattr(TABLE, column))
    array[row] = value
    return dataclasses.replace(TABLE, **{column: array}, **fields)


def test_wrong_rows_are_found():
    with pytest.raises(UserError, match="row 3 of 7 leaves signal"):
        changed("b0", 3, TABLE.b0[3] + 1e-6)
    with pytest.raises(UserError, match="row 2 of 7 leaves noise"):
        changed("c", 2, TABLE.c[2] * 1.001)
    with pytest.raises(UserError, match="b1 is nan in row 6 of 7"):
        changed("b1", 6, np.nan)
    with pytest.raises(UserError, match="p has shape"):
        dataclasses.replace(TABLE, p=TABLE.p[1:])


def test_exceptions_must_be_claimed():
    assert changed("c", 2, 0.5, keeps_noise=np.arange(7) != 2).c[2] == 0.5
    with pytest.raises(UserError, match="row 2"):
        changed("c", 2, 0.5, keeps_noise=np.arange(7) != 3)
    assert changed("b0", 3, 0.5, keeps_signal=False).b0[3] == 0.5


def test_is_frozen():
    with pytest.raises(ValueError):
        TABLE.a[0] = 1
    with pytest.raises(AttributeError):
        TABLE.a = np.zeros(7)


def test_padded():
    arrays = TABLE.padded(10)
    assert arrays["n"] == 7 == TABLE.calls and arrays["n"].dtype == np.int32
    for column in COLUMNS:
        assert arrays[column].shape == (10,) and arrays[column].dtype == np.float32
        np.testing.assert_array_equal(arrays[column][:7], getattr(TABLE, column).astype("f4"))
    assert TABLE.padded(7)["t"].shape == (7,)
    with pytest.raises(UserError, match="7 rows, more than max_rows=6"):
        TABLE.padded(6)
