"""Metrics of published networks beside a sweep's own: FID, CLIP score and others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.metrics import arrays, bootstrap, catalog, foretold, moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.study import extractors, scores, weights
from ldm_scaling.study.extractors import EXTRACTORS, Network, Words
from ldm_scaling.study.scorer import rounded
from ldm_scaling.study.scores import Row

# Where the folder of weights is named, for a config cannot know the machine's paths.
_BY = f"the variable {weights.VARIABLE}"
_FREE = ("the sweep's own",)

MOST_REAL = 5_000
"""Real pictures, at most, whose features are kept where drawn ones are held against features: as
many of all at random."""

_KIND = "features of real pictures"
_SEED = 20270101

# Of an extractor and its layer.
_Key = tuple[str, str]


def require(names: Sequence[str]) -> dict[str, Path]:
    """The paths of the weights that metrics need, by their names in `weights.PUBLISHED`.

    Raises `UserError` naming every file that is missing, where to get it and where to put it.
    """
    needed = scores.needed(scores.rows(names))
    return weights.require(weights.folder(None), needed, _FREE, _BY)


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """Networks, and what is known of the real pictures.

    Attributes:
      rows: the metrics.
      networks: by extractor.
      widths: how many features each (extractor, layer) gives, in their order in `features`.
      references: statistics of real pictures, by (extractor, layer).
      real: features (M, D) of `MOST_REAL` of them or all, float32, by (extractor, layer).
      towers: what embeds captions, by extractor.
    """

    rows: tuple[Row, ...]
    networks: Mapping[str, Network]
    widths: Mapping[_Key, int]
    references: Mapping[_Key, ReferenceStats]
    real: Mapping[_Key, np.ndarray]
    towers: Mapping[str, Words]

    @functools.cached_property
    def hash(self) -> str:
        """Hash of all that decides a metric's value for given pictures."""
        by = [[row.name, self.networks[row.extractor].hash_of(row.layer)] for row in self.rows]
        return files.sha256_of([
            by, [r.hash for r in self.references.values()], [t.hash for t in self.towers.values()],
            *(files.sha256_of(x_MD.tobytes()) for x_MD in self.real.values()),
        ])

    @property
    def width(self) -> int:
        """Columns of `features`."""
        return sum(self.widths.values())

    @property
    def text_width(self) -> int:
        """Columns of `embeddings`."""
        return sum(self._text_widths)

    @property
    def _text_widths(self) -> list[int]:
        return [tower.width for tower in self.towers.values()]

    def features(
        self, images_NHWC: np.ndarray, *real: np.ndarray, captions: Sequence[str] = ()
    ) -> np.ndarray:
        """Features of uint8 pictures, of all layers side by side: float32 (N, `width`). Captions
        and real pictures, one of each drawn one, are for networks that see both."""
        found = _run(self.networks, self.widths, images_NHWC, *real, captions=captions)
        return np.concatenate([found[key] for key in self.widths], axis=1, dtype=np.float32)

    def embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """What `score` needs of captions, of all towers side by side: float32 (N, `text_width`)."""
        found = [tower.sentence(list(captions)) for tower in self.towers.values()]
        return np.concatenate([np.zeros((len(captions), 0), np.float32), *found], axis=1)

    def score(
        self, x_NF: np.ndarray, embeddings_NE: np.ndarray, counts_RN: np.ndarray | None,
        images: int = 0,
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]], dict[str, list[float]]]:
        """(metrics, intervals, replicates) as of `Scorer.score`; the latter two are empty where
        `counts_RN` is None.

        Args:
          x_NF: of `features`.
          embeddings_NE: of `embeddings`.
          counts_RN: of `bootstrap.resample_counts`, or None.
          images: as in `Scorer.score`. What cannot be foretold for more than there are is left out.
        """
        layers = dict(zip(self.widths, _split(x_NF, list(self.widths.values()))))
        texts = dict(zip(self.towers, _split(embeddings_NE, self._text_widths)))
        images = images or len(x_NF)
        rows = [row for row in self.rows if images == len(x_NF) or row.definition.count]
        found = {}
        for key, x_ND in layers.items():
            held = {
                "statistics": self.references.get(key), "features": self.real.get(key),
                "captions": texts.get(key[0]),
            }
            own = {row.metric: row.definition for row in rows if _key(row) == key}
            scored = catalog.evaluate(
                list(own), {one.needs: x_ND for one in own.values()},
                {name: held.get(one.against) for name, one in own.items()}, counts_RN,
            )
            found |= {(key, name): score for name, score in scored.items()}
        values, intervals, replicates = {}, {}, {}
        for row in rows:
            score, definition = found[_key(row), row.metric], row.definition
            values[row.name] = score.value
            if counts_RN is None:
                continue
            raw_R = score.replicates_R
            told = (score.value, float(raw_R.mean()), len(x_NF), images)
            if definition.count == "frechet":
                values[row.name] = foretold.foretold(*told, self.references[_key(row)])
            elif definition.count == "inverse":
                values[row.name] = foretold.inverse(*told)
            centred_R = bootstrap.centre(values[row.name], raw_R)
            ends = bootstrap.interval(centred_R, len(x_NF) - 1)
            intervals[row.name] = definition.within(ends, foretold=images != len(x_NF))
            replicates[row.name] = rounded(centred_R)
        return values, intervals, replicates


