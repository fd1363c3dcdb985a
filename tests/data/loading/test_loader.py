"""The order of examples: a function of seed and step, shared by hosts, resumable anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import cloudpickle
import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_scaling import errors
from ldm_scaling.data import cache
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import buckets, loader, order

# Worker processes cannot import this module: its classes are sent to them.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Numbers:
    """Example i is the number i."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self):
        return self._count

    def batch(self, indices, keys=None):
        return {"x": np.asarray(indices, np.int64)} | ({} if keys is None else {"key": keys})


class Rotten(Numbers):
    """Numbers of which some cannot be read."""

    def __init__(self, count: int, bad: set[int]):
        super().__init__(count)
        self._bad, self.asked = frozenset(bad), []

    def batch(self, indices, keys=None):
        self.asked += list(indices)
        if failed := self._bad & set(indices):
            raise CorruptRecords({i: f"picture_{i}.jpg is cut short" for i in failed})
        return super().batch(indices, keys)


def take(iterator, count: int) -> list[list[int]]:
    return [next(iterator)["x"].tolist() for _ in range(count)]


def batches(count: int, size: int, seed: int, number: int, **kwargs) -> list[list[int]]:
    iterator = loader.train_loader(Numbers(count), size, seed, **kwargs)
    try:
        return take(iterator, number)
    finally:
        iterator.close()


def test_every_example_is_seen_once_an_epoch():
    seen = np.concatenate(batches(100, 12, 0, 25))  # three epochs, batches across their borders
    for epoch in range(3):
        assert sorted(seen[epoch * 100 : (epoch + 1) * 100]) == list(range(100))


def test_a_dropped_remainder_is_another_one_each_epoch():
    seen = np.array(batches(100, 12, 0, 80, drop_remainder=True)).reshape(10, 96)
    left = [frozenset(range(100)) - set(epoch.tolist()) for epoch in seen]
    assert all(len(examples) == 4 for examples in left)
    assert len(set(left)) == 10


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(np.concatenate(part))
        for seed in range(6)
        for part in np.split(np.array(batches(64, 8, seed, 32)), 4)
    ]
    assert len(set(orders)) == len(orders)  # 6 seeds of 4 epochs
    assert all(list(order) != sorted(order) for order in orders)


def test_a_shuffle_leaves_nothing_near_its_place():
    """The mean shift of a random permutation of n is n / 3."""
    order = np.concatenate(batches(999, 27, 5, 37))
    assert np.abs(order - np.arange(999)).mean() == pytest.approx(333, rel=0.1)


def test_the_same_seed_gives_the_same_order_whatever_the_threads():
    expected = batches(50, 7, 3, 30)
    for threads in (0, 1, 4):
        assert batches(50, 7, 3, 30, threads=threads) == expected


@pytest.mark.parametrize("drop_remainder", [False, True])
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_batches_of_one(hosts, drop_remainder):
    whole = batches(50, 8, 1, 15, drop_remainder=drop_remainder)
    parts = [
        batches(50, 8, 1, 15, threads=1, process_index=host, process_count=hosts,
                drop_remainder=drop_remainder)
        for host in range(hosts)
    ]  # fmt: skip
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


def test_the_order_is_that_of_grains_shuffle():
    """So that checkpoints of grain's own iterator go on with the examples that were to come."""
    seen = np.concatenate(batches(10_000, 3_000, 0, 7))
    seed = int.from_bytes(hashlib.sha256(b"order 0").digest()[:4], "big")
    shuffled = grain.MapDataset.range(10_000).shuffle(seed=seed)
    assert seen.tolist() == [shuffled[i] for i in range(21_000)]


