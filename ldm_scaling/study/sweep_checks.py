"""What must hold of the metrics that a sweep names, before anything is computed."""

from __future__ import annotations

from ldm_scaling.config import Sweep
from ldm_scaling.config.check import require
from ldm_scaling.config.measuring import FRECHET, RESTORED
from ldm_scaling.study import evaluate_checks, scores


def check(key: str, sweep: Sweep, restored: bool = False) -> None:
    """Raises `UserError` for a metric that a sweep cannot measure, or not so.

    Args:
      key: of the sweep in the config.
      sweep: the grid.
      restored: whether it is of restored pictures, see `scores.unswept`.
    """
    for name in sweep.metrics:
        require(not restored or name not in RESTORED, f"{key}.metrics", name, "every record of "
                f"restored pictures has it: leave it out; {key}.choose_by may name it")
        if name in scores.GROUPS:
            require(False, f"{key}.metrics", name, "is a group: name its scores, of "
                    f"{', '.join(scores.GROUPS[name])}")
        if name not in scores.SCORES:
            known = [row.name for row in scores.rows(scores.SCORES)
                     if not scores.unswept(row, restored)]
            held = f"; every record has {', '.join(RESTORED)}" if restored else ""
            require(False, f"{key}.metrics", name, f"choose of {', '.join(known)}{held}")
        (row,) = scores.rows([name])
        why = scores.unswept(row, restored)
        require(not why, f"{key}.metrics", name, why)
        least = evaluate_checks.LEAST.get(row.metric, 1)
        if row.definition.against == "features":  # Replicates are of halves.
            least *= 2
        require(sweep.num_images >= least, f"{key}.num_images", sweep.num_images,
                f"at least {least} for {name}")
    require(restored or sweep.choose_by not in RESTORED or sweep.choose_by in sweep.metrics,
            f"{key}.choose_by", sweep.choose_by, "it is of restored pictures: choose "
            f"{FRECHET}, or one that {key}.metrics names")
    if sweep.strategy == "racing" and sweep.choose_by != FRECHET:
        (row,) = scores.rows([sweep.choose_by])
        raced = [FRECHET, *(one.name for one in scores.rows(sweep.metrics) if _races(one))]
        require(_races(row), f"{key}.choose_by", sweep.choose_by, "races are decided by a distance "
                "that pictures so far foretell for all: here "
                f"{', '.join(raced)}; or use sweep.strategy=grid")


def _races(row: scores.Row) -> bool:
    return row.definition.better == "lower" and bool(row.definition.count)
