"""Random numbers of examples: keys of 64 bits, pure functions of what they are for.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"), on whole arrays: a generator object for every example would cost
more than the draws.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_of(*parts: object) -> int:
    """64 bits of a hash of the parts' texts."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def mixed(key: np.ndarray, value: np.ndarray | int) -> np.ndarray:
    """Keys that depend on every bit of `key` and of `value`, uint64, broadcast together."""
    with np.errstate(over="ignore"):  # numpy's scalars warn where its arrays wrap
        z = np.asarray(key, np.uint64) + (np.asarray(value, np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def keys(seed: int, source: int, epochs_B: np.ndarray, indices_B: np.ndarray) -> np.ndarray:
    """The keys of examples, uint64 (B,): of the seed, the source's number, its epoch, the index."""
    return mixed(mixed(np.uint64(seed_of("draws", seed, source)), epochs_B), indices_B)


def uniform(keys_B: np.ndarray, name: str) -> np.ndarray:
    """A number in [0, 1) for each key, float64 (B,); draws of different names are independent."""
    bits = mixed(keys_B, seed_of("draw", name))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(key: np.ndarray | int, name: str) -> np.random.Generator:
    """A generator of an example's own, for what takes many draws; those of different names and keys
    are independent streams of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"), whose 128 bits of key they are."""
    return np.random.Generator(
        np.random.Philox(key=np.array([np.uint64(key), seed_of("draw", name)], np.uint64))
    )
