"""Rows lie apart on the devices, weights on each; a compiler without our option does without."""

from unittest import mock

import jax
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import spread


def test_rows_lie_apart_and_weights_everywhere():
    both = spread.over(jax.devices()[:2], None, cpu=3, accelerator=100)
    x = np.arange(12.0).reshape(6, 2)
    rows, weights = both.rows({"x": x})["x"], both.everywhere([x])[0]
    assert both.batch == 6 and rows.sharding.device_set == set(jax.devices()[:2])
    np.testing.assert_array_equal(rows, x)
    assert [s.data.shape for s in rows.addressable_shards] == [(3, 2)] * 2
    assert [s.data.shape for s in weights.addressable_shards] == [(6, 2)] * 2
    out = both.jit(lambda w, x, scale: x @ w.T * scale, static_argnums=2)(weights, rows, 2)
    np.testing.assert_array_equal(out, x @ x.T * 2)
    assert spread.over(None, None, cpu=1, accelerator=1).mesh.size == len(jax.local_devices())


def test_room_is_for_all_rows_in_few_sizes():
    both = spread.over(jax.devices()[:2], 24, cpu=1, accelerator=1)
    rooms = [both.room_for(n) for n in range(25)]
    assert all(room >= n for n, room in enumerate(rooms)) and both.room_for(1000) == 24
    assert set(rooms) == {2, 4, 8, 16, 24}


@pytest.mark.parametrize("batch", [0, -2, 3])
def test_refuses_a_batch_that_does_not_divide(batch):
    with pytest.raises(UserError, match=f"batch of {batch} does not divide over 2 devices"):
        spread.over(jax.devices()[:2], batch, cpu=1, accelerator=1)


def test_a_compiler_without_the_option_does_without():
    ask = spread.compiler_options.__wrapped__
    assert ask("tpu") is None
    plus = jax.jit(lambda x: x + 1).lower(1.0)
    assert plus.compile(ask("cpu"))(1.0) == 2  # What it offers, this compiler takes.
    compiles = mock.patch.object(jax.stages.Lowered, "compile")
    with compiles as compile:
        compile.side_effect = jax.errors.JaxRuntimeError("No such compile option: 'x'")
        assert ask("cpu") is None
        compile.side_effect = jax.errors.JaxRuntimeError("out of memory")
        with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
            ask("cpu")
