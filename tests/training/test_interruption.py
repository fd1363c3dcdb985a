"""SIGTERM, and what several processes agree on; with real processes in tests/distributed."""

import signal

import jax
import numpy as np
import pytest

from ldm_scaling.errors import Interrupted
from ldm_scaling.training import consensus, interruption


def test_one_process_hears_sigterm_inside_only():
    before = signal.getsignal(signal.SIGTERM)
    with interruption.Interruption() as own:
        assert signal.getsignal(signal.SIGTERM) is before  # There is no step to save.
        assert not own.due()
        signal.raise_signal(signal.SIGTERM)
        assert own.due() and own.due()
    assert signal.getsignal(signal.SIGTERM) is before
    with interruption.Interruption() as own:
        assert not own.due()


def test_several_ask_the_service_with_counts_that_grow_over_runs(monkeypatch):
    """Steps begin again with every run, and the service compares numbers of calls."""
    asked, told_at = [], 5
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def reached(count):
        asked.append(count)
        return len(asked) == told_at

    monkeypatch.setattr(
        interruption.multihost_utils, "reached_preemption_sync_point", reached
    )
    before = signal.getsignal(signal.SIGTERM)
    said, answers = [], []
    monkeypatch.setattr(interruption.processes, "saves", said.append)
    for _ in range(2):
        with interruption.Interruption() as own:
            assert signal.getsignal(signal.SIGTERM) is before  # The service has its own.
            answers += [own.due() for _ in range(3)]
            assert set(said) == {True}
        assert said.pop() is False
        said.clear()
    assert answers == [False, False, False, False, True, False]
    assert np.all(np.diff(asked) == 1)


def test_a_run_that_fails_or_has_saved_ends_by_itself(monkeypatch):
    """And is not ended meanwhile with another status, or before it has closed what it holds."""
    said = []
    monkeypatch.setattr(interruption.processes, "saves", said.append)
    with pytest.raises(Interrupted):
        with interruption.Interruption():
            raise Interrupted("toy stopped by SIGTERM after step 3")
    assert said == []


@pytest.mark.parametrize("others", [[], [[0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
def test_one_process_says_it_for_all(monkeypatch, others):
    def gather(own):
        assert own.dtype == np.uint8  # Devices would cut float64 to float32.
        return np.stack([own, *(np.asarray(o).view(np.uint8) for o in others)])

    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))
    monkeypatch.setattr(consensus.multihost_utils, "process_allgather", gather)
    exact = 2.0**31 + 1
    values = consensus.everyone(exact, 0.0)
    assert values.shape == (1 + len(others), 2) and values[0, 0] == exact
    want = tuple(any(o[k] for o in others) for k in range(2))
    assert consensus.anyone(False, False) == want
    assert consensus.anyone(True, False) == (True, want[1])
