"""What `ldm-scaling evaluate` says of scores: a table, and a record in JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from ldm_scaling import __version__, terminal
from ldm_scaling.metrics.compare import Comparison
from ldm_scaling.parallel import hosts
from ldm_scaling.study import scores
from ldm_scaling.study.evaluate import Options, Score, Task
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.statistics import multiple

FORMAT = 1
_FIRST = 3


def said(images: ImageSet) -> dict[str, Any]:
    """A set of images, for the record."""
    return {
        "path": str(images.folder.root), "count": len(images), "hash": images.list_hash,
        "sizes": images.describe_sizes(), "side": images.side,
    }


def record(
    task: Task, options: Options, about: dict[str, Any], found: Sequence[Score],
    versus: Sequence[Score] | None, differences: dict[str, Comparison],
) -> dict[str, Any]:
    """All of it, for a file of JSON."""
    real, holm = task.real, _holm(differences)
    return {
        "format": FORMAT,
        "version": __version__,
        "device": hosts.describe(),
        "generated": said(task.generated),
        "real": said(real) if isinstance(real, ImageSet) else real and {"path": str(real)},
        **about,
        "interval": {"level": options.level, "replicates": options.replicates,
                     "seed": options.seed, "method": "bootstrap over images, centred"},
        "scores": [one.plain() for one in found],
        **({"versus_scores": [one.plain() for one in versus]} if versus else {}),
        **({"differences": {k: dataclasses.asdict(v) | {"p_holm": holm[k]}
                            for k, v in differences.items()}} if differences else {}),
    }  # fmt: skip


def first_pairs(task: Task) -> list[list[str]]:
    """The names of the first images with their captions, said on stderr before hours are spent on
    wrong pairs."""
    pairs = [list(pair) for pair in zip(task.generated.folder.names[:_FIRST], task.captions)]
    more = len(task.captions) - len(pairs)
    said = "; ".join(f"{name}: {caption!r}" for name, caption in pairs)
    print(f"captions: {said}{f'; and {more:,} more' if more else ''}", file=sys.stderr)
    return pairs


def warn(about: dict[str, Any]) -> None:
    """Says on stderr which images were left out."""
    for key, what in (("skipped", "broken images"),
                      ("skipped_partners", "partners of broken images")):
        for folder, names in about.get(key, {}).items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            print(f"left out {len(names)} {what} of {folder}: {shown}", file=sys.stderr)


def _holm(differences: dict[str, Comparison]) -> dict[str, float]:
    """p-values adjusted for there being all of these."""
    adjusted = multiple.holm([one.p_value for one in differences.values()])
    return dict(zip(differences, map(float, adjusted)))


def _digits(value: float, sign: str = "") -> str:
    size = abs(value)
    digits = 2 if size >= 100 else 6 if 5e-7 < size < 0.01 else 4
    return f"{value:{sign}.{digits}f}"


def _span(interval: tuple[float, float] | None) -> str:
    return f"[{_digits(interval[0])}, {_digits(interval[1])}]" if interval else "-"


def show(
    task: Task, rows: Sequence[scores.Row], found: Sequence[Score], versus: Sequence[Score] | None,
    differences: dict[str, Comparison], about: dict[str, Any],
) -> None:
    """The table on stdout; what went with it on stderr."""
    warn(about)
    heads = ["score", "value", "95% interval", "n", "real n", "better"]
    if versus:
        heads[3:3] = ["versus", "difference", "its 95% interval", "p", "p (Holm)"]
    holm = _holm(differences)
    table = terminal.table(*heads, left=("better",))
    for i, one in enumerate(found):
        cells = [one.label, _digits(one.value), _span(one.interval)]
        if versus:
            d = differences.get(one.name)
            more = ["-"] * 4
            if d:
                p_values = [f"{p:.3g}" for p in (d.p_value, holm[one.name])]
                more = [_digits(d.difference, "+"), _span((d.low, d.high)), *p_values]
            cells += [_digits(versus[i].value), *more]
        real = "-" if one.reference_n is None else str(one.reference_n)
        table.add_row(*cells, str(one.n), real, one.better)
    console = terminal.console(None if sys.stdout.isatty() else 160)
    console.print(table)
    for features in dict.fromkeys(f"{one.features} ({one.extractor})" for one in found):
        console.print(f"features: {features}", soft_wrap=True)
    for row, one in zip(rows, found):
        parts = [one.remark, one.against if row.captioned else ""]
        if any(parts):
            text = "; ".join(filter(None, parts))
            console.print(f"{one.label}: {text}", soft_wrap=True)
    real, made = task.real, task.generated
    if made.side and any(min(size) < made.side for size in made.folder.sizes):
        console.print(
            f"Images of {made.describe_sizes()} were enlarged to {made.side}x{made.side}; a "
            "distance sees that too.", soft_wrap=True,
        )  # fmt: skip
    distances = [row for row in rows if row.definition.against in ("statistics", "features")]
    if distances and isinstance(real, ImageSet) and real.side is None:
        sizes = [images.describe_sizes() for images in (made, real)]
        if sizes[0] != sizes[1]:
            remedy = "" if "protocol" in about else " --side=N brings all to one size."
            console.print(
                f"The images are of different sizes, {sizes[0]} and {sizes[1]}; a distance sees "
                f"that too.{remedy}", soft_wrap=True,
            )  # fmt: skip
    print(terminal.text(console))
