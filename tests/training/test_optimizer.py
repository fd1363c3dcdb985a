"""The learning rate and the average's decay over a run."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import FineTune, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.training import optimizer


def rates(**settings):
    run = Train(steps=100, learning_rate=2.0, **settings)
    return np.array([float(optimizer.learning_rate(run)(n)) for n in range(run.steps + 1)])


def test_the_rate_rises_and_stays_or_falls_to_nothing_at_the_end():
    stays, falls = rates(warmup_steps=20), rates(warmup_steps=20, learning_rate_decay="linear")
    np.testing.assert_allclose(stays[:21], falls[:21], rtol=1e-6)
    np.testing.assert_allclose(stays[:21], np.linspace(0, 2, 21), rtol=1e-6)
    assert (stays[20:] == 2.0).all()
    # No step is taken at 100: the last one, number 99, still learns.
    np.testing.assert_allclose(falls[20:], np.linspace(2, 0, 81), rtol=1e-5, atol=1e-6)
    at_once = rates(warmup_steps=0, learning_rate_decay="linear")
    np.testing.assert_allclose(at_once, np.linspace(2, 0, 101), rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_never_reached_is_refused():
    for decay in ("none", "linear"):
        with pytest.raises(UserError, match="warmup_steps=10: below steps=10, or training ends"):
            Train(steps=10, warmup_steps=10, learning_rate_decay=decay)
    shortest = Train(steps=11, warmup_steps=10, learning_rate=2.0)
    assert float(optimizer.learning_rate(shortest)(shortest.steps - 1)) == 2.0  # its last step's
    with pytest.raises(UserError, match="choose none or linear"):
        Train(learning_rate_decay="cosine")


def test_a_run_that_starts_from_trained_parameters_needs_no_short_average():
    run = Train(ema_decay=0.9)
    assert float(optimizer.ema_decay(run, jnp.int32(0))) == pytest.approx(0.1)
    assert float(optimizer.ema_decay(run, jnp.int32(1000))) == pytest.approx(0.9)
    assert optimizer.ema_decay(Train(ema_decay=0.9, ema_ramp=False), jnp.int32(0)) == 0.9


def test_what_came_later_changes_no_hash_at_its_neutral_value():
    """A workdir and a fine-tuned run are what they were before there was a falling rate."""
    names = {"learning_rate_decay", "ema_ramp"}
    assert not names & set(Study().identity()["train"])
    falls = {"train": Train(steps=200_000, learning_rate_decay="linear")}
    assert names & set(Study(**falls).identity()["train"]) == {"learning_rate_decay"}
    # A fine-tuning may be made longer, unless its rate falls to its end.
    long, longer = (Train(steps=n, caption_dropout=0.0) for n in (20_000, 30_000))
    tunes = [FineTune(task="deblurring", train=run).hash for run in (long, longer)]
    assert tunes[0] == tunes[1]
    fall = [FineTune(task="deblurring", train=Train(steps=n, learning_rate_decay="linear")).hash
            for n in (20_000, 30_000)]
    assert len({*tunes, *fall}) == 3
