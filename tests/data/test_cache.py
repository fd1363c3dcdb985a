"""Array caches: exact, whole or absent, and damage is never silent."""

from __future__ import annotations

import json
import pickle
import threading

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from ldm_scaling import errors
from ldm_scaling.data import cache


def examples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "context": rng.standard_normal((5, 8)).astype(np.float16),
            "mean": rng.standard_normal((2, 2, 4)).astype(np.float32),
            "length": np.int32(rng.integers(9)),
        }
        for _ in range(count)
    ]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "states.array_record"
    cache.write(path, examples(40), {"hash": "abc", "encoder": "minilm"})
    return path


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(data=st.data(), compress=st.booleans())
def test_any_arrays_come_back_bit_for_bit(tmp_path_factory, data, compress):
    dtypes = st.sampled_from(["float16", "float32", "float64", "int8", "int32", "uint8", "bool"])
    specs = data.draw(st.lists(st.tuples(dtypes, hnp.array_shapes(min_dims=0)), min_size=1,
                               max_size=3))  # fmt: skip
    items = [
        {f"a{k}": data.draw(hnp.arrays(dtype, shape)) for k, (dtype, shape) in enumerate(specs)}
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    path = tmp_path_factory.mktemp("cache") / "x"
    assert cache.write(path, items, compress=compress) == len(items)
    source = cache.CacheSource(path)
    assert len(source) == len(items)
    for index, item in enumerate(items):
        found = source[index]
        assert list(found) == list(item)
        for name, array in item.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_batches_are_the_records_in_the_order_asked_for(written):
    source = cache.CacheSource(written)
    order = [3, 39, 0, 3]
    batch = source.batch(np.array(order))
    for name in ("context", "mean", "length"):
        expected = np.stack([example[name] for example in examples(40)])[order]
        np.testing.assert_array_equal(batch[name], expected)
        assert batch[name].flags.writeable


def test_meta_and_schema_can_be_read(written):
    source = cache.CacheSource(written)
    assert source.meta == {"hash": "abc", "encoder": "minilm"}
    assert source.fields[0] == cache.Field("context", "float16", (5, 8))


def test_files_of_the_first_version_are_read(tmp_path):
    """Compressed records of arrays one after the other, and a note of four keys."""
    from array_record.python.array_record_module import ArrayRecordWriter

    items = examples(5)
    schema = [{"name": "context", "dtype": "float16", "shape": [5, 8]},
              {"name": "mean", "dtype": "float32", "shape": [2, 2, 4]},
              {"name": "length", "dtype": "int32", "shape": []}]  # fmt: skip
    writer = ArrayRecordWriter(str(tmp_path / "old"), "group_size:1,zstd:1")
    for item in items:
        writer.write(b"".join(array.tobytes() for array in item.values()))
    note = {"format": "ldm_scaling cache 1", "count": 5, "schema": schema, "meta": {"hash": "h"}}
    writer.write(json.dumps(note).encode())
    writer.close()
    batch = cache.CacheSource(tmp_path / "old", "h").batch([4, 0])
    for name, array in batch.items():
        np.testing.assert_array_equal(array, np.stack([items[4][name], items[0][name]]))


def test_a_source_pickles_and_takes_no_notice_of_keys(written):
    source = pickle.loads(pickle.dumps(cache.CacheSource(written, "abc")))
    assert source.hash == "abc" and source.statistics == {}
    keys = np.array([7, 2**64 - 1], np.uint64)
    for name, array in source.batch([3, 9]).items():
        np.testing.assert_array_equal(source.batch([3, 9], keys)[name], array)


def test_padding_compresses(tmp_path):
    states = np.zeros((40, 64), np.float16)
    states[:8] = np.random.default_rng(0).standard_normal((8, 64))
    sizes = []
    for compress in (False, True):
        cache.write(tmp_path / "x", [{"context": states}] * 200, compress=compress)
        sizes.append((tmp_path / "x").stat().st_size)
        found = cache.CacheSource(tmp_path / "x").batch([100])
        np.testing.assert_array_equal(found["context"][0], states)
    assert sizes[1] < 0.3 * sizes[0]


def test_rows_undo_stacking(tmp_path):
    source_items = examples(10)
    batches = [
        {k: np.stack([e[k] for e in source_items[a:b]]) for k in source_items[0]}
        for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    assert cache.write(tmp_path / "x", cache.rows(batches)) == 10
    source = cache.CacheSource(tmp_path / "x")
    for index, item in enumerate(source_items):
        np.testing.assert_array_equal(source.batch([index])["context"][0], item["context"])


def test_a_cache_is_taken_only_with_its_hash(written):
    assert len(cache.CacheSource(written, hash="abc")) == 40
    with pytest.raises(errors.UserError, match="abc, not other.*remove"):
        cache.CacheSource(written, hash="other")


def test_a_writer_that_dies_leaves_the_old_file(written):
    def dying():
        yield from examples(20, seed=1)
        raise KeyboardInterrupt

    before = written.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        cache.write(written, dying())
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7, -70000, -1])
def test_a_file_cut_short_is_refused(written, keep):
    data = written.read_bytes()
    written.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(errors.UserError, match="states.array_record is damaged.*remove"):
        cache.CacheSource(written)


def test_no_flipped_bit_goes_unnoticed(written):
    """Wherever a bit flips, opening or reading fails, or what is read is right."""
    data = written.read_bytes()
    rng = np.random.default_rng(0)
    expected = cache.CacheSource(written).batch(range(40))
    noticed = 0
    records = data.rstrip(b"\0")
    for place in rng.integers(0, len(records), 80):
        broken = bytearray(data)
        broken[place] ^= 1 << int(rng.integers(8))
        written.write_bytes(broken)
        try:
            found = cache.CacheSource(written).batch(range(40))
        except errors.UserError as e:
            assert "is damaged" in str(e)
            noticed += 1
            continue
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    assert noticed > 5


def test_other_files_are_no_caches(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x"), "group_size:1")
    writer.write(b"{}")
    writer.close()
    with pytest.raises(errors.UserError, match="no cache"):
        cache.CacheSource(tmp_path / "x")
    with pytest.raises(errors.UserError, match="does not exist"):
        cache.CacheSource(tmp_path / "absent")
    with pytest.raises(errors.UserError, match="does not exist"):
        cache.CacheSource(tmp_path)


def test_indices_outside_are_refused(written):
    source = cache.CacheSource(written)
    for index in (-1, 40):
        with pytest.raises(IndexError, match="0..39"):
            source.batch([index])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        ([{}], "at least one array"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(3)}], "item 1"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], "item 1"),
        ([{"a": np.zeros(2)}, {"a": np.zeros(2, np.float32)}], "item 1"),
        ([{"a": np.array(["text"])}], "plain numbers"),
    ],
)
def test_items_that_are_not_alike_are_refused(tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        cache.write(tmp_path / "x", items)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot write.*file"):
        cache.write(tmp_path / "file" / "x", examples(1))


def test_threads_can_share_a_source(written):
    source = cache.CacheSource(written)
    expected = source.batch(range(40))
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(100):
            order = rng.integers(0, 40, 7)
            if not np.array_equal(source.batch(order)["mean"], expected["mean"][order]):
                wrong.append(order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
