"""Small collections in real formats, and what must hold for every reading of any of them."""

import io
import pickle

import numpy as np
from PIL import Image

from ldm_scaling.data import sources


def image(i, kind="PNG"):
    """A file of the image that is number i."""
    x = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, kind)
    return buffer.getvalue()


def read(text, **options):
    """All pairs, after a look at what every collection promises."""
    collection = sources.collection(text, sources.Options(**options))
    assert collection.name == text
    parts = collection.parts()
    pairs = [pair for part in parts for pair in collection.read(part)]
    copy = pickle.loads(pickle.dumps(collection))
    afresh = sources.collection(text, sources.Options(**options))
    for other in (copy, afresh):
        assert list(other.parts()) == list(parts)
        # In another order, as workers do.
        found = {part: list(other.read(part)) for part in reversed(parts)}
        assert [pair for part in parts for pair in found[part]] == pairs
        assert other.fingerprint() == collection.fingerprint()
    names, keys = [part.name for part in parts], [pair.key for pair in pairs]
    assert len(set(names)) == len(names) and len(set(keys)) == len(keys)
    for pair in pairs:
        assert bool(pair.image) != bool(pair.error), pair
        assert "\n" not in pair.error
        pair.error.encode(), pair.key.encode(), [c.encode() for c in pair.captions]
        assert all(c and c == c.strip() for c in pair.captions)
    return pairs


def plain(pairs):
    """Key to captions, or to the error."""
    return {pair.key: pair.error or pair.captions for pair in pairs}
