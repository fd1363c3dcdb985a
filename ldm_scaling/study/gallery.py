"""Galleries: what trained members draw for prompts, samplers, step counts and guidance rates.

    from ldm_scaling.study.gallery import sample

    sample("runs/demo", "a red apple", steps=[4, 12], guidance=[1, 3, 5], seeds=range(4))
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from ldm_scaling import files, machine, pictures
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import compiled, hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import packing, solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import fitting, labels, sheet
from ldm_scaling.study import request as request_lib
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.request import AXES, Request
from ldm_scaling.study.workdir import MARKER, Workdir
from ldm_scaling.tasks.drawing import Drawer, sampling_key

# What stands in columns, if it varies: the first of these.
_COLUMNS = ("guidance", "steps", "sampler", "member", "prompt")
# How many stand in a row, where one axis is all there is.
_TILES = {"prompt": 4}


@dataclasses.dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures with their labels.

    Attributes:
      request: the values of every axis.
      images: uint8, the six axes of `AXES`, then (H, W, 3).
      calls: (sampler, steps) -> calls of the network a picture.
    """

    request: Request
    images: np.ndarray
    calls: Mapping[tuple[str, int], int]

    @property
    def axes(self) -> dict[str, tuple]:
        """The values along each of `AXES`; where every prompt has its own seeds, the first's."""
        values = {axis: getattr(self.request, axis) for axis in AXES[:-1]}
        return values | {"seed": self.request.seeds[0]}

    def select(self, **values: Any) -> Gallery:
        """The part with these values, e.g. `select(steps=12, seed=[0, 1])`; all axes stay.

        Raises:
          UserError: for an axis or a value that there is not.
        """
        places = {axis: list(range(n)) for axis, n in zip(AXES, self.request.shape)}
        for axis, given in values.items():
            if axis not in AXES:
                raise UserError(f"select: no axis is called {axis!r}; there are {', '.join(AXES)}")
            wanted, there = request_lib.listed(given), self.axes[axis]
            if axis == "sampler":
                wanted = [solvers.canonical(v) if isinstance(v, str) else v for v in wanted]
            missing = [value for value in wanted if value not in there]
            if missing:
                raise UserError(f"select: no {axis} is {missing[0]!r}; there are "
                                f"{', '.join(map(str, there))}")
            places[axis] = [there.index(value) for value in wanted]
        images = self.images[np.ix_(*places.values())]
        kept = {a: tuple(self.axes[a][i] for i in places[a]) for a in AXES[:-1]}
        seeds = tuple(
            tuple(self.request.seeds[p][s] for s in places["seed"]) for p in places["prompt"]
        )
        return Gallery(
            dataclasses.replace(self.request, **kept, seeds=seeds), images, self.calls
        )

    def picture(self) -> Image.Image:
        """The labelled grid. What varies makes its axes: with one configuration, prompts down and
        seeds across; otherwise the guidance rates (or else steps, samplers, ...) across, the rest
        down, and in each cell its seeds side by side.
        """
        return sheet.draw(self._sheet())

    def save(self, path: epath.PathLike) -> None:
        """Writes the picture as PNG, by rename."""
        pictures.save_png(path, np.asarray(self.picture()))

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.picture().save(out, format="png")
        return out.getvalue()

    def _sheet(self) -> sheet.Sheet:
        *_, samples, height, width, _ = self.images.shape
        varying = [axis for axis in AXES[:-1] if len(self.axes[axis]) > 1]
        same = len(set(self.request.seeds)) == 1
        room = sheet.side_by_side(samples, 1, max(height, width)) == samples
        if not varying or (len(varying) == 1 and samples == 1):
            column = varying[0] if varying else "seed"
            rows = self._tiles(column)
        else:
            natural = next(axis for axis in _COLUMNS if axis in varying)
            column = "seed" if len(varying) == 1 and same and room else natural
            rows = self._rows(column, [axis for axis in varying if axis != column])
        return sheet.Sheet(self._title(), self._about(column), rows)

    def _cells(self, rows: list[str], column: str) -> np.ndarray:
        """The pictures as (rows, columns, the rest of the seeds, H, W, 3)."""
        first = [AXES.index(axis) for axis in (*rows, column)]
        order = [*first, *(i for i in range(len(AXES)) if i not in first), -3, -2, -1]
        count = math.prod(len(self.axes[axis]) for axis in rows)
        shape = (count, len(self.axes[column]), -1, *self.images.shape[-3:])
        return self.images.transpose(order).reshape(shape)

    def _rows(self, column: str, down: list[str]) -> list[sheet.Row]:
        heads = tuple(_label(column, value) for value in self.axes[column])
        out: list[sheet.Row] = []
        values_R = list(itertools.product(*(self.axes[axis] for axis in down)))
        for values, cells in zip(values_R, self._cells(down, column), strict=True):
            texts = tuple(_label(axis, value) for axis, value in zip(down, values))
            apart = len(down) > 1 and bool(out) and out[-1].labels[0] != texts[0]
            out.append(sheet.Row(cells, texts, () if out else heads, apart))
        return out

    def _tiles(self, axis: str) -> list[sheet.Row]:
        """One axis, in several rows if it is long."""
        (cells,), values = self._cells([], axis), self.axes[axis]
        across = -(-len(values) // -(-len(values) // _TILES.get(axis, 8)))
        heads = [_label(axis, value) for value in values] if len(values) > 1 else []
        return [
            sheet.Row(cells[i : i + across], heads=tuple(heads[i : i + across]))
            for i in range(0, len(values), across)
        ]

    def _title(self) -> str:
        first, *more = self.request.prompt
        return f"{1 + len(more)} prompts" if more else _label("prompt", first)

    def _about(self, column: str) -> str:
        """What is the same for all, and what a picture costs."""
        r = self.request
        parts = [
            _label(axis, getattr(r, axis)[0]) for axis in ("member", "sampler", "steps", "guidance")
            if len(getattr(r, axis)) == 1
        ]
        parts.append(f"{r.spacing or 'its own'} spacing")
        seeds, same = r.seeds[0], len(set(r.seeds)) == 1
        if not same:
            parts.append("each prompt with its own seed")
        elif len(seeds) == 1:
            parts.append(_label("seed", seeds[0]))
        elif column != "seed":
            parts.append(f"in each cell the seeds {request_lib.span(seeds)}")
        calls = sorted({self.calls[key] for key in itertools.product(r.sampler, r.steps)})
        cost = f"{calls[0]} to {calls[-1]}" if len(calls) > 1 else f"{calls[0]}"
        parts.append(f"{cost} network {'call' if cost == '1' else 'calls'} a picture")
        return " · ".join(parts)


def _label(axis: str, value: Any) -> str:
    texts: dict[str, Callable[[Any], str]] = {
        "prompt": lambda text: f"“{text}”" if text else "the empty prompt",
        "sampler": labels.sampler,
        "steps": labels.steps,
        "guidance": lambda w: "no guidance" if w == 1 else f"guidance {w:g}",
        "seed": lambda seed: f"seed {seed}",
    }
    return texts.get(axis, str)(value)


def lanes(configurations: list[Configuration], devices: int, most: int) -> int:
    """How many lanes a request's samples fill while its longest is drawn: with one step count all
    of them run side by side, and a few long ones do not leave the lanes of the short ones idle.
    On each device they are a power of two, or halfway to the next: each other number is another
    program, and idle lanes, up to two fifths, take time and memory.

    Args:
      configurations: what is drawn.
      devices: of the mesh.
      most: lanes at most.
    """
    wanted = 1
    for _, group in packing.split(configurations):
        rows = sum(configurations[i].table.calls * len(configurations[i].index_N) for i in group)
        longest = max(configurations[i].table.calls for i in group)
        wanted = max(wanted, -(-rows // longest))
    each = -(-wanted // devices)
    unit = max(1, 2 ** ((each - 1).bit_length() - 2))
    return min(devices * unit * -(-each // unit), most)


def require_trained(materials: Materials, members: Iterable[str]) -> None:
    """Raises `UserError` naming the first network that these members need and is not trained."""
    materials.require_trained(members)


def draw(
    materials: Materials, request: Request, context_PLD: np.ndarray,
    drawer: Callable[[str], Drawer] | None = None, params: Callable[[str], Any] | None = None,
) -> Gallery:
    """Draws a request, each network in one run of lanes.

    Args:
      materials: of the study.
      request: what to draw.
      context_PLD: text states of its prompts.
      drawer: what draws with a member's network; by default one with as many `lanes` as needed.
      params: a member's parameters; by default the trained ones.
    Raises:
      UserError: when a sampler does not take what is asked, or a member is not trained.
    """
    study, tables = materials.study, request.tables(materials.study)
    samples, shape = request.shape[-1], request.shape
    index_N = np.array(request.seeds, np.int32).reshape(-1)
    prompt_N = np.repeat(np.arange(len(request.prompt)), samples)
    configurations = [
        Configuration(tables[name, steps], rate, index_N, prompt_N) for name, steps, rate
        in itertools.product(request.sampler, request.steps, request.guidance)
    ]
    count = lanes(configurations, mesh_lib.shards(materials.mesh), study.sweep.batch_size)
    drawer = drawer or functools.partial(_drawer, materials, count)
    rows = sum(c.table.calls for c in configurations) * len(index_N)
    images_M = []
    for member in request.member:
        network, weights = drawer(member), (params or materials.member_params)(member)
        with files.progress(rows, f"sample {member}", "row") as bar:
            images_CN = network.pictures(
                weights, configurations, context_PLD, sampling_key(study.seed), bar.update
            )
        images_M.append(np.stack(images_CN))
    # (member, sampler, steps, guidance, prompt, seed, H, W, 3)
    images = np.stack(images_M).reshape(
        shape[0], *shape[2:5], shape[1], samples, *images_M[0].shape[-3:]
    )
    return Gallery(
        request, images.transpose(0, 4, 1, 2, 3, 5, 6, 7, 8),
        {key: table.calls for key, table in tables.items()},
    )


@functools.lru_cache(maxsize=8)
def _drawer(materials: Materials, count: int, member: str) -> Drawer:
    return materials.drawer_of(materials.spec(member), materials.study.train, count)


def text_states(materials: Materials, prompts: Iterable[str]) -> np.ndarray:
    """Text states of captions, (P, L, D), in the precision that prepared ones are kept in. Says
    whose end is cut off."""
    texts, networks = list(prompts), materials.networks
    most = networks.tokens
    for text, count in zip(texts, networks.lengths(texts)):
        if count > most and hosts.is_lead():
            why = "its text encoder takes" if materials.study.weights else "data.text_length is"
            files.say(f"prompt {text!r} has {count} tokens, and its end is not seen: {why} {most}")
    return materials.states(texts)


# A notebook asks again and again: what a workdir holds is loaded once, and the last networks stay,
# as many as are small together.
_KEPT_BYTES = 2**30
_kept: dict[str, Any] = {}


@functools.lru_cache(maxsize=1)
def _open(path: str, marker: str) -> Materials:
    _kept.clear()
    return Materials(Workdir(path).last_config(), Workdir(path))


def _params(materials: Materials, member: str) -> Any:
    _kept[member] = _kept.pop(member) if member in _kept else materials.member_params(member)
    while len(_kept) > 1 and sum(x.nbytes for x in jax.tree.leaves(_kept)) > _KEPT_BYTES:
        del _kept[next(iter(_kept))]  # The one asked for longest ago.
    return _kept[member]


def sample(
    workdir: epath.PathLike, prompt: str | Iterable[str], *,
    sampler: str | Iterable[str] | None = None, steps: int | Iterable[int] | None = None,
    guidance: float | Iterable[float] | None = None, seeds: int | Iterable[int] | None = None,
    spacing: str | None = None, member: str | Iterable[str] | None = None,
) -> Gallery:
    """Draws prompts with the trained networks of a workdir; each argument is a value or a list.

    The pictures are those of a sweep with the same numbers, and the same in whatever company they
    are drawn. A notebook shows the gallery as a labelled grid.

    Args:
      workdir: of a study; it knows its config.
      prompt: captions.
      sampler, steps, guidance, spacing: the config's `sample` if not given, see `Request`.
      seeds: numbers of samples; from 0 up, as many as make `sample.num_images` pictures, if not
        given.
      member: names of networks; all of the config's if not given.
    Raises:
      UserError: for a value that cannot be, before anything is computed, or a network that is
        not trained.
    """
    machine.quiet_cuda()
    compiled.keep()
    folder = Workdir(workdir)
    folder.last_config()  # Says what is wrong with it, if anything.
    materials = _open(str(folder.path), (folder / MARKER).read_text())
    wanted = request_lib.of(
        materials.study, prompt, sampler=sampler, steps=steps, guidance=guidance, seeds=seeds,
        spacing=spacing, member=member,
    )
    fitting.undistilled(materials.study, wanted.member[0], wanted.sampler)
    require_trained(materials, wanted.member)
    return draw(
        materials, wanted, text_states(materials, wanted.prompt),
        params=functools.partial(_params, materials),
    )