def load(
    names: Sequence[str], folder: epath.Path, real: Callable[[], Iterable[np.ndarray]]
) -> Published:
    """The networks of metrics, and statistics and features of real pictures.

    Args:
      names: as `scores.SCORES` has them.
      folder: where statistics and features are kept; those that are there are not made anew.
      real: batches of real pictures, uint8 (B, H, W, 3); asked for where some are missing, once for
        all of them.
    Raises:
      UserError: for weights that are missing or damaged, and a layer that a network lacks.
    """
    # In whatever order they are named, they are the same metrics.
    rows, found = tuple(sorted(scores.rows(names), key=lambda row: row.name)), require(names)
    networks, towers = {}, {}
    for row in rows:
        if row.extractor in networks:
            continue
        paths = [found[weight] for weight in row.weights]
        networks[row.extractor] = extractors.load(row.extractor, found)
        if row.definition.against == "captions":
            towers[row.extractor] = EXTRACTORS[row.extractor].words(*paths)
    image = np.zeros((1, 64, 64, 3), np.uint8)
    black = _run(networks, dict.fromkeys(map(_key, rows)), image, image, captions=("black",))
    hashes = {key: networks[key[0]].hash_of(key[1]) for key in black}

    def held(against: str, end: str) -> dict[_Key, epath.Path]:
        keys = dict.fromkeys(_key(row) for row in rows if row.definition.against == against)
        return {key: folder / f"{key[0]}_{hashes[key][:8]}{end}.npz" for key in keys}

    statistics, features = held("statistics", ""), held("features", f"_{MOST_REAL}")
    lacking = [
        {key: path for key, path in some.items() if not path.exists()}
        for some in (statistics, features)
    ]
    if any(lacking):
        _keep(*lacking, networks, hashes, real)
    return Published(
        rows, networks, {key: x_ND.shape[1] for key, x_ND in black.items()},
        {key: ReferenceStats(moments.load(path, hashes[key]), hashes[key])
         for key, path in statistics.items()},
        {key: _kept(path, hashes[key]) for key, path in features.items()},
        towers,
    )


def kept(names: Sequence[str], folder: epath.Path) -> bool:
    """Whether `load` finds statistics and features of real pictures for every metric; of which
    version of a network they are takes the network and is not asked."""
    ends = {"statistics": "", "features": f"_{MOST_REAL}"}
    rows = scores.rows(names) if names else ()
    wanted = {(row.extractor, ends[row.definition.against]) for row in rows
              if row.definition.against in ends}
    return all(any(folder.glob(f"{name}_????????{end}.npz")) for name, end in wanted)


def _key(row: Row) -> _Key:
    return row.extractor, row.layer


