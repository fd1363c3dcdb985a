"""Writes `cost.COUNTED`: parameters and FLOPs of every network that a name of the zoo stands for.

    python -m ldm_scaling.models.counted

Some minutes, after a change to what networks compute or to the zoo; a test says when it is due.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ldm_scaling import files
from ldm_scaling.models import backbone, backbone_tables, cost, zoo


def networks() -> dict[str, backbone.Spec]:
    """Those of the zoo by name, and those that papers printed with a star, as in `zoo_table`."""
    printed = backbone_tables.PRINTED | backbone_tables.PRINTED_EDM2
    return {name: member.spec for name, member in zoo.MEMBERS.items()} | {
        f"{name}*": one.spec for name, one in printed.items()
    }


def write(
    path: pathlib.Path, named: Mapping[str, backbone.Spec],
    count: Callable[[backbone.Spec], dict[str, Any]],
) -> None:
    """Counts networks and writes what `cost.kept` finds."""
    from tqdm import tqdm

    rows: dict[str, dict[str, Any]] = {}
    for name in tqdm(named, desc="counting", unit="network"):
        key = cost.key(named[name])
        if key not in rows:  # Some have two names.
            rows[key] = {"name": name, **count(named[name])}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    files.atomic_write_bytes(path, f"{{\n{text}\n}}\n".encode())


def main() -> None:
    """Counts all of them and writes the file."""
    write(cost.COUNTED, networks(), lambda spec: dataclasses.asdict(cost.count(spec)))


if __name__ == "__main__":
    main()
