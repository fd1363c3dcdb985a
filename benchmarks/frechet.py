"""Our Fréchet distance against the two ways of the field, on the same statistics, interleaved.

    python benchmarks/frechet.py [--width=2048 --images=10000 --few=512 --repeats=5 --threads=1]

scipy's `sqrtm` of C1 C2 is pytorch-fid's and clean-fid's way, `eigvals` of it torch-fidelity's and
torchmetrics'. Ours runs its decompositions in one thread whatever `--threads` is: of a matrix this
small several threads gain little and lose much on a shared machine. Without `--threads` the peers
use all, as they do when called. Besides seconds on the wall it prints seconds of processor time,
which other programs on the machine do not disturb. Needs numpy and scipy only, and mpmath for the
50-digit truth.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import mpmath
import numpy as np
import scipy.linalg
import threadpoolctl

from ldm_scaling.metrics.frechet import (
    ReferenceStats,
    frechet_distance,
    frechet_from_features,
    frechet_from_moments,
)
from ldm_scaling.metrics.moments import Moments


def _by_sqrtm(a: Moments, b: Moments) -> float:
    c1, c2 = a.covariance(), b.covariance()
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(np.sum((a.mean_D - b.mean_D) ** 2) + np.trace(c1 + c2) - 2 * np.trace(root).real)


def _by_eigvals(a: Moments, b: Moments) -> float:
    c1, c2 = a.covariance(), b.covariance()
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(np.complex128)).real.sum()
    return float(np.sum((a.mean_D - b.mean_D) ** 2) + np.trace(c1 + c2) - 2 * root)


def _in_50_digits(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """The distance of these features, by symmetric eigenvalue problems in 50 digits."""
    mpmath.mp.dps = 50
    means, covariances = [], []
    for features in (x_ND, y_MD):
        x = mpmath.matrix(features.tolist())
        mean = mpmath.ones(1, x.rows) * x / x.rows
        x -= mpmath.ones(x.rows, 1) * mean
        means.append(mean)
        covariances.append(x.T * x / (x.rows - 1))
    c1, c2 = covariances
    values, vectors = mpmath.eigsy(c1)
    root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
    inner = mpmath.eigsy(root * c2 * root, eigvals_only=True)
    overlap = sum(mpmath.sqrt(max(v, 0)) for v in inner)
    delta = sum((p - q) ** 2 for p, q in zip(*means))
    return float(delta + sum(c1[i, i] + c2[i, i] for i in range(c1.rows)) - 2 * overlap)


def _features(rng: np.random.Generator, n: int, d: int, power: float) -> np.ndarray:
    """Positive, skewed, correlated, with a falling spectrum: as means after a ReLU are."""
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    return np.exp(0.3 * (rng.normal(size=(n, d)) * np.arange(1, d + 1.0) ** -power) @ mix)


def _commuting(d: int, power: float) -> tuple[Moments, Moments, float]:
    """Two covariances of common eigenvectors and the distance, known by its formula."""
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
    s1, s2 = np.arange(1, d + 1.0) ** -power, 1.3 * np.arange(1, d + 1.0) ** -(power + 0.2)
    pair = []
    for s in (s1, s2):
        c = (q * s) @ q.T
        pair.append(Moments(1001, np.zeros(d), (c + c.T) / 2 * 1000))
    return *pair, float(np.sum((np.sqrt(s1) - np.sqrt(s2)) ** 2))


WAYS = {"ldm_scaling": frechet_distance, "scipy sqrtm": _by_sqrtm, "eigvals": _by_eigvals}


def _accuracy() -> None:
    rng = np.random.default_rng(2)
    print("relative error; truth in 50 digits (40 dimensions) or by formula")
    cases = {"n > d": (120, 150), "n < d": (25, 150), "n < d, both": (25, 30)}
    rows = {}
    for name, sizes in cases.items():
        x, y = (_features(rng, n, 40, p) for n, p in zip(sizes, (0.5, 0.4)))
        rows[f"{name} {sizes}"] = (Moments.of(x), Moments.of(y), _in_50_digits(x, y))
    for power in (1.0, 4.0):
        rows[f"formula, d = 512, k^-{power:g}"] = _commuting(512, power)
    for name, (a, b, truth) in rows.items():
        errors = (f"{way} {abs(f(a, b) / truth - 1):.0e}" for way, f in WAYS.items())
        print(f"  {name:28s}", "  ".join(errors))


def _race(title: str, runs: dict, repeats: int, threads: int | None) -> None:
    limit = threadpoolctl.threadpool_limits(threads) if threads else contextlib.nullcontext()
    wall, used, values = ({name: [] for name in runs} for _ in range(3))
    with limit:
        for _ in range(repeats):
            for name, run in runs.items():
                start, cpu = time.perf_counter(), time.process_time()
                values[name] = run()
                wall[name].append(time.perf_counter() - start)
                used[name].append(time.process_time() - cpu)
    print(title)
    ours, *others = runs
    for name in runs:
        low, middle, high = statistics.quantiles(wall[name], n=4)
        print(f"  {name:12s} median {middle:8.2f} s  quartiles {low:.2f} to {high:.2f}  "
              f"processor {statistics.median(used[name]):8.2f} s  value {values[name]:.9g}")
    for name in others:
        assert abs(values[name] / values[ours] - 1) < 1e-5, f"{name} differs"
        ratios = [statistics.median(t[name]) / statistics.median(t[ours]) for t in (wall, used)]
        print(f"  {name} / ours: {ratios[0]:.1f} on the wall, {ratios[1]:.1f} of the processor")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    _accuracy()

    rng = np.random.default_rng(0)
    x = _features(rng, args.images, args.width, 0.3)
    y = _features(rng, args.images, args.width, 0.25)
    a, b = Moments.of(x), Moments.of(y)
    how = f"peers' threads: {args.threads or 'all'}"
    runs = {name: lambda f=f: f(a, b) for name, f in WAYS.items()}
    title = f"statistics of {args.images} images each, {args.width} dimensions, {how}"
    _race(title, runs, args.repeats, args.threads)

    reference = ReferenceStats(b, "net")
    reference.root_DR  # noqa: B018  Once for all comparisons with it.
    peers = list(WAYS.items())[1:]
    runs = {"ldm_scaling": lambda: frechet_from_moments(a, reference)}
    runs |= {name: lambda f=f: f(a, b) for name, f in peers}
    title = f"statistics of {args.images} images against a prepared reference, {how}"
    _race(title, runs, args.repeats, args.threads)

    for n in (args.images, args.few):
        some = x[:n]
        runs = {"ldm_scaling": lambda some=some: frechet_from_features(some, reference)}
        runs |= {name: lambda f=f, some=some: f(Moments.of(some), b) for name, f in peers}
        title = f"{n} images' features against a prepared reference, {how}"
        _race(title, runs, args.repeats, args.threads)


if __name__ == "__main__":
    main()