def _keep(
    statistics: Mapping[_Key, epath.Path], features: Mapping[_Key, epath.Path],
    networks: Mapping[str, Network], hashes: Mapping[_Key, str],
    real: Callable[[], Iterable[np.ndarray]],
) -> None:
    """Statistics of all real pictures, a batch at a time: their features need not fit in memory.
    And the features of `MOST_REAL` of them, the same for all layers, each as likely as another."""
    sums: dict[_Key, moments.Moments] = {}
    kept: dict[_Key, list[np.ndarray]] = {key: [] for key in features}
    rng, count = np.random.default_rng(_SEED), 0
    for images in real():
        found = _run(networks, [*statistics, *features], images)
        for key in statistics:
            part = moments.Moments.of(found[key])
            sums[key] = moments.merge(sums[key], part) if key in sums else part
        for i in range(len(images)):
            place = count if count < MOST_REAL else int(rng.integers(count + 1))
            count += 1
            for key, rows in kept.items():
                if place < MOST_REAL:
                    rows[place : place + 1] = [found[key][i].astype(np.float32)]
    for key, path in statistics.items():
        moments.save(path, sums[key], hashes[key])
    for key, path in features.items():
        arrays.save(path, _KIND, {"features_MD": np.stack(kept[key])}, {"extractor": hashes[key]})


def _kept(path: epath.Path, extractor: str) -> np.ndarray:
    """Features that `_keep` wrote."""
    return arrays.load_of(path, _KIND, extractor)[0]["features_MD"]


def _run(
    networks: Mapping[str, Network], layers: Iterable[_Key], images_NHWC: np.ndarray,
    *real: np.ndarray, captions: Sequence[str] = (),
) -> dict[_Key, np.ndarray]:
    """Features of each (extractor, layer); every network runs once."""
    out: dict[_Key, np.ndarray] = {}
    found: dict[str, Mapping[str, np.ndarray]] = {}
    for name, layer in layers:
        if name not in found:
            taken = {
                "images": lambda: images_NHWC,
                "pairs": lambda: np.stack([images_NHWC, *real], axis=1),
                "captions": lambda: list(zip(images_NHWC, captions, strict=True)),
            }[EXTRACTORS[name].takes]
            found[name] = networks[name].run(taken())
        out[name, layer] = extractors.layer_of(found[name], layer, name)
    return out


def _split(x_NF: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    return np.split(x_NF, np.cumsum(widths)[:-1], axis=1) if widths else []


@dataclasses.dataclass(frozen=True, eq=False)
class WithPublished:
    """A scorer, and metrics of published networks beside its own.

    Attributes:
      own: a `Scorer` or `PairedScorer`.
      published: the others.
    """

    own: Any
    published: Published

    @property
    def probe(self) -> Any:
        """The caption probe of `Scorer`."""
        return self.own.probe

    @property
    def hash(self) -> str:
        """Hash of all that decides a metric's value for given pictures."""
        return files.sha256_of([self.own.hash, self.published.hash])

    def features(
        self, images_NHWC: np.ndarray, *real: np.ndarray, captions: Sequence[str] = ()
    ) -> np.ndarray:
        """What `score` needs of pictures: the scorer's own, then the others."""
        others = self.published.features(images_NHWC, *real, captions=captions)
        return np.concatenate(
            [self.own.features(images_NHWC, *real), others], axis=1, dtype=np.float32
        )

    def score(
        self, x_NF: np.ndarray, embeddings_NE: np.ndarray, seed: int | None, images: int = 0
    ):
        """See `Scorer.score`; embeddings of captions are the scorer's own, then the others."""
        width = x_NF.shape[1] - self.published.width
        texts = embeddings_NE.shape[1] - self.published.text_width
        metrics, intervals, replicates = self.own.score(
            x_NF[:, :width], embeddings_NE[:, :texts], seed, images
        )
        counts_RN = None if seed is None else bootstrap.resample_counts(
            len(x_NF), self.own.replicates, seed
        )
        more = self.published.score(x_NF[:, width:], embeddings_NE[:, texts:], counts_RN, images)
        return tuple(a | b for a, b in zip((metrics, intervals, replicates), more))
