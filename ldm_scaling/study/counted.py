"""Writes `caching_cost.COUNTED`: FLOPs of training every network of the zoo.

    python -m ldm_scaling.study.counted

Some minutes, after a change to what networks compute, to their loss or to the zoo; a test says when
it is due.
"""

from __future__ import annotations

from ldm_scaling.models import counted, zoo
from ldm_scaling.study import caching_cost


def main() -> None:
    """Counts all of them and writes the file."""
    counted.write(
        caching_cost.COUNTED, {name: member.spec for name, member in zoo.MEMBERS.items()},
        lambda spec: {"train_gflops": caching_cost.count_train(spec)},
    )


if __name__ == "__main__":
    main()
