"""The order of examples: a function of seed and step, shared by hosts, resumable anywhere."""

from __future__ import annotations

import json

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_scaling import errors
from ldm_scaling.data import cache, loader


class Numbers:
    """Example i is the number i."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self):
        return self._count

    def batch(self, indices):
        return {"x": np.asarray(indices, np.int64)}


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
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one(hosts, drop_remainder):
    whole = batches(50, 8, 1, 15, drop_remainder=drop_remainder)
    parts = [
        batches(50, 8, 1, 15, process_index=host, process_count=hosts,
                drop_remainder=drop_remainder)
        for host in range(hosts)
    ]  # fmt: skip
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


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


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("count", [16, 17, 23])
def test_evaluation_sees_every_example_once_in_order(count, hosts):
    parts = [
        list(loader.eval_batches(Numbers(count), 8, process_index=h, process_count=hosts))
        for h in range(hosts)
    ]
    seen = []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert batch["x"].shape == batch["mask"].shape == (8 // hosts,)
            seen += batch["x"][batch["mask"]].tolist()
    assert seen == list(range(count))


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


def test_nothing_to_evaluate_is_refused_at_once():
    with pytest.raises(errors.UserError, match="no examples"):
        loader.eval_batches(Numbers(0), 4)
    with pytest.raises(errors.UserError, match="2 hosts"):
        loader.eval_batches(Numbers(4), 3, process_count=2)


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
