"""A linear network that learns the identity: what the training room's tests train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Train
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training.task import Task

CONFIG = Train(
    steps=6, batch_size=16, learning_rate=1e-2, warmup_steps=2, ema_decay=0.9,
    compute_dtype="float32", log_every=1, validate_every=0, checkpoint_every=2, sample_every=0,
)


class Loader:
    """Endless batches that depend on a counter, which is the state."""

    def __init__(self, stop_after=None, size=16):
        self.count, self.stop_after, self.size = 0, stop_after, size

    def __next__(self):
        if self.count == self.stop_after:
            raise KeyboardInterrupt
        rng = np.random.default_rng(self.count)
        self.count += 1
        return {"x": rng.normal(size=(self.size, 8)).astype(np.float32)}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]

    def close(self):
        pass


def init(key):
    return {"layer": {"kernel": jax.random.normal(key, (8, 8)), "bias": jnp.zeros(8)}}


def loss(params, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    y = (batch["x"] + 0.1 * noise) @ params["layer"]["kernel"] + params["layer"]["bias"]
    return jnp.mean((y - batch["x"]) ** 2), {}


def task(loss=loss, **kwargs):
    return Task("toy", init, lambda b: b, loss, **kwargs)


def new_bytes(before):
    """Of arrays that are there besides those of before, each buffer once: it may have views."""
    old = {id(x) for x in before}
    return sum({
        x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if id(x) not in old
    }.values())


def one_device():
    return mesh_lib.make(devices=jax.devices()[:1])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
