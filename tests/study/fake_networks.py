"""Small networks in the place of published ones: random features of pictures and of captions."""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np

from ldm_scaling.metrics import catalog
from ldm_scaling.study import scores, weights
from ldm_scaling.study.extractors import EXTRACTORS, Extractor, Network, Words

_LAYERS = {"pool": 6, "logits_unbiased": 10, "projected": 4}
NAMES = ("inception_tf2015", "inception_clean", "clip_b32", "clip_l14_336")


def _network(name: str) -> Network:
    seed = list(name.encode())

    def run(images):
        """Of the means over a grid of 4 by 4."""
        seen = np.stack([
            np.stack([[part.mean((0, 1)) for part in np.array_split(row, 4, axis=1)]
                      for row in np.array_split(np.asarray(image, np.float64), 4)]).ravel()
            for image in images
        ]) / 255
        return {
            layer: np.tanh(
                seen @ np.random.default_rng([*seed, width]).normal(size=(seen.shape[1], width))
            ).astype(np.float32)
            for layer, width in _LAYERS.items()
        }

    return Network(run, lambda layer: f"{name} {layer}", lambda layer: f"{name}, {layer}")


def _words(path: pathlib.Path) -> Words:
    def sentence(texts):
        found = [np.random.default_rng(list(t.encode())).normal(size=4) for t in texts]
        return np.stack([x / np.linalg.norm(x) for x in found]).astype(np.float32)

    return Words(sentence, "words", 4)


@contextlib.contextmanager
def scores_of_ones_own(path: pathlib.Path) -> Iterator[None]:
    """Writes the plugin that docs/extending.md shows; what it registers is forgotten afterwards."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    *_, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path.write_text(example)
    with (mock.patch.dict(EXTRACTORS), mock.patch.dict(scores.SCORES),
          mock.patch.dict(catalog.METRICS), mock.patch.object(sys, "path", list(sys.path))):
        yield
    sys.modules.pop(path.stem, None)


@contextlib.contextmanager
def instead(folder: pathlib.Path) -> Iterator[None]:
    """Within it they take the published ones' places, and the folder has files of their names."""
    for name in ("inception", "clip_b32", "clip_l14_336"):
        (folder / weights.PUBLISHED[name].names[0]).touch()
    small = {
        name: Extractor(EXTRACTORS[name].weights, EXTRACTORS[name].resizer,
                        lambda path, name=name: _network(name), words=_words)
        for name in NAMES
    }
    with (mock.patch.dict(EXTRACTORS, small),
          mock.patch.dict("os.environ", {weights.VARIABLE: str(folder)})):
        yield
