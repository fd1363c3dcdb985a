"""A table refuses rows that lose signal or noise, and packs for the jitted sampler."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.guidance import NONE, Correction
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


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e8])
def test_a_factor_of_the_nodes_makes_no_row_wrong_and_hides_none(factor):
    scaled = schedule.Schedule("scaled", factor * SD.alpha, factor * SD.sigma)
    for name in ("ddpm", "heun", "dpmpp_2m", "dpmpp_3m_sde", "unipc"):
        assert solvers.make(name, scaled, 20, "v", "trailing").calls >= 20
    table = solvers.make("ddim", scaled, 20, "v", "trailing")
    with pytest.raises(UserError, match="row 0 of 20 leaves signal"):
        dataclasses.replace(table, a=table.a * (1 + 1e-6))


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
    assert arrays.rows.dtype == np.float32 and arrays.correction == NONE
    assert arrays.n == 7 == TABLE.calls and arrays.n.dtype == np.int32
    assert arrays.rows.shape == (10, len(COLUMNS)) and not arrays.rows[7:].any()
    for i, column in enumerate(COLUMNS):
        wanted = getattr(TABLE, column).astype("f4")
        np.testing.assert_array_equal(arrays.rows[:7, i], wanted)
    assert TABLE.padded(7).rows.shape == (7, len(COLUMNS))
    # What no row says goes along, and is no array.
    sharp = solvers.make("ddim:threshold=0.995", SD, 7).padded(10)
    assert sharp.correction == Correction(threshold=0.995)
    assert len(jax.tree.leaves(sharp)) == 2
    assert jax.tree.structure(sharp) != jax.tree.structure(arrays)
    with pytest.raises(UserError, match="7 rows, more than max_rows=6"):
        TABLE.padded(6)


def test_one_number_serves_all_rows():
    assert TABLE.g.tolist() == [1] * 7 and TABLE.k3.tolist() == [0] * 7
    with pytest.raises(UserError, match="alpha has shape"):
        dataclasses.replace(TABLE, alpha=1.0)


def test_a_wrong_correction_is_found():
    unipc = solvers.make("unipc", SD, 7)
    for column, what in (("k0", "signal"), ("k2", "signal"), ("ky", "signal"), ("kx", "signal")):
        array = np.array(getattr(unipc, column))
        array[4] += 1e-6
        with pytest.raises(UserError, match=f"row 4 of 7 leaves {what}"):
            dataclasses.replace(unipc, **{column: array})
    ky, k0 = np.array(unipc.ky), np.array(unipc.k0)
    ky[4] += 1e-6
    k0[4] -= 1e-6 * unipc.alpha[3]  # the signal is right, the noise is not
    with pytest.raises(UserError, match="row 4 of 7 leaves noise"):
        dataclasses.replace(unipc, ky=ky, k0=k0)


def test_guidance_of_rows():
    noise = TABLE.sigma[:-1] / TABLE.alpha[:-1]
    table = TABLE.with_guidance_interval(noise[4], noise[2])
    assert table.g.tolist() == [0, 0, 1, 1, 1, 0, 0] and table.name != TABLE.name
    assert TABLE.with_guidance_interval() is TABLE
    both = table.with_guidance(np.arange(7) / 2)
    assert both.g.tolist() == [0, 0, 1, 1.5, 2, 0, 0]
    np.testing.assert_array_equal(both.a, TABLE.a)
    pure = solvers.make("ddim", schedule.get("sd_zero_snr"), 3, "v", "trailing")
    assert pure.with_guidance_interval(high=100.0).g.tolist() == [0, 1, 1]
    assert pure.with_guidance_interval(low=1.0).g.tolist() == [1, 1, 0]
    for low, high in ((2.0, 1.0), (-1.0, 1.0), (np.nan, 1.0)):
        with pytest.raises(UserError, match="the lower first"):
            TABLE.with_guidance_interval(low, high)
    with pytest.raises(UserError, match="one for each of the 7 rows"):
        TABLE.with_guidance(np.ones(6))
    with pytest.raises(UserError, match="g is nan in row 1"):
        TABLE.with_guidance([1, np.nan, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc:order=3"])
@pytest.mark.parametrize("of", ["sd", "edm"])
def test_the_gain_is_how_large_normal_samples_come_out(name, of):
    """As the sampler's own update has it; a single step of Euler's ends in the mean."""
    table = solvers.make(name, schedule.get(of), 6, "x0", "karras")
    state = sampler.State(table.s[0], *[0.0] * 4)
    for row, alpha, sigma in zip(table.rows(np.float64), table.alpha, table.sigma, strict=False):
        x0 = alpha * state.x / (alpha**2 + sigma**2)
        state = sampler.update(dict(zip(COLUMNS, row, strict=True)), state, x0, 0.0)
    right = np.hypot(table.alpha[-1], table.sigma[-1])
    assert table.gain == pytest.approx(abs(state.x) / right, rel=1e-12)
    short = solvers.make(name, schedule.get(of), 250, "v", "karras")
    assert short.gain == pytest.approx(1.0, abs=0.03)
    euler = solvers.make("euler", schedule.get(of), 1, "v", "trailing")
    assert euler.gain == pytest.approx(euler.alpha[0])
