"""Readers of many files: as many as fit stay open, and a second pass finds most of them."""

import resource

import pytest

from ldm_scaling.data import open_files


def test_passes_in_order_find_what_stayed_open(monkeypatch):
    monkeypatch.setattr(open_files, "most", lambda: 8)
    opened = []
    readers = open_files.Readers(lambda number: opened.append(number) or number)
    for _ in range(100):
        assert [readers[number] for number in range(9)] == list(range(9))
    assert len(readers) == 8
    assert len(opened) < 450  # The one unused for longest put out, it were all 900.


@pytest.mark.parametrize(("soft", "hard", "asked", "found"), [
    (1024, 1 << 20, [(512 * 12, 1 << 20)], 512),
    (1024, 4096, [(4096, 4096)], 4096 // 12),
    (1 << 20, 1 << 20, [], 512),
    (256, 256, [(256, 256)], 64),
    (resource.RLIM_INFINITY, resource.RLIM_INFINITY, [], 512),
])
def test_the_soft_limit_is_raised(monkeypatch, soft, hard, asked, found):
    told = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: told.append(both))
    assert open_files.most.__wrapped__() == found
    assert told == asked


def test_a_limit_that_cannot_be_raised_holds(monkeypatch):
    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1200, 1 << 20))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files.most.__wrapped__() == 100
