"""Draws a protocol's images with a network of a study; what is there is not drawn again."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_scaling import files, pictures
from ldm_scaling.config import Sample
from ldm_scaling.config.distill import Stage
from ldm_scaling.data.coco import CaptionList
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import fitting, versions
from ldm_scaling.study import further as further_lib
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.cascaded import Cascaded
from ldm_scaling.study.distilled import Distilled
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.subject import Subject
from ldm_scaling.tasks.cascade_drawing import CascadeDrawer
from ldm_scaling.tasks.drawing import Drawer, sampling_key

MEMBER = "member"
"""The stage that is none: a member that its config distils, undistilled."""

# Captions whose text states are in memory at a time.
_CAPTIONS = 1024


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How images are drawn: a network of the study, and the sampler's settings.

    Attributes:
      member: of the config, or a cascade's name.
      sampler, steps, guidance, spacing: see `request.Request`; an empty spacing is the sampler's.
      stage: of the member's student that draws, see `config.distill.Stage`; empty of others.
      setting: of a student or a cascade, see `records.Record`.
      first: of a cascade, see `records.First.spelling`.
    """

    member: str
    sampler: str
    steps: int
    guidance: float
    spacing: str = ""
    stage: str = ""
    setting: str = ""
    first: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network of a study that draws pictures of captions: a member, a student of one, or a
    cascade.

    Attributes:
      subject: what it is.
      sample: how it is drawn where nothing else is asked for.
      drawer, params: what draws with it, and its parameters, which raises `UserError` where they
        are not trained.
      stage: see `Drawing`.
      check: raises `UserError` for samplers and guidance rates that it does not take.
    """

    subject: Subject
    sample: Sample
    drawer: Callable[[], Drawer | CascadeDrawer]
    params: Callable[[], Any]
    stage: str = ""
    check: Callable[[Sequence[str], Sequence[float]], None] = lambda samplers, rates: None

    def drawing(
        self, sampler: str | None = None, steps: int | None = None, guidance: float | None = None,
        spacing: str | None = None,
    ) -> Drawing:
        """How it draws. Raises `UserError` for what it does not take."""
        s, own, diffusion = self.subject, self.sample, self.subject.diffusion
        name = solvers.canonical(sampler or own.sampler)
        rate = own.guidance if guidance is None else guidance
        self.check([name], [rate])
        where = own.spacing if spacing is None else spacing
        where = "" if where == solvers.spacing_of(name) else where
        steps = steps or own.steps
        schedule = schedule_lib.get(diffusion.schedule)
        solvers.warn(solvers.make(name, schedule, steps, diffusion.prediction, where))
        first = s.first.spelling if s.first else ""
        return Drawing(s.model, name, steps, rate, where, self.stage, s.setting, first)


def network_of(
    materials: Materials, member: str | None, stage: str | None, sample: Sample
) -> Network:
    """The network that is named: a member, of a config that distils it the student of a stage, the
    last where none is named, or a cascade.

    Args:
      materials: of the study.
      member: of the config, or a cascade's name; None is the only member.
      stage: of the students, where the config has several kinds `KIND/STAGE`; `MEMBER` is the
        member itself.
      sample: how members and cascades are drawn; their config says the spacing, and all of it of
        students.
    Raises:
      UserError: for a name that is none, or one that is missing.
    """
    study, several = materials.study, further_lib.of(materials)
    cascaded = next((f for f in several if isinstance(f, Cascaded)), None)
    names = (*study.members, *(cascaded.members if cascaded else ()))
    if not member and len(names) > 1:
        raise UserError(f"--member: name the network that draws: {', '.join(names)}")
    member = member or names[0]
    if member not in names:
        raise UserError(
            f"member {member!r} is none of the config's: choose from {', '.join(names)}"
        )
    if cascaded and member in cascaded.members:
        if stage:
            raise UserError(f"--stage={stage}: {member} is a cascade, which has no students")
        return _cascade(cascaded, member, sample)
    kinds = [f for f in several if isinstance(f, Distilled)]
    found = {
        f"{d.name}/{s.name}" if kinds[1:] else s.name: (d, s) for d in kinds for s in d.stages
    }
    if not stage and kinds[1:]:
        raise UserError(f"--stage: name the student that draws: {', '.join(found)}, or {MEMBER}")
    if found and stage != MEMBER:
        if stage and stage not in found:
            raise UserError(f"--stage={stage}: choose from {', '.join(found)}, or {MEMBER}")
        return _student(*(found[stage] if stage else [*found.values()][-1]), member)
    if stage not in (None, MEMBER):
        raise UserError(f"--stage={stage}: the config distils nothing: leave it out, or give "
                        "--config of a study that does")

    def params() -> Any:
        materials.require_trained([member])
        return materials.member_params(member)

    return Network(
        subject_lib.of_member(study, member),
        dataclasses.replace(sample, spacing=study.sample.spacing),
        lambda: materials.drawer(member), params,
        check=lambda samplers, rates: fitting.undistilled(study, member, samplers),
    )


def _student(distilled: Distilled, stage: Stage, member: str) -> Network:
    return Network(
        distilled.subject(member, stage), distilled.sample(stage),
        lambda: distilled.drawer(member, stage.told), lambda: distilled.params(member, stage),
        stage.name, functools.partial(distilled.check_drawn, stage),
    )


def _cascade(cascaded: Cascaded, name: str, sample: Sample) -> Network:
    """With the most steps of its first stage."""
    pair, steps = cascaded.of_name(name), cascaded.config.first_steps[-1]
    return Network(
        cascaded.subject(*pair, steps),
        dataclasses.replace(sample, spacing=cascaded.config.sample.spacing),
        lambda: cascaded.drawer(*pair).after(steps), lambda: cascaded.params(*pair),
        check=lambda samplers, rates: fitting.undistilled(
            cascaded.materials.study, name, samplers),
    )


def folder_of(
    materials: Materials, network: Network, drawing: Drawing, captions: CaptionList
) -> epath.Path:
    """Where images lie: a folder of their own for whatever decides a pixel.

    Lists of captions of which one begins the other share it: an image depends on its place.
    """
    study, first = materials.study, network.subject.first
    text_hash = materials.networks.text_hash or (lambda: materials.text_encoder.hash)
    tables = [(drawing.sampler, drawing.steps, drawing.spacing)]
    if first:
        tables.insert(0, (first.sampler, first.steps, first.spacing))
    # Folders were named before there were students and cascades.
    how = {name: value for name, value in dataclasses.asdict(drawing).items()
           if value or name not in ("stage", "setting", "first")}
    decides = [
        versions.of(network.subject.diffusion, *tables), network.subject.hash, study.train.steps,
        study.seed, how, text_hash(), captions.origin,
    ]
    name = "_".join(filter(None, (
        drawing.member, drawing.stage, drawing.sampler, f"{drawing.steps}steps",
        f"w{drawing.guidance:g}",
    )))
    name = re.sub(r"[^\w.+-]+", "-", name)
    return materials.workdir / "evaluate" / f"{name}_{files.sha256_of(decides)[:8]}"


def draw(
    materials: Materials, network: Network, drawing: Drawing, captions: CaptionList,
    folder: epath.Path,
) -> epath.Path:
    """Draws what is missing of 000000.png, 000001.png, ...: image i is of caption i, and its noise
    that of the sample of number i. Returns the folder.

    Raises:
      UserError: when the network is not trained.
    """
    have = {path.name for path in folder.iterdir()} if folder.exists() else set()
    missing = [i for i in range(len(captions)) if _name(i) not in have]
    if not missing:
        return folder
    params, key = network.params(), sampling_key(materials.study.seed)
    drawer = network.drawer()
    table = drawer.table(drawing.sampler, drawing.steps, drawing.spacing or None)
    folder.mkdir(parents=True, exist_ok=True)
    whose = " ".join(filter(None, (drawing.member, drawing.stage)))
    what = f"{whose}, {table.name}, guidance {drawing.guidance:g}"
    done = len(captions) - len(missing)
    with files.progress(len(captions), f"drawing, {what}", "image", initial=done) as bar:
        for start in range(0, len(missing), _CAPTIONS):
            index = missing[start : start + _CAPTIONS]
            context_PLD = materials.states([captions.texts[i] for i in index])
            configuration = Configuration(
                table, drawing.guidance, np.array(index, np.int32), np.arange(len(index))
            )
            drawn = drawer.draw(params, [configuration], context_PLD, key)
            for places, latents in _batches(drawn, drawer.batch_size):
                for i, image in zip(places, drawer.decode(latents, lambda j: what)):
                    pictures.save_png(folder / _name(index[i]), image)
                bar.update(len(places))
    return folder


def _name(i: int) -> str:
    return f"{i:06d}.png"


def _batches(drawn: Iterable, size: int):
    """Latents as they end, with their places, `size` at a time: decoding fills a batch up."""
    places: list[int] = []
    latents: list[np.ndarray] = []
    for finished in drawn:
        places += finished.position.tolist()
        latents += list(finished.latents_JHWC)
        while len(places) >= size:
            yield places[:size], np.stack(latents[:size])
            del places[:size], latents[:size]
    if places:
        yield places, np.stack(latents)
