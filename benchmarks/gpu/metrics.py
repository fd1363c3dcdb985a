"""Inception, CLIP and a whole FID on one GPU, against torch-fidelity, open_clip or transformers.

    python benchmarks/gpu/metrics.py --to=runs/gpu [--no-peer]
    python benchmarks/gpu/metrics.py --toy --to=/tmp/toy

The networks are those of benchmarks/metrics.py, both sides on the GPU in float32, uint8 pictures or
tokens on the host to features on the host. A FID is Inception's features of `--images` pictures of
256 px and the distance to prepared statistics, which torch-fidelity works out by numpy's
eigenvalues. Without torch-fidelity ours runs alone, on random weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import bench
import jax
import numpy as np
from bench import Book, Piece

from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.models import inception

# Pictures a call, and what features are compared by.
CALL, TOY_CALL = 512, 2
WIDTH = inception.LAYERS["pool"]


def networks() -> Any:
    """benchmarks/metrics.py, which imports torch."""
    path = bench.ROOT / "benchmarks" / "metrics.py"
    spec = importlib.util.spec_from_file_location("networks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(batch: int) -> inception.FeatureNetwork:
    """Our Inception with random weights, as `inception.load` makes it of a file."""
    side = inception.SIDE
    picture = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(inception.Inception().init, jax.random.key(0), picture)["params"]
    rng = np.random.default_rng(0)

    def one(shape):
        scale = 1 / np.sqrt(max(1, np.prod(shape.shape[:-1])))
        return (scale * rng.standard_normal(shape.shape)).astype(np.float32)

    device = jax.local_devices()[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return inception.FeatureNetwork(
        convention="fid_tf2015", batch=batch, weights_hash="random", published=False,
        params=jax.device_put(jax.tree.map(one, shapes), place),
        sharding=place.update(spec=jax.sharding.PartitionSpec("data")),
    )


def pictures(count: int, side: int) -> np.ndarray:
    """Random ones, uint8."""
    shape = (count, side, side, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def compared(what: str, packages: tuple[str, ...], args: Any, book: Book) -> dict[str, Any]:
    """A network of ours and its peer in turns, parity first; the first package that is here."""
    count = TOY_CALL if args.toy else CALL
    found = [(p, bench.no_peer(args, p)) for p in packages]
    peer = next((p for p, why in found if why is None), None)
    if peer is None:
        out = {"why": found[0][1]}
        if what == "inception":
            network, images = alone(count), pictures(count, 64 if args.toy else 256)
            runs = {"ours": lambda: network.features(images)["pool"]}
            out["ours"] = count / bench.interleaved(runs, args.toy)["ours"]["median"]
        return out
    kind, _, tower = what.partition(" ")
    given = argparse.Namespace(
        what=kind, images=count, side=64 if args.toy else 256, resizer="fid_tf2015", net="alex",
        tower=tower, peer=peer, batch=count,
    )
    name, ours, theirs, limit = networks().RUNS[kind](given)
    error = bench.relative(ours(), theirs())
    limit = limit if args.toy else 5e-3
    runs = {"ours": ours, "theirs": theirs}
    if not args.toy:
        # PyTorch's convolutions are in TF32 unless told otherwise, ours in float32.
        runs |= {"theirs": exactly(theirs, False), "theirs_tf32": exactly(theirs, True)}
    turns = bench.interleaved(runs, args.toy, args.window)
    rates = {side: count / one["median"] for side, one in turns.items()}
    return {
        "error": bench.check(what, error, limit), "peer": name, **rates,
        "ratio": rates["ours"] / rates["theirs"],
    }


def exactly(run: Callable[[], Any], tf32: bool) -> Callable[[], Any]:
    """A run of PyTorch with its convolutions in TF32 or in float32."""
    import torch

    def one() -> Any:
        torch.backends.cudnn.allow_tf32 = tf32
        return run()

    return one


def fid(args: Any, book: Book) -> dict[str, Any]:
    """Seconds of a whole FID, features and distance apart."""
    count, call = (8, TOY_CALL) if args.toy else (args.images, CALL)
    images = pictures(call, 64 if args.toy else 256)
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((WIDTH, WIDTH)) * np.arange(1, WIDTH + 1.0) ** -0.7
    sets = [rng.standard_normal((max(count, 16), WIDTH)) @ mix for _ in range(2)]
    reference = ReferenceStats(Moments.of(sets[0]), "random")
    _ = reference.root_DR
    why = bench.no_peer(args, "torch_fidelity")
    if why is None:
        module = networks()
        given = argparse.Namespace(images=call, side=images.shape[1], resizer="fid_tf2015",
                                   batch=call)
        _, ours, theirs, _ = module.run_inception(given)
    else:
        network = alone(call)
        ours = functools.partial(network.features, images)

    def seconds(run) -> float:
        run()
        with bench.turn():
            start = time.perf_counter()
            for _ in range(-(-count // call)):
                run()
            return time.perf_counter() - start

    def distance(run) -> tuple[float, float]:
        with bench.turn():
            start = time.perf_counter()
            value = run()
            return time.perf_counter() - start, value

    own, value = distance(lambda: frechet_from_features(sets[1], reference))
    out = {"images": count, "why": why, "features": seconds(ours), "distance": own}
    if why is None:
        metric = importlib.import_module("torch_fidelity.metric_fid")
        left, right = (
            {"mu": s.mean(0), "sigma": np.cov(s, rowvar=False)} for s in (sets[1], sets[0])
        )
        there, wanted = distance(
            lambda: metric.fid_statistics_to_metric(left, right, verbose=False)
        )
        wanted = float(next(iter(wanted.values())))
        # With fewer images than features the peer's root of a singular product has eight digits.
        bench.check("the distance", abs(value / wanted - 1), 1e-3)
        out |= {"features_theirs": seconds(theirs), "distance_theirs": there}
        out["ratio"] = (out["features_theirs"] + there) / (out["features"] + own)
    return out


def pieces(args: Any) -> list[Piece]:
    """In order."""
    clip = ("open_clip", "transformers")
    return [
        Piece(name.replace(" ", "_"), functools.partial(compared, name, packages, args), 2.5)
        for name, packages in (
            ("inception", ("torch_fidelity",)), ("clip image", clip), ("clip text", clip)
        )
    ] + [Piece("fid", functools.partial(fid, args), 3.0)]


def table(book: Book) -> list[list[str]]:
    """What there is."""
    rows = [["", "ours, a second", "theirs", "ours / theirs", "peer"]]
    for name, r in book.all().items():
        if name == "fid":
            whole = r["features"] + r["distance"]
            theirs = r["features_theirs"] + r["distance_theirs"] if "ratio" in r else None
            rows.append([
                f"FID of {r['images']}, s", bench.number(whole), bench.number(theirs),
                bench.number(r.get("ratio")), r["why"] or "torch_fidelity",
            ])
        else:
            rows.append([
                name, *(bench.number(r.get(k)) for k in ("ours", "theirs", "ratio")),
                r.get("peer") or r["why"],
            ])
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--images", type=int, default=10_240, help="of a FID")
    args = parser.parse_args(argv)
    return bench.main(__file__, args, pieces(args), table)


if __name__ == "__main__":
    sys.exit(main())
