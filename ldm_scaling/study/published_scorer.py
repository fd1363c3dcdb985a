"""Metrics of published networks beside a sweep's own: FID, CLIP score and others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files
from ldm_scaling.metrics import bootstrap, catalog, foretold, moments
from ldm_scaling.metrics.frechet import ReferenceStats
from ldm_scaling.study import extractors, scores, weights
from ldm_scaling.study.extractors import EXTRACTORS, Network
from ldm_scaling.study.scorer import rounded
from ldm_scaling.study.scores import Row

# Where the folder of weights is named, for a config cannot know the machine's paths.
_BY = f"the variable {weights.VARIABLE}"
_FREE = ("the sweep's own",)


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
      towers: text towers by extractor.
    """

    rows: tuple[Row, ...]
    networks: Mapping[str, Network]
    widths: Mapping[tuple[str, str], int]
    references: Mapping[tuple[str, str], ReferenceStats]
    towers: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """Hash of all that decides a metric's value for given pictures."""
        by = [[row.name, self.networks[row.extractor].hash_of(row.layer)] for row in self.rows]
        return files.sha256_of([
            by, [r.hash for r in self.references.values()], [t.hash for t in self.towers.values()],
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
        return [tower.spec.projection for tower in self.towers.values()]

    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features of uint8 pictures, of all layers side by side: float32 (N, `width`)."""
        found = _run(self.networks, self.widths, images_NHWC)
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
          images: as in `Scorer.score`, of Fréchet distances.
        """
        layers = dict(zip(self.widths, _split(x_NF, list(self.widths.values()))))
        texts = dict(zip(self.towers, _split(embeddings_NE, self._text_widths)))
        values, intervals, replicates = {}, {}, {}
        for row in self.rows:
            key, definition = (row.extractor, row.layer), row.definition
            against = {
                "statistics": self.references.get(key), "captions": texts.get(row.extractor),
            }.get(definition.against)
            found = catalog.evaluate(
                [row.metric], {definition.needs: layers[key]}, {row.metric: against}, counts_RN
            )[row.metric]
            values[row.name] = found.value
            if counts_RN is None:
                continue
            raw_R = found.replicates_R
            if images and definition.against == "statistics":
                values[row.name] = foretold.foretold(
                    found.value, float(raw_R.mean()), len(x_NF), images, against
                )
            centred_R = bootstrap.centre(values[row.name], raw_R)
            ends = np.clip(bootstrap.percentile_interval(centred_R), *definition.range)
            intervals[row.name] = (float(ends[0]), float(ends[1]))
            replicates[row.name] = rounded(centred_R)
        return values, intervals, replicates


def load(
    names: Sequence[str], folder: epath.Path, real: Callable[[], Iterable[np.ndarray]]
) -> Published:
    """The networks of metrics, and statistics of real pictures.

    Args:
      names: as `scores.SCORES` has them.
      folder: where the statistics are kept; those that are there are not made anew.
      real: batches of real pictures, uint8 (B, H, W, 3); asked for where statistics are missing,
        once for all of them.
    Raises:
      UserError: for weights that are missing or damaged.
    """
    # In whatever order they are named, they are the same metrics.
    rows, found = tuple(sorted(scores.rows(names), key=lambda row: row.name)), require(names)
    networks, towers = {}, {}
    for row in rows:
        if row.extractor in networks:
            continue
        paths = [found[weight] for weight in row.weights]
        networks[row.extractor] = EXTRACTORS[row.extractor].load(*paths)
        if row.definition.against == "captions":
            towers[row.extractor] = extractors.text_tower(paths[0])
    layers = dict.fromkeys((row.extractor, row.layer) for row in rows)
    held = dict.fromkeys(
        (r.extractor, r.layer) for r in rows if r.definition.against == "statistics"
    )
    hashes = {key: networks[key[0]].hash_of(key[1]) for key in held}
    paths = {key: folder / f"{key[0]}_{hashes[key][:8]}.npz" for key in held}
    if missing := [key for key in held if not paths[key].exists()]:
        _keep_statistics(missing, networks, hashes, paths, real)
    black = _run(networks, layers, np.zeros((1, 64, 64, 3), np.uint8))
    return Published(
        rows, networks, {key: x_ND.shape[1] for key, x_ND in black.items()},
        {key: ReferenceStats(moments.load(paths[key], hashes[key]), hashes[key]) for key in held},
        towers,
    )


def _keep_statistics(
    keys: Sequence[tuple[str, str]], networks: Mapping[str, Network],
    hashes: Mapping[tuple[str, str], str], paths: Mapping[tuple[str, str], epath.Path],
    real: Callable[[], Iterable[np.ndarray]],
) -> None:
    """Statistics of all real pictures, a batch at a time: their features need not fit in memory."""
    sums: dict[tuple[str, str], moments.Moments] = {}
    for images in real():
        for key, x_ND in _run(networks, keys, images).items():
            part = moments.Moments.of(x_ND)
            sums[key] = moments.merge(sums[key], part) if key in sums else part
    for key, found in sums.items():
        moments.save(paths[key], found, hashes[key])


def _run(
    networks: Mapping[str, Network], layers: Iterable[tuple[str, str]], images_NHWC: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Features of each (extractor, layer); every network runs once."""
    layers = list(layers)
    found = {name: networks[name].run(images_NHWC) for name in dict.fromkeys(k[0] for k in layers)}
    return {(name, layer): found[name][layer] for name, layer in layers}


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

    def features(self, images_NHWC: np.ndarray, *real: np.ndarray) -> np.ndarray:
        """What `score` needs of pictures: the scorer's own, then the others."""
        return np.concatenate(
            [self.own.features(images_NHWC, *real), self.published.features(images_NHWC)],
            axis=1, dtype=np.float32,
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
