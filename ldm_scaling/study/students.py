"""How students compare with their teachers in as many steps, in words: better, worse, or not to be
told apart."""

from __future__ import annotations

from collections.abc import Sequence

from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.records import DISTILLED, TEXT_TO_IMAGE, Record
from ldm_scaling.study.statistics import blocks, duels, words

_STEPS = 4


def sentences(
    records: Sequence[Record], metric: str, select_block: int, report_blocks: Sequence[int]
) -> list[str]:
    """One for every member and task of distillation. A student of halving is that of the fewest
    steps, at these; another is taken at 4 steps, or the nearest to them that its teacher was
    measured at too. Nothing is picked by what it scored.

    Args:
      records: of members and of their students, of one study.
      metric: what they are compared by.
      select_block, report_blocks: that choose the guidance, and are reported.
    """
    pooled = blocks.pooled(records, select_block, report_blocks)
    own = [r for r in pooled if r.task == TEXT_TO_IMAGE and metric in r.metrics]
    teachers = _curves(curves_lib.longest(own), metric, (select_block, report_blocks[0]))
    out = []
    for task in DISTILLED:
        found = [r for r in pooled if r.task == task and metric in r.metrics]
        if not (found and teachers):
            continue
        shortest = min(r.student_steps for r in found)
        found = [r for r in found if r.student_steps == shortest]
        own_blocks = curves_lib.own_blocks(found, select_block, report_blocks[0])
        students = _curves(found, metric, own_blocks)
        for model in curves_lib.models(found):
            pair = _pair(students, teachers, model, shortest or _STEPS)
            if pair is not None:
                out.append(_sentence(task, *pair, metric))
    return out


def _curves(records: Sequence[Record], metric: str, its_blocks: tuple[int, int]) -> Curves:
    return curves_lib.quality_curves(curves_lib.distinct(records), metric, None, *its_blocks)


def _pair(
    students: Curves, teachers: Curves, model: str, steps: int
) -> tuple[Point, Point] | None:
    """The student and its teacher in as many steps, with the teacher's first sampler."""
    several = {s for m, s in teachers if m == model}
    first = sorted(several, key=lambda s: (s.partition(", ")[0] != "ddim", s))[:1]
    there = {p.steps: p for name in first for p in teachers[model, name]}
    same = [p for (m, _), curve in students.items() if m == model for p in curve
            if p.steps in there]
    if not same:
        return None
    student = min(same, key=lambda p: (abs(p.steps - steps), p.chosen_by))
    return student, there[student.steps]


def _sentence(task: str, student: Point, teacher: Point, metric: str) -> str:
    short, sign = labels.measure(metric).short, labels.measure(metric).sign
    sure, how = "", "better" if sign * student.value < sign * teacher.value else "worse"
    if student.replicates_R.size and teacher.replicates_R.size:
        chance = duels.between(student, teacher, metric, student.cost, "cost").probability
        sure = f" ({words.sure(max(chance, 1 - chance))})"
        if words.judge(chance) == "undecided":
            how = f"{how}, which the replicates leave open,"
    ends = "" if student.low is None else f" {labels.interval(student.low, student.high)}"
    steps = "step" if student.steps == 1 else "steps"
    return (
        f"{labels.task(task)}: in {student.steps} {steps} the student of {student.model} reaches "
        f"{short} {labels.number(student.value)}{ends}, {how} than its teacher in as many steps of "
        f"{labels.sampler(teacher.sampler)}, {short} {labels.number(teacher.value)}{sure}."
    )
