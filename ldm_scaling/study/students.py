"""How students compare with their teachers in as many steps, in words: better, worse, or not to be
told apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, repeated
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.records import DISTILLED, TEXT_TO_IMAGE, Record
from ldm_scaling.study.statistics import blocks, duels, words

EVEN = "trailing"
"""The spacing that begins at the last timestep, where few steps do not flatter students."""


def teacher(samplers: Iterable[str], students: Iterable[Record], spacing: str = "") -> str | None:
    """The sampler of teachers that students are held against: DDIM before others; of one that was
    measured with several timestep spacings the students' own, else `spacing`, else `EVEN`.

    Args:
      samplers: that teachers have curves of, by their arms' names, see `curves.arms`.
      students: records of a task of distillation.
      spacing: that the study measures teachers with, where it is known.
    """
    preferred = [*sorted({r.identity.spacing for r in students}), spacing, EVEN]

    def order(sampler: str) -> tuple[bool, int, str]:
        name, _, own = sampler.partition(", ")
        place = preferred.index(own) if own in preferred else len(preferred)
        return name != "ddim", place, sampler

    return min(samplers, key=order, default=None)


def sentences(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int],
    spacing: str = "",
) -> list[str]:
    """One for every member and task of distillation, over all numbers of steps that both were
    measured at: of halving the students' own alone.

    Args:
      records: of members and of their students, of one study.
      metric: what they are compared by.
      select_block, report_blocks: that choose the guidance, and are reported.
      spacing: see `teacher`.
    """
    pooled = blocks.pooled(repeated.first_runs(records), select_block, report_blocks)
    own = [r for r in pooled if r.task == TEXT_TO_IMAGE and metric in r.metrics]
    teachers = _curves(curves_lib.longest(own), metric, (select_block, report_blocks[0]))
    out = []
    for task in DISTILLED:
        found = [r for r in pooled if r.task == task and metric in r.metrics]
        found = curves_lib.longest(found)
        if not (found and teachers):
            continue
        own_blocks = curves_lib.own_blocks(found, select_block, report_blocks[0])
        students = _curves(
            [r for r in found if r.student_steps in (0, r.identity.steps)], metric, own_blocks)
        out += [
            _sentence(task, model, _pairs(students, teachers, model, found, spacing), metric)
            for model in curves_lib.models(found)
        ]
    return out


def _curves(records: Sequence[Record], metric: str, its_blocks: tuple[int, int]) -> Curves:
    return curves_lib.quality_curves(curves_lib.distinct(records), metric, None, *its_blocks)


def _pairs(
    students: Curves, teachers: Curves, model: str, records: Sequence[Record], spacing: str
) -> list[tuple[Point, Point]]:
    """Students and their teacher in as many steps, see `teacher`."""
    name = teacher((s for m, s in teachers if m == model), records, spacing)
    there = {p.steps: p for p in teachers.get((model, name), ())}
    same = [p for (m, _), curve in students.items() if m == model for p in curve
            if p.steps in there]
    return [(p, there[p.steps]) for p in sorted(same, key=lambda p: p.steps)]


def _sentence(
    task: str, model: str, pairs: Sequence[tuple[Point, Point]], metric: str
) -> str:
    if not pairs:
        return (
            f"{labels.task(task)}: students of {model} and their teacher were measured at no "
            "number of steps in common, so that nothing is said of which is better."
        )
    sampler = labels.sampler(pairs[0][1].sampler)
    parts = [_part(student, teacher, metric) for student, teacher in pairs]
    return (
        f"{labels.task(task)}: against its teacher in as many steps of {sampler}, the student of "
        f"{model} reaches {'; '.join(parts)}."
    )


def _part(student: Point, teacher: Point, metric: str) -> str:
    short, sign = labels.measure(metric).short, labels.measure(metric).sign
    sure, how = "", "better" if sign * student.value < sign * teacher.value else "worse"
    if student.replicates_R.size and teacher.replicates_R.size:
        chance = duels.between(student, teacher, metric, student.cost, "cost").probability
        sure = f" ({words.sure(max(chance, 1 - chance))})"
        if words.judge(chance) == "undecided":
            how += ", which the replicates leave open"
    ends = "" if student.low is None else f" {labels.interval(student.low, student.high)}"
    return (
        f"in {labels.steps(student.steps)} {short} {labels.number(student.value)}{ends} against "
        f"{labels.number(teacher.value)}, {how}{sure}"
    )
