"""Writes `cost.COUNTED`: parameters and FLOPs of every network that a name of the zoo stands for.

    python -m ldm_scaling.models.counted

Some minutes, after a change to what networks compute or to the zoo; a test says when it is due.
"""

from __future__ import annotations

import json

from ldm_scaling import files
from ldm_scaling.models import backbone, backbone_tables, cost, zoo


def networks() -> dict[str, backbone.Spec]:
    """Those of the zoo by name, and those that papers printed with a star, as in `zoo_table`."""
    printed = backbone_tables.PRINTED | backbone_tables.PRINTED_EDM2
    return {name: member.spec for name, member in zoo.MEMBERS.items()} | {
        f"{name}*": one.spec for name, one in printed.items()
    }


def main() -> None:
    """Counts all of them and writes the file."""
    from tqdm import tqdm

    rows, named = {}, networks()
    for name in tqdm(named, desc="counting", unit="network"):
        own = cost.count(named[name])
        row = {"name": name, "params": own.params, "gflops": own.gflops}
        rows.setdefault(cost.key(named[name]), row)  # Some have two names.
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    files.atomic_write_bytes(cost.COUNTED, f"{{\n{text}\n}}\n".encode())


if __name__ == "__main__":
    main()