@pytest.mark.parametrize("count", [1, 2, 7, 1000, order.SMALL - 1, order.SMALL, 10_000])
def test_small_and_large_sources_are_shuffled_whole(count):
    size = min(count, 500)
    seen = np.concatenate(batches(count, size, 0, -(-2 * count // size)))
    for epoch in (seen[:count], seen[count : 2 * count]):
        assert sorted(epoch) == list(range(count))
    if count > 20:
        assert (seen[:count] == seen[count : 2 * count]).mean() < 0.1


def test_nothing_as_long_as_the_source_is_held():
    """600 million examples, shuffled by computing each index."""
    places = order.Order([600_000_000], [Fraction(1)], 2048, 0, [None])
    indices = np.concatenate(
        [places.examples(step, slice(0, 2048)).indices_B for step in (0, 1, 292_000)]
    )
    assert len(set(indices.tolist())) == 3 * 2048
    assert indices.mean() == pytest.approx(3e8, rel=0.05)
    assert len(cloudpickle.dumps(places)) < 10_000


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    count=st.integers(8, 60), each=st.integers(1, 4), seed=st.integers(0, 2**70),
    hosts=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
)  # fmt: skip
def test_two_epochs_on_changing_hosts_show_each_example_twice(count, each, seed, hosts):
    """The run stops and goes on with another number of hosts again and again."""
    size = 8 * each
    hypothesis.assume(size <= count)
    seen = []
    for step in range(-(-2 * count // size)):
        of = hosts[step % len(hosts)]
        for host in range(of):
            read = loader.train_loader(
                Numbers(count), size, seed, process_index=host, process_count=of
            )._reader
            seen += read(step)[0]["x"].tolist()
    whole = [i for batch in batches(count, size, seed, len(seen) // size) for i in batch]
    assert seen == whole
    for epoch in (seen[:count], seen[count : 2 * count]):
        assert sorted(epoch) == list(range(count))


def test_keys_are_of_the_example_and_its_epoch():
    keys = {}
    for seed in (0, 1):
        with loader.train_loader(Numbers(40), 7, seed) as iterator:
            for k in range(80):
                batch = next(iterator)
                for row, (x, key) in enumerate(zip(batch["x"].tolist(), batch["key"].tolist())):
                    keys[seed, (7 * k + row) // 40, x] = key
    assert len(keys) == 2 * 14 * 40
    assert len(set(keys.values())) == len(keys)
    bits = np.unpackbits(np.array(list(keys.values()), np.uint64).view(np.uint8).reshape(-1, 8), 1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(keys))


def test_hosts_draw_the_same_keys():
    with loader.train_loader(Numbers(40), 8, 0) as iterator:
        whole = next(iterator)["key"]
    parts = []
    for host in range(4):
        with loader.train_loader(Numbers(40), 8, 0, host, 4) as iterator:
            parts.append(next(iterator)["key"])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    count=st.integers(5, 40), size=st.integers(1, 5), stop=st.integers(0, 25), seed=st.integers(0),
    drop=st.booleans(),
)  # fmt: skip
def test_going_on_from_any_step_equals_never_having_stopped(count, size, stop, seed, drop):
    unbroken = batches(count, size, seed, stop + 10, drop_remainder=drop)
    first = loader.train_loader(Numbers(count), size, seed, drop_remainder=drop)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = loader.train_loader(Numbers(count), size, seed, drop_remainder=drop)
    take(second, 3)  # wherever it is by then
    second.set_state(state)
    assert take(second, 10) == unbroken[stop:]
    second.close()


def test_orbax_keeps_the_state(tmp_path):
    iterator = loader.train_loader(Numbers(30), 4, 0)
    take(iterator, 11)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(11, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 9)
        other = loader.train_loader(Numbers(30), 4, 0)
        manager.restore(11, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert take(other, 9) == expected


def test_a_closed_loader_gives_nothing_more():
    iterator = loader.train_loader(Numbers(30), 4, 0)
    take(iterator, 2)
    iterator.close()
    for more in (iterator.start_prefetch, iterator.__next__):
        with pytest.raises(ValueError, match="was closed: make another"):
            more()
    iterator.close()


def test_zipped_sources_stay_in_step(tmp_path):
    for name, factor in (("latent", 2), ("text", 3)):
        items = ({name: np.float32([i * factor])} for i in range(20))
        cache.write(tmp_path / name, items)
    source = loader.zip_sources(
        *(cache.CacheSource(tmp_path / name) for name in ("latent", "text")), Numbers(20)
    )
    iterator = loader.train_loader(source, 4, 0)
    for _ in range(12):
        batch = next(iterator)
        np.testing.assert_array_equal(batch["latent"][:, 0], 2 * batch["x"])
        np.testing.assert_array_equal(batch["text"][:, 0], 3 * batch["x"])
    iterator.close()


def test_sources_of_different_lengths_are_refused():
    with pytest.raises(errors.UserError, match=r"\[3, 4\]"):
        loader.zip_sources(Numbers(3), Numbers(4))
    with pytest.raises(ValueError, match="'x'"):
        loader.zip_sources(Numbers(3), Numbers(3)).batch([0])


@pytest.mark.parametrize(
    ("count", "size", "hosts", "message"),
    [(10, 11, 1, "11 is larger.*10"), (10, 3, 2, "3 cannot.*2 hosts"), (10, 0, 1, "0 cannot"),
     (0, 1, 1, "larger")],
)  # fmt: skip
def test_impossible_batches_are_refused(count, size, hosts, message):
    with pytest.raises(errors.UserError, match=message):
        loader.train_loader(Numbers(count), size, 0, process_count=hosts)


def test_a_damaged_record_stops_the_loader_with_the_files_name(tmp_path):
    path = tmp_path / "latents"
    rng = np.random.default_rng(0)
    cache.write(path, ({"x": rng.standard_normal(512)} for _ in range(64)))
    data = bytearray(path.read_bytes())
    for place in range(200, 4096 * 32, 1000):
        data[place] ^= 0xFF
    path.write_bytes(data)
    iterator = loader.train_loader(cache.CacheSource(path), 8, 0)
    with pytest.raises(errors.UserError, match="latents is damaged"):
        for _ in range(8):
            next(iterator)
    iterator.close()


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(errors.UserError, match="version=None.*start anew in another --workdir"):
        loader.train_loader(Numbers(30), 4, 0).set_state({"next_index": 11})


class Hashed(Numbers):
    def __init__(self, count, hash):
        super().__init__(count)
        self.hash = hash


@pytest.mark.parametrize(
    ("source", "size", "seed", "message"),
    [(Hashed(30, "a"), 5, 0, "batch_size=4, this run's has batch_size=5"),
     (Hashed(30, "a"), 4, 1, "seed=0, this run's has seed=1"),
     (Hashed(31, "a"), 4, 0, r"counts=\[30\], this run's has counts=\[31\]"),
     (Hashed(30, "b"), 4, 0, r"hashes=\['a'\], this run's has hashes=\['b'\]"),
     (loader.Mixture([Hashed(30, "a")] * 2, [1, 3]), 4, 0, r"counts=\[30\].*=\[30, 30\]")],
)  # fmt: skip
def test_a_state_of_another_order_is_refused_with_both_values(source, size, seed, message):
    state = json.loads(json.dumps(loader.train_loader(Hashed(30, "a"), 4, 0).get_state()))
    other = loader.train_loader(source, size, seed)
    with pytest.raises(errors.UserError, match=message):
        other.set_state(state)
    with pytest.raises(errors.UserError, match="it is damaged"):
        loader.train_loader(Hashed(30, "a"), 4, 0).set_state({**state, "step": -1})


def test_other_weights_are_refused():
    sources = [Numbers(9), Numbers(5)]
    state = loader.train_loader(loader.Mixture(sources, [1, 3]), 4, 0).get_state()
    loader.train_loader(loader.Mixture(sources, [0.5, 1.5]), 4, 0).set_state(state)  # the same
    with pytest.raises(errors.UserError, match="weights=.*1/4.*3/4.*1/3"):
        loader.train_loader(loader.Mixture(sources, [1, 2]), 4, 0).set_state(state)


def test_corrupt_examples_are_replaced_the_same_on_any_number_of_hosts(caplog):
    bad = {3, 17}
    with loader.train_loader(Rotten(100, bad), 8, 0, max_corrupt=0.05) as iterator:
        with caplog.at_level(logging.WARNING):
            whole = take(iterator, 60)
        assert iterator.corrupt == {(0, i): f"picture_{i}.jpg is cut short" for i in bad}
    named = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
    assert len(named) == 2  # once each, though seen in several epochs
    assert all("cut short" in message for message in named)
    sound = batches(100, 8, 0, 60)
    changed = [a for a, b in zip(sum(sound, []), sum(whole, [])) if a != b]
    assert set(changed) == bad
    assert len(changed) == sum(sound, []).count(3) + sum(sound, []).count(17)
    parts = []
    for host in range(4):
        with loader.train_loader(Rotten(100, bad), 8, 0, host, 4, max_corrupt=0.05) as iterator:
            parts.append(take(iterator, 60))
    assert [sum(step, []) for step in zip(*parts)] == whole
    with loader.train_loader(Rotten(100, bad), 8, 0, max_corrupt=0.05) as iterator:
        iterator.set_state({**iterator.get_state(), "step": 41})
        assert take(iterator, 19) == whole[41:]


def test_too_many_corrupt_examples_stop_the_run_with_the_list():
    bad = set(range(0, 1000, 20))  # one in twenty
    with loader.train_loader(Rotten(1000, bad), 8, 0) as iterator:
        with pytest.raises(errors.UserError) as e:
            take(iterator, 200)
    message = str(e.value)
    assert "11 of" in message and "share 0.01" in message and "max_corrupt" in message
    assert message.count("cut short") == 10 and "and 1 more" in message
    assert "\n" not in message
    with loader.train_loader(Rotten(1000, bad), 8, 0, max_corrupt=0.08) as iterator:
        take(iterator, 200)
    with loader.train_loader(Rotten(1000, {5}), 8, 0, max_corrupt=0) as iterator:
        with pytest.raises(errors.UserError, match="1 of .* examples"):
            take(iterator, 200)


def test_a_source_without_a_sound_example_stops_the_run():
    with loader.train_loader(Rotten(10, set(range(10))), 4, 0, max_corrupt=1) as iterator:
        with pytest.raises(errors.UserError, match="picture_.*cut short"):
            next(iterator)


@pytest.mark.parametrize(
    "values",
    [{"workers": -1}, {"max_corrupt": 1.5}, {"threads": -1}, {"max_corrupt": float("nan")}],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(errors.UserError, match=next(iter(values))):
        loader.train_loader(Numbers(10), 2, 0, **values)


def test_drop_remainder_is_for_one_source():
    mixture = loader.Mixture([Numbers(10), Numbers(10)], [1, 1])
    with pytest.raises(ValueError, match="mixture"):
        loader.train_loader(mixture, 2, 0, drop_remainder=True)


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_worker_processes_give_the_same_batches_and_end():
    source = loader.Mixture([Rotten(40, {3}), Numbers(9)], [2, 1])
    with loader.train_loader(source, 6, 5, max_corrupt=0.1) as iterator:
        expected = [next(iterator) for _ in range(30)]
        corrupt = iterator.corrupt
    with loader.train_loader(source, 6, 5, max_corrupt=0.1, workers=2) as iterator:
        for batch in expected:
            _equal(next(iterator), batch)
        assert iterator.corrupt == corrupt
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        state = json.loads(json.dumps(iterator.get_state()))
    assert not any(process.is_alive() for process in processes)
    with loader.train_loader(source, 6, 5, max_corrupt=0.1) as iterator:  # and back to threads
        iterator.set_state({**state, "step": 20})
        _equal(next(iterator), expected[20])


def test_worker_processes_give_batches_after_sigterm():
    """It reaches a whole group of processes: the run ends its step, which may want a batch."""
    with loader.train_loader(Numbers(50), 4, 0, workers=1) as iterator:
        next(iterator)
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGTERM)
        for _ in range(20):
            next(iterator)
        assert process.is_alive()
    assert not process.is_alive()


def test_errors_of_worker_processes_are_told_and_no_process_stays(tmp_path):
    """The source is missing in the workers only: it was there when the loader was made."""
    cache.write(tmp_path / "x", ({"x": np.float32([i])} for i in range(20)))
    source = cache.CacheSource(tmp_path / "x")
    (tmp_path / "x").unlink()
    with loader.train_loader(source, 4, 0, workers=1) as iterator:
        with pytest.raises(errors.UserError, match="x does not exist"):
            next(iterator)
    assert not multiprocessing.active_children()
    with loader.train_loader(Rotten(20, set(range(20))), 4, 0, workers=1) as iterator:
        with pytest.raises(errors.UserError, match="cut short"):
            next(iterator)
    assert not multiprocessing.active_children()


_SCRIPT = """
import multiprocessing, signal, sys, time
import numpy as np
from ldm_scaling.data.loading import loader

class Numbers:
    def __len__(self):
        return 50
    def batch(self, indices, keys=None):
        import jax
        assert jax.config.jax_platforms == "cpu"
        return {"x": np.asarray(indices)}

if __name__ == "__main__":
    # A shell's background jobs begin with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    iterator = loader.train_loader(Numbers(), 4, 0, workers=2)
    next(iterator)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    while True:
        next(iterator)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_script_that_is_stopped(tmp_path, how):
    """A script without parsed absl flags, that never closes its iterator."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    script = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "JAX_PLATFORMS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        workers = [int(pid) for pid in script.stdout.readline().split()]
        assert len(workers) == 2
        for _ in range(10):  # One that falls into the garbage collector's callbacks is lost.
            script.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                script.wait(6)
                break
        assert script.returncode
        deadline = time.monotonic() + 20
        while alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
    finally:
        script.kill()
        script.stdout.close()


class Pictures(Numbers):
    """Numbers in two buckets."""

    sizes = ((2, 1), (1, 1), (1, 2))

    def __init__(self, bucket_N):
        super().__init__(len(bucket_N))
        self.bucket_N = np.asarray(bucket_N)

    def batch(self, indices, keys=None):
        (bucket,) = set(self.bucket_N[np.asarray(indices)].tolist())
        return {"x": np.asarray(indices), "image": np.zeros((len(indices), *self.sizes[bucket]))}


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    counts=st.tuples(st.integers(4, 30), st.integers(0, 3), st.integers(4, 30)),
    seed=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_buckets_take_turns_and_miss_nothing(counts, seed, data):
    """Of a bucket of n every n places from the start of its stream hold each picture once."""
    sizes = [(1, 2)] * counts[0] + [(1, 1)] * counts[1] + [(2, 1)] * counts[2]
    sizes = data.draw(st.permutations(sizes))
    bucket_N = buckets.Buckets(Pictures.sizes).assign(np.array(sizes), at_least=4)
    filled = np.bincount(bucket_N, minlength=3)
    assert all(n == 0 or n >= 4 for n in filled)
    read = loader.train_loader(Pictures(bucket_N), 4, seed)._reader
    streams = {bucket: [] for bucket in range(3)}
    for step in range(50):
        x = read(step)[0]["x"].tolist()
        assert len(set(bucket_N[x])) == 1
        assert len(set(x)) == 4 or len(streams[bucket_N[x[0]]]) % filled[bucket_N[x[0]]]
        streams[bucket_N[x[0]]] += x
        for bucket, n in enumerate(filled):  # in proportion, to a batch and a half
            ahead = len(streams[bucket]) / 4 - (step + 1) * n / len(sizes)
            assert abs(ahead) <= 1.25
    for bucket, stream in streams.items():
        members = np.flatnonzero(bucket_N == bucket).tolist()
        for start in range(0, len(stream) - len(members) + 1, max(len(members), 1)):
            assert sorted(stream[start : start + len(members)]) == members


def test_a_bucket_smaller_than_a_batch_is_refused():
    with pytest.raises(errors.UserError, match="bucket of 1 x 2 pixels of 3 examples"):
        loader.train_loader(Pictures([0] * 9 + [2] * 3), 4, 0)


def test_zipped_sources_keep_their_buckets():
    bucket_N = [0, 2] * 10

    class More(Numbers):
        def batch(self, indices, keys=None):
            return {"y": 3 * np.asarray(indices)}

    source = loader.zip_sources(Pictures(bucket_N), More(20))
    with loader.train_loader(source, 4, 0) as iterator:
        for _ in range(10):
            batch = next(iterator)
            np.testing.assert_array_equal(batch["y"], 3 * batch["x"])


def test_mixed_sources_need_the_same_buckets():
    mixture = loader.Mixture([Pictures([0] * 9), Numbers(9)], [1, 1])
    with pytest.raises(errors.UserError, match="different buckets"):
        loader.train_loader(mixture, 4, 0)
