"""A loss that is not finite: the batch is named, and it can be read again."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.data.loading import loader as loader_lib
from ldm_scaling.training import loop
from tests.training import toy


class Source:
    """Example i is full of i."""

    def __len__(self):
        return 96

    def batch(self, indices, keys=None):
        return {"x": np.repeat(np.asarray(indices, np.float32)[:, None], 8, axis=1)}


def _loader(**kwargs):
    return loader_lib.train_loader(Source(), 16, seed=1, threads=0, **kwargs)


def _loss(params, batch, key):
    value = jnp.mean((batch["x"] @ params["layer"]["kernel"]) ** 2) * 1e-6
    return jnp.where(jnp.any(batch["x"] == 41.0), jnp.nan, value), {}


@pytest.mark.parametrize("log_every", [1, 50])  # Read at once, or a step late.
def test_the_batch_of_a_bad_loss_is_named(tmp_path, log_every):
    with _loader() as batches:
        seen = [next(batches)["x"][:, 0].astype(int).tolist() for _ in range(6)]
    bad = next(k for k, batch in enumerate(seen, 1) if 41 in batch)
    config = dataclasses.replace(
        toy.CONFIG, steps=12, log_every=log_every, checkpoint_every=100, learning_rate=1e-9
    )
    with pytest.raises(loop.NonFiniteLossError, match=f"at step {bad}, .*nonfinite_{bad}.json"):
        loop.fit(toy.task(_loss), config, _loader, tmp_path, toy.one_device(), seed=0)
    body = json.loads((tmp_path / f"nonfinite_{bad}.json").read_text())
    assert body["step"] == bad and body["not_finite"][0] == "loss"
    assert body["metrics"]["loss"] == "nan"
    assert [e["index"] for e in body["examples"]] == seen[bad - 1]
    assert {e["source"] for e in body["examples"]} == {0}
    # The iterator's state gives the batch again.
    with _loader() as batches:
        batches.set_state(body["iterator"])
        assert next(batches)["x"][:, 0].astype(int).tolist() == seen[bad - 1]


def test_every_host_names_the_whole_batch():
    alone = _loader()
    states = [{"step": 7}, {"step": 20}]
    for host in range(4):
        own = _loader(process_index=host, process_count=4)
        assert [own.examples(s) for s in states] == [alone.examples(s) for s in states]


def test_a_loader_that_cannot_name_examples_gives_its_state(tmp_path):
    def loss(params, batch, key):
        value, metrics = toy.loss(params, batch, key)
        return value * jnp.nan, metrics

    with pytest.raises(loop.NonFiniteLossError, match="step 1"):
        loop.fit(toy.task(loss), toy.CONFIG, toy.Loader, tmp_path, toy.one_device(), seed=0)
    body = json.loads((tmp_path / "nonfinite_1.json").read_text())
    assert body["examples"] is None and body["iterator"] == {"count": 0}
