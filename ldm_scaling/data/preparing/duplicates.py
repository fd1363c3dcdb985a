"""Images that are there more than once: with the same pixels, or looking the same.

The rule for both: an image goes if a better one is its duplicate. Better has more pixels or, of as
many, the smaller key. It does not matter whether the better one stays, so what becomes of an image
depends on its own duplicates alone, and not on an order of work: of A better than B better than C,
where A is like B and B like C, only A stays.

Equal pixels are told by a hash of the decoded pixels, not of the file: files of one image differ in
metadata and compression, and every image is decoded anyway. Looking the same is a small Hamming
distance of imagehash's 64-bit pHash. Pairs within `bits` of each other are found without comparing
all: cut into b bands, two such hashes agree in b - bits of them at least (pigeonhole), so each
choice of b - bits bands is a mask, and only hashes that are equal under some mask are compared.
More bands make more masks and smaller buckets; `masks` takes what suits the count.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from ldm_scaling.errors import UserError

MOST_BITS = 12


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Which duplicates are removed.

    Attributes:
      exact: whether those with the same pixels are.
      perceptual: bits in which the 64-bit hashes of two that look the same may differ, or None to
        keep them. Drawings on plain ground have near hashes without being alike: look at the
        report's sheet.
    """

    exact: bool = True
    perceptual: int | None = 4

    def __post_init__(self):
        if self.perceptual is not None and not 0 <= self.perceptual <= MOST_BITS:
            raise UserError(
                f"perceptual duplicates differ in 0..{MOST_BITS} bits of 64, not "
                f"{self.perceptual}; None keeps them"
            )


def first(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The best (lowest) rank in the group of each item, int64 [N]; groups are numbered from 0."""
    best = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(best, group, rank)
    return best[group]


def near(hashes: np.ndarray, rank: np.ndarray, bits: int) -> np.ndarray:
    """The best rank among each item and those within `bits` of it, int64 [N].

    Args:
      hashes: uint64 [N].
      rank: int64 [N], each once.
      bits: Hamming distance.
    """
    values, group = np.unique(hashes, return_inverse=True)
    own = np.full(len(values), np.iinfo(np.int64).max)
    np.minimum.at(own, group, rank)
    order = np.argsort(own)
    found = own.copy()
    better = nearest(values[order], bits, masks(bits, len(values)))
    has = better >= 0
    found[order[has]] = own[order[better[has]]]
    return np.minimum(found[group], rank)


def nearest(hashes: np.ndarray, bits: int, masks: list[int]) -> np.ndarray:
    """For each hash, the first before it that is within `bits` of it, or -1; int64 [N].

    Args:
      hashes: uint64 [N], different, the best first.
      bits: Hamming distance.
      masks: those under one of which any two near hashes are equal; [0] compares all with all.
    """
    count = len(hashes)
    found = np.full(count, count)
    for mask in masks:
        bucket = hashes & np.uint64(mask)
        order = np.argsort(bucket, kind="stable")  # in a bucket, the best first
        bucket, ordered = bucket[order], hashes[order]
        at = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1
        for back in itertools.count(1):  # compares each with that many places before it
            at = at[(at >= back)]
            at = at[bucket[at] == bucket[at - back]]
            if not at.size:
                break
            alike = at[np.bitwise_count(ordered[at] ^ ordered[at - back]) <= bits]
            np.minimum.at(found, order[alike], order[alike - back])
    return np.where(found == count, -1, found)


def masks(bits: int, count: int) -> list[int]:
    """Masks under one of which any two hashes within `bits` are equal, for `count` hashes.

    Of the numbers of bands the one with the fewest steps, were the hashes random: each mask costs
    a sort, and a comparison with each hash in a bucket.
    """
    if bits == 0:
        return []  # equal hashes are one value
    choices = range(bits + 1, bits + 9)

    def cost(bands: int) -> float:
        shared = 64 * (bands - bits) // bands
        return math.comb(bands, bits) * (40 + count / 2**shared)

    bands = min(choices, key=cost)
    edges = [round(64 * i / bands) for i in range(bands + 1)]
    pieces = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(pieces, bands - bits)]
