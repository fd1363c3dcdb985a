"""What a preparation kept, what it dropped and why, in numbers and in pictures."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_scaling import files
from ldm_scaling.data import shards
from ldm_scaling.data.preparing import facts as facts_lib
from ldm_scaling.data.preparing import sheets as prepare_sheets
from ldm_scaling.data.preparing import stored
from ldm_scaling.data.preparing.filters import KEPT, REASONS
from ldm_scaling.data.preparing.preparation import Preparation
from ldm_scaling.data.preparing.sheets import Picture

_EXAMPLES = 10  # keys shown for each reason
_SAMPLE, _LIKENESSES = 32, 8  # pictures on the sheets
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def gather(job: Preparation) -> dict[str, Any]:
    """The report of a preparation whose verdicts are there, as plain JSON."""
    names = list(REASONS)
    dropped = {name: {"count": 0, "why": why, "examples": []} for name, why in REASONS.items()}
    kept: collections.Counter[str] = collections.Counter()
    sizes: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    read = rows = 0
    broken = []
    for i in range(len(job.parts)):
        facts, verdict = job.facts(i), job.verdict(i)
        reason = verdict.reason
        broken += [facts.broken] if facts.broken else []
        read += len(np.unique(facts["pair"]))
        rows += len(facts)
        good = reason == KEPT
        kept.update(map(job.options.split, facts["group"][good]))
        for number in np.unique(reason[~good]).tolist():
            entry, chosen = dropped[names[number]], np.flatnonzero(reason == number)
            entry["count"] += len(chosen)
            for row in chosen[: _EXAMPLES - len(entry["examples"])].tolist():
                error = facts["error"][row]
                entry["examples"].append(facts["key"][row] + (f": {error}" if error else ""))
        width, height = facts["width"][good], facts["height"][good]
        lengths, owner = facts.caption_lengths()
        of_kept = good[owner] & job.options.filters.right(lengths)
        sizes["width"].append(width)
        sizes["height"].append(height)
        sizes["aspect (long / short)"].append(
            np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
        )
        captions = np.bincount(owner[of_kept], minlength=len(facts))
        others = [(row, text) for row, texts in verdict.others.items() for text in texts
                  if good[row]]  # fmt: skip
        for row, _ in others:
            captions[row] += 1
        more = np.array([len(text) for _, text in others], np.int64)
        sizes["captions of an image"].append(captions[good])
        sizes["characters of a caption"] += [lengths[of_kept], more]
    return {
        "source": job.collection.name,
        "read": read,
        "pieces": rows,
        "kept": {split: kept[split] for split in shards.SPLITS},
        "dropped": {name: entry for name, entry in dropped.items() if entry["count"]},
        "broken_parts": broken,
        "left_out": dict(getattr(job.collection, "left_out", dict)()),
        "percentiles": {name: _percentiles(values) for name, values in sizes.items()},
    }


def write(job: Preparation, report: dict[str, Any]) -> None:
    """Writes `report.json`, `report.md`, `sample.png` and, where there are any, `duplicates.png`.

    `duplicates.png` shows near-duplicates that were dropped beside what they look like.
    """
    files.write_json(job.path / "report.json", report)
    files.atomic_write_text(job.path / "report.md", text(report))
    title = f"{job.options.name}: {report['kept']['train']} pairs to train with"
    prepare_sheets.draw(job.path / "sample.png", title, [[p] for p in _sample(job)], columns=8)
    alike = _alike(job)
    if alike:
        title = f"{job.options.name}: near-duplicates, each beside what it was dropped for"
        prepare_sheets.draw(job.path / "duplicates.png", title, alike, columns=4)


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    kept = report["kept"]
    lines = [f"# {report['source']}", "", f"{report['read']} pairs were read."]
    if report["pieces"] != report["read"]:
        lines.append(f"They make {report['pieces']} tiles.")
    if report["broken_parts"]:
        lines.append(f"{len(report['broken_parts'])} parts could not be read and are left out:")
        lines += ["", *(f"- {why}" for why in report["broken_parts"])]
    if report["left_out"]:
        several = sorted(report["left_out"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in several)
        lines += ["", f"Files that are no pictures by their suffix are not read: {shown}."]
    lines += ["", *_table(["kept", "pairs"], [[split, kept[split]] for split in kept])]
    if report["dropped"]:
        rows = [
            [name, entry["count"], entry["why"], "; ".join(entry["examples"])]
            for name, entry in report["dropped"].items()
        ]
        lines += ["", *_table(["dropped", "pairs", "why", "examples"], rows)]
    head = ["of what is kept", *("least", "5%", "25%", "median", "75%", "95%", "most")]
    rows = [
        [name, *(f"{value:.6g}" for value in values)]
        for name, values in report["percentiles"].items() if values
    ]  # fmt: skip
    lines += ["", *_table(head, rows)]
    if report.get("seconds"):
        rates = report.get("per_second", {})
        rows = [[k, v, rates.get(k, "")] for k, v in report["seconds"].items()]
        lines += ["", *_table(["step", "seconds", "pairs/s"], rows)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        plain = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(plain)} |"

    return [line(head), f"|{'---|' * len(head)}", *map(line, rows)]


def _percentiles(values: list[np.ndarray]) -> list[float]:
    joined = np.concatenate(values)
    return np.percentile(joined, _PERCENTILES).tolist() if len(joined) else []


def _sample(job: Preparation) -> list[Picture]:
    """Records of the train split, evenly over its length."""
    written = [job.written(i) for i in range(len(job.parts))]
    chosen = [w["train"] for w in written if "train" in w]
    paths = [str(job.path / shard.file) for shard in chosen]
    records = shards.Records(paths, [len(shard) for shard in chosen])
    places = np.unique(np.linspace(0, len(records) - 1, _SAMPLE).round().astype(int))
    return [
        Picture(stored.decode(r.image).image_HWC, r.captions[0] if r.captions else f"({r.key})")
        for r in records.read(places)
    ]


def _alike(job: Preparation) -> list[list[Picture]]:
    """Near-duplicates and their keepers, read again from the collection."""
    number = list(REASONS).index("near-duplicate")
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for i in range(len(job.parts)):
        verdict = job.verdict(i)
        rows = np.flatnonzero(verdict.reason == number)[: _LIKENESSES - len(found)].tolist()
        found += [((i, row), tuple(verdict.keeper[row].tolist())) for row in rows]
    wanted = sorted({place for both in found for place in both})
    pictures = {}
    for i in sorted({part for part, _ in wanted}):
        facts = job.facts(i)
        rows = [row for part, row in wanted if part == i]
        by_pair = collections.defaultdict(list)
        for row in rows:
            by_pair[int(facts["pair"][row])].append(row)
        for pair, image in enumerate(facts_lib.iter_pairs(job.collection, job.parts[i])):
            for row in by_pair.pop(pair, ()):
                image_HWC = stored.decode(image.image).image_HWC
                width, height = int(facts["width"][row]), int(facts["height"][row])
                if tile := facts["tile"][row]:
                    y, x = map(int, tile[1:].split("_"))
                    image_HWC = image_HWC[y : y + height, x : x + width]
                label = f"{facts['key'][row]}, {width} x {height}"
                pictures[i, row] = (Picture(image_HWC, label), int(facts["perceptual"][row]))
            if not by_pair:
                break
    out = []
    for dropped, keeper in found:
        (left, a), (right, b) = pictures[dropped], pictures[keeper]
        bits = (a ^ b).bit_count()
        out.append(
            [
                Picture(left.image_HWC, f"dropped: {left.label}"),
                Picture(right.image_HWC, f"for: {right.label}; {bits} bits apart"),
            ]
        )
    return out
