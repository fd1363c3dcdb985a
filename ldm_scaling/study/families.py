"""Families of networks at equal cost: does the finding belong to the U-Net?

A family enters a budget with the one cell, of whatever size, sampler and steps, that was best on
the selection block, and is valued on the report block, as a size does in `winners`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ldm_scaling.models import zoo
from ldm_scaling.study import curves as curves_lib
from ldm_scaling.study import labels, winners
from ldm_scaling.study.curves import Curves, Point
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import words
from ldm_scaling.study.winners import Winner


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What a family can do.

    Attributes:
      name: for readers.
      frontier: (budget, the point it enters with) at every budget that it can afford, rising.
    """

    name: str
    frontier: tuple[tuple[float, Point], ...]


def compared(curves: Curves, metric: str) -> tuple[list[Family], list[Winner]]:
    """Families, in the zoo's order, and the winner among them at every budget; nothing where there
    are not two. A winner's `model` is a family's name. Networks that the zoo does not know are left
    out, see `left_out`."""
    pools: dict[str, list[Point]] = {}
    for (model, _), points in curves.items():
        if family := zoo.family_of(model):
            pools.setdefault(family, []).extend(points)
    names = [family for family in zoo.FAMILIES if family in pools]
    return of_pools({zoo.LABELS[name]: pools[name] for name in names}, metric)


def left_out(curves: Curves) -> list[str]:
    """Networks of no family, which `compared` leaves out."""
    return sorted({model for model, _ in curves if not zoo.family_of(model)})


def of_pools(
    pools: Mapping[str, Sequence[Point]], metric: str
) -> tuple[list[Family], list[Winner]]:
    """The same of any pools of cells, by their names; nothing where there are not two."""
    if len(pools) < 2:
        return [], []
    every = [p for pool in pools.values() for p in pool]
    families = []
    for name, pool in pools.items():
        frontier = (
            (budget, winners.best_within(pool, budget, "cost"))
            for budget in winners.budgets(every, "cost")
        )
        families.append(Family(name, tuple((b, p) for b, p in frontier if p is not None)))
    as_sizes = {
        (name, "any"): [dataclasses.replace(p, model=name) for p in pool]
        for name, pool in pools.items()
    }
    return families, winners.winner_by_budget(as_sizes, metric, [f.name for f in families])


def sentences(curves: Curves, metric: str) -> list[str]:
    """Which family is best at the smallest budget that all can afford, and at the largest."""
    families, found = compared(curves, metric)
    met = [w for w in found if w.complete]
    if not met:
        return []
    at = {f.name: dict(f.frontier) for f in families}

    sizes: dict[str, set[str]] = {}
    cells: dict[str, int] = {}
    for (model, _), points in curves.items():
        if family := zoo.LABELS.get(zoo.family_of(model)):
            sizes.setdefault(family, set()).add(model)
            cells[family] = cells.get(family, 0) + len(points)

    def one(w: Winner) -> str:
        point = at[w.best.model][w.budget]
        return (
            f"at a budget of {labels.number(w.budget)} {w.best.model} is the best family, with "
            f"{point.model} in {labels.steps(point.steps)} of "
            f"{labels.sampler(point.sampler)}, "
            f"{words.reached(metric, w.best)} ({words.sure(w.best.probability)})"
        )

    ends = [met[0]] if met[0].budget == met[-1].budget else [met[0], met[-1]]
    of = [
        f"{f.name} ({labels.counted(len(sizes[f.name]), 'size')}, "
        f"{labels.counted(cells[f.name], 'cell')})"
        for f in families
    ]
    return [
        f"Of the families {labels.listing(of)}, each at its best size, sampler and steps: "
        f"{'; '.join(map(one, ends))}. A family with more cells has more to choose from; all sizes "
        "were trained by one recipe."
    ]


def ladder(models: Sequence[str]) -> tuple[str, list[str]]:
    """The family whose sizes are judged as a ladder where there are several, by name, and its
    sizes: that of most, the U-Net before others. No name where there is one family."""
    of = parted(models)
    if len(of) < 2:
        return "", list(models)
    best = max(of, key=lambda name: len(of[name]))
    return best, of[best]


def summary(records: Sequence[Record]) -> str:
    """What these networks are, in a sentence: of those that the zoo knows whether they differ only
    in width, and whether all were trained for as long."""
    models, compared = curves_lib.models(records), "compared at equal sampling cost."
    if len(models) == 1:
        return f"One latent diffusion model, its samplers {compared}"
    steps = {r.identity.train_step for r in records}
    compared = ("trained alike and " if len(steps) == 1 and steps != {0} else "") + compared
    of = parted(models)
    others = [
        vars(zoo.MEMBERS[m].spec) | {"base_channels": 0, "groups": 0} for m in of.get("U-Net", ())]
    if list(of) == ["U-Net"] and all(one == others[0] for one in others):
        return f"A family of latent diffusion models that differ only in width, {compared}"
    return f"Latent diffusion models ({labels.listing(list(of))}) in several sizes, {compared}"


def parted(models: Sequence[str]) -> dict[str, list[str]]:
    """Models by family, for readers: in the zoo's order, those that it does not know last."""
    of: dict[str, list[str]] = {family: [] for family in (*zoo.FAMILIES, "")}
    for model in models:
        of[zoo.family_of(model)].append(model)
    return {zoo.LABELS.get(family, "other networks"): own for family, own in of.items() if own}
