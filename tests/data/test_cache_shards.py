"""Caches in shards: the same records, whatever stopped the writing and however many wrote."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import pickle
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ldm_scaling.data import cache, cache_shards, open_files
from ldm_scaling.errors import UserError

COUNT, SIZE = 50, 8
RNG = np.random.default_rng(0)
DATA = {
    "mean": RNG.standard_normal((COUNT, 2, 2, 4)).astype(np.float32),
    "index": np.arange(COUNT),
}


def part(start, stop):
    return {name: array[start:stop] for name, array in DATA.items()}


def make(start, stop, batch=3):
    for low in range(start, stop, batch):
        yield part(low, min(low + batch, stop))


def measured(batch):
    mean = batch["mean"].astype(np.float64)
    return {"n": len(mean), "sum_C": mean.sum((0, 1, 2)).tolist(), "min": float(mean.min()),
            "max_C": mean.max((0, 1, 2)).tolist()}


def write(folder, make=make, count=COUNT, size=SIZE, hash="abc", **kw):
    return cache_shards.write_shards(
        folder, count, size, make, {"about": "numbers"}, hash, statistics=measured, **kw
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "whole"
    write(folder)
    return folder


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    count=st.integers(1, COUNT), size=st.integers(1, COUNT), compress=st.booleans(),
    order=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_records_come_back_in_any_order(tmp_path_factory, count, size, compress, order):
    folder = tmp_path_factory.mktemp("cache") / "x"
    source = write(folder, count=count, size=size, compress=compress)
    assert len(source) == count and len(list(folder.glob("shard-*"))) == -(-count // size)
    order = [i % count for i in order]
    batch = source.batch(order, keys=np.arange(len(order), dtype=np.uint64))
    for name, array in DATA.items():
        assert batch[name].dtype == array.dtype and batch[name].flags.c_contiguous
        np.testing.assert_array_equal(batch[name], array[order])


def test_a_shard_is_a_cache_of_its_own(unbroken):
    source = cache.CacheSource(unbroken / "shard-00002-of-00007.array_record")
    np.testing.assert_array_equal(source.batch(range(SIZE))["index"], np.arange(16, 24))


def test_meta_and_statistics(unbroken):
    source = cache.CacheSource(unbroken, "abc")
    assert source.meta == {"about": "numbers", "hash": "abc"} and source.hash == "abc"
    mean = DATA["mean"]
    assert source.statistics["n"] == COUNT
    assert source.statistics["min"] == mean.min()
    np.testing.assert_array_equal(source.statistics["max_C"], mean.max((0, 1, 2)))
    np.testing.assert_allclose(
        source.statistics["sum_C"], mean.sum((0, 1, 2), dtype=np.float64), rtol=1e-12
    )


@pytest.mark.parametrize("stop_at", [0, 1, 7, 8, 20, 49])
def test_a_broken_run_ends_as_an_unbroken_one(unbroken, tmp_path, stop_at):
    """Byte for byte, and no shard that was there is made again."""

    def dying(start, stop):
        for batch in make(start, stop):
            if stop_at in batch["index"]:
                raise KeyboardInterrupt
            yield batch

    folder, made = tmp_path / "cache", []
    with pytest.raises(KeyboardInterrupt):
        write(folder, dying)
    with pytest.raises(UserError, match="not finished"):
        cache.CacheSource(folder)
    left = folder / ".tmp-0a1b2c3d-shard-00006-of-00007.array_record"
    left.write_bytes(b"of a killed run")
    os.utime(left, (0, 0))

    def counted(start, stop):
        made.append(start)
        return make(start, stop)

    write(folder, counted)
    assert made == list(range(stop_at // SIZE * SIZE, COUNT, SIZE))
    assert contents(folder) == contents(unbroken)
    assert len(cache.CacheSource(folder, "abc")) == COUNT
    made.clear()
    write(folder, counted)
    assert not made


def test_what_another_study_is_writing_is_left_alone(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".tmp-0a1b2c3d-shard-00006-of-00007.array_record").write_bytes(b"half of a shard")
    write(folder)
    assert list(folder.glob(".tmp-*"))


def test_a_shard_that_is_lost_or_removed_is_made_again(unbroken, tmp_path):
    """As the message about a damaged one asks for."""
    folder = tmp_path / "x"
    write(folder)
    (folder / "shard-00002-of-00007.array_record").unlink()
    asked = []

    def again(start, stop):
        asked.append((start, stop))
        return make(start, stop)

    source = write(folder, make=again)
    assert asked == [(16, 24)]
    assert contents(folder) == contents(unbroken)
    np.testing.assert_array_equal(source.batch(range(COUNT))["mean"], DATA["mean"])


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_several_writers_make_the_same_folder(unbroken, tmp_path, processes):
    made = {}

    def run(p):
        mine = made[p] = []

        def counted(start, stop):
            mine.append(start // SIZE)
            return make(start, stop)

        return write(tmp_path / "x", counted, process_index=p, process_count=processes)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        sources = list(pool.map(run, range(processes)))
    assert contents(tmp_path / "x") == contents(unbroken)
    assert [len(source) for source in sources] == [COUNT] * processes
    assert made == {p: list(range(p, 7, processes)) for p in range(processes)}


def test_writers_that_stay_away_are_told_of(unbroken, tmp_path):
    for p in (0, 1):
        with pytest.raises(UserError, match="and . more files were not made by the other proc"):
            write(tmp_path / f"x{p}", process_index=p, process_count=3, patience_s=0.05)
        with pytest.raises(UserError, match="not finished"):
            cache.CacheSource(tmp_path / f"x{p}")
    write(tmp_path / "x1")  # One that makes all.
    assert contents(tmp_path / "x1") == contents(unbroken)


def test_something_else_is_not_gone_on_with(tmp_path):
    with pytest.raises(UserError):
        write(tmp_path, process_count=2, patience_s=0)  # Every other shard.
    with pytest.raises(UserError, match=r"hash abc, records 0\.\.; not other.*remove"):
        write(tmp_path, hash="other")
    with pytest.raises(UserError, match="holds shard-00000-of-00007.*none of the 5 shards"):
        write(tmp_path, size=10)
    write(tmp_path)
    with pytest.raises(UserError, match="abc, not other.*remove"):
        write(tmp_path, hash="other")
    with pytest.raises(UserError, match="50 records instead of 49"):
        write(tmp_path, count=49)


def test_a_cut_shard_is_not_gone_on_with(tmp_path):
    with pytest.raises(UserError):
        write(tmp_path, process_count=2, patience_s=0)
    shard = tmp_path / "shard-00002-of-00007.array_record"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match="shard-00002.*is damaged.*remove it"):
        write(tmp_path)
    shard.unlink()
    assert len(write(tmp_path)) == COUNT


def test_shards_that_are_not_the_manifests_are_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", hash="other")
    name = "shard-00003-of-00007.array_record"
    (tmp_path / "b" / name).rename(tmp_path / "a" / name)
    source = cache.CacheSource(tmp_path / "a")
    np.testing.assert_array_equal(source.batch([0])["index"], [0])
    with pytest.raises(UserError, match="shard-00003.*is not the shard that .*cache.json lists"):
        source.batch([0, 30])
    (tmp_path / "a" / name).unlink()
    with pytest.raises(UserError, match="shard-00003.* does not exist"):
        source.batch([30])


@pytest.mark.parametrize("change", [
    lambda text: text[:-30], lambda text: text.replace('"count": 50', '"count": 51'),
    lambda text: text.replace("shards 1", "shards 7"), lambda text: "[]",
    lambda text: text.replace('"schema"', '"s"'),
])  # fmt: skip
def test_a_broken_manifest_is_told(tmp_path, change):
    source = write(tmp_path)
    manifest = tmp_path / cache.MANIFEST
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(UserError, match="cache.json is damaged.*remove it"):
        cache.CacheSource(tmp_path)
    manifest.unlink()
    assert write(tmp_path, lambda start, stop: 1 / 0).statistics == source.statistics


def test_makers_that_err_are_told_and_leave_no_shard(tmp_path):
    for short in (lambda start, stop: make(start, stop - 1), lambda start, stop: make(start, 50)):
        with pytest.raises(ValueError, match=r"records 0\.\.7 were asked for, (7|50) were made"):
            write(tmp_path, short)
    with pytest.raises(ValueError, match="arrays of .3, 4. examples"):
        write(tmp_path, lambda start, stop: [{"a": np.zeros(3), "mean": np.zeros((4, 1, 1, 1))}])
    assert not list(tmp_path.iterdir())
    for count, size, p in ((0, 1, 0), (1, 0, 0), (1, 1, 1)):
        with pytest.raises(ValueError, match=f"{count} records in shards of {size}"):
            write(tmp_path, count=count, size=size, process_index=p)


def test_shards_of_different_arrays_are_refused(tmp_path):
    def mixed(start, stop):
        mean = DATA["mean"][start:stop]
        yield {"mean": mean.astype(np.float16) if start else mean}

    with pytest.raises(UserError, match="shard-00001.*float16.*but shard-00000.*float32"):
        write(tmp_path, mixed)


@hypothesis.given(st.lists(st.lists(st.integers(-99, 99), min_size=1), min_size=3, max_size=3))
def test_merging_is_associative_and_of_all(parts):
    def of(values):
        return {"n": len(values), "sum": [sum(values)], "min_": min(values), "max": [max(values)]}

    a, b, c = map(of, parts)
    merged = cache_shards.merge(cache_shards.merge(a, b), c)
    assert merged == cache_shards.merge(a, cache_shards.merge(b, c)) == of(sum(parts, []))
    assert cache_shards.merge({}, a) == cache_shards.merge(a, {}) == a
    with pytest.raises(ValueError, match="do not merge"):
        cache_shards.merge(a, {"n": 1})


def test_threads_share_more_shards_than_are_open(unbroken, monkeypatch):
    monkeypatch.setattr(open_files, "most", lambda: 2)
    source, wrong = cache.CacheSource(unbroken), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(50):
            order = rng.integers(0, COUNT, 9)
            if not np.array_equal(source.batch(order)["mean"], DATA["mean"][order]):
                wrong.append(order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(source._files) == 2


def test_another_process_opens_its_own_files(unbroken):
    source = cache.CacheSource(unbroken, "abc")
    source.batch([0, 49])
    assert len(pickle.dumps(source)) < 1000
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        batch = pool.submit(source.batch, [49, 0, 12]).result()
    assert batch["index"].tolist() == [49, 0, 12]


def test_the_manifest_is_plain_json(unbroken):
    manifest = json.loads((unbroken / cache.MANIFEST).read_text())
    assert manifest["shards"]["shard-00006-of-00007.array_record"] == 2
    assert manifest["schema"][0] == {"name": "mean", "dtype": "float32", "shape": [2, 2, 4]}
