"""Conditions in the loader: by example and epoch alone, whatever reads them."""

from __future__ import annotations

import sys

import cloudpickle
import numpy as np
import pytest

from ldm_scaling.data.conditions import table
from ldm_scaling.data.conditions.source import ConditionedSource
from ldm_scaling.data.loading import buckets, loader
from ldm_scaling.errors import UserError
from tests.data.conditions import made

# Worker processes cannot import this module: its classes are sent to them.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Pictures:
    """A few pictures at hand."""

    hash = "pictures"

    def __init__(self, images_NHWC):
        self.images_NHWC = images_NHWC
        self.sizes = (images_NHWC.shape[1:3],)

    def __len__(self):
        return len(self.images_NHWC)

    def batch(self, indices, keys=None):
        return {"image": self.images_NHWC[indices], "index": np.asarray(indices, np.int64)}


def pictures_of(count: int = 6, size: tuple[int, int] = (64, 64)) -> Pictures:
    return Pictures(np.stack([made.photograph(*size, seed) for seed in range(count)]))


def seen(source, batch_size: int, steps: int, **kwargs) -> dict[tuple[int, int], bytes]:
    """What (index, how often it was seen before) was given, with several hosts of all."""
    hosts = kwargs.pop("hosts", 1)
    found, times = {}, {}
    loaders = [
        loader.train_loader(source, batch_size, 0, host, hosts, **kwargs) for host in range(hosts)
    ]
    for _ in range(steps):
        for iterator in loaders:
            batch = next(iterator)
            for index, condition in zip(batch["index"].tolist(), batch["condition"]):
                time = times[index] = times.get(index, -1) + 1
                found[index, time] = condition.tobytes()
    for iterator in loaders:
        iterator.close()
    return found


def test_batches_threads_hosts_and_processes_do_not_matter():
    source = ConditionedSource(pictures_of(), table.named("super_resolution"))
    expected = seen(source, 6, 3)
    assert len(expected) == 18 and len(set(expected.values())) == 18  # anew in each epoch
    assert seen(source, 2, 9, threads=4) == expected
    assert seen(source, 6, 3, hosts=2) == expected
    assert seen(source, 6, 1, workers=1) == {k: v for k, v in expected.items() if k[1] == 0}


def test_in_evaluation_it_is_the_same_every_time_and_another_for_another_seed():
    source = ConditionedSource(pictures_of(), table.named("inpainting"))
    batch, again = source.batch(range(4)), source.batch([3, 1])
    for name in ("condition", "condition_mask"):
        np.testing.assert_array_equal(again[name], batch[name][[3, 1]])
    other = ConditionedSource(pictures_of(), table.named("inpainting"), seed=1).batch([3, 1])
    assert (other["condition_mask"] != again["condition_mask"]).any()


@pytest.mark.parametrize("keys", [None, np.arange(6, dtype=np.uint64)])
def test_a_crop_is_of_the_same_place_in_all(keys):
    pictures = pictures_of(size=(96, 128))
    whole = ConditionedSource(pictures, table.named("outpainting")).batch(range(6), keys)
    cut = ConditionedSource(pictures, table.named("outpainting"), 64).batch(range(6), keys)
    assert cut["image"].shape == cut["condition"].shape == (6, 64, 64, 3)
    visible = cut["condition_mask"][..., 0] == 0
    np.testing.assert_array_equal(cut["condition"][visible], cut["image"][visible])
    tops = set()
    for i in range(6):
        places = [
            (y, x) for y in range(33) for x in range(65)
            if (whole["image"][i, y : y + 64, x : x + 64] == cut["image"][i]).all()
        ]  # fmt: skip
        assert len(places) == 1
        (y, x), = places
        tops.add((y, x))
        np.testing.assert_array_equal(
            cut["condition_mask"][i], whole["condition_mask"][i, y : y + 64, x : x + 64]
        )
    assert tops == {(16, 32)} if keys is None else len(tops) > 3


def test_a_crop_of_low_resolution_is_four_times_smaller_and_in_step():
    pictures = pictures_of(size=(96, 128))
    keys = np.arange(6, dtype=np.uint64)
    whole = ConditionedSource(pictures, table.named("super_resolution")).batch(range(6), keys)
    cut = ConditionedSource(pictures, table.named("super_resolution"), 64).batch(range(6), keys)
    assert cut["image"].shape == (6, 64, 64, 3) and cut["condition"].shape == (6, 16, 16, 3)
    for i in range(6):
        found = [
            (y, x) for y in range(9) for x in range(17)
            if (whole["condition"][i, y : y + 16, x : x + 16] == cut["condition"][i]).all()
            and (whole["image"][i, 4 * y : 4 * y + 64, 4 * x : 4 * x + 64] == cut["image"][i]).all()
        ]  # fmt: skip
        assert len(found) == 1


def test_images_that_do_not_do_are_refused_before_any_is_read():
    pictures = pictures_of(1, (64, 66))
    with pytest.raises(UserError, match="of images of 64x66 pixels: .* multiples of 4"):
        ConditionedSource(pictures, table.named("super_resolution"))
    with pytest.raises(UserError, match="a crop of 128 of images of 64x66"):
        ConditionedSource(pictures, table.named("jpeg_restoration"), 128)
    with pytest.raises(UserError, match="of images of 30x30"):
        ConditionedSource(pictures, table.named("jpeg_restoration"), 30)
    pictures.bucket_N, pictures.sizes = np.zeros(1, int), buckets.table(64).sizes
    with pytest.raises(UserError, match="a crop of 64 of images in buckets"):
        ConditionedSource(pictures, table.named("jpeg_restoration"), 64)


def test_checkpoints_know_the_condition():
    digests = {
        ConditionedSource(pictures_of(1), table.named(name), crop).hash
        for name in table.CONDITIONS for crop in (None, 32)
    }  # fmt: skip
    assert len(digests) == 2 * len(table.CONDITIONS)
