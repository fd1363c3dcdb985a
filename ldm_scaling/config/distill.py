"""Trained members that become students of themselves, to need fewer steps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ldm_scaling import files
from ldm_scaling.config.check import require
from ldm_scaling.config.measuring import Sample, Sweep
from ldm_scaling.config.training import BOOKKEEPING, NEUTRAL, Train


def _train() -> Train:
    return Train(
        steps=50_000, batch_size=256, learning_rate=1e-5, warmup_steps=1_000, weight_decay=0.0,
        ema_decay=0.999, ema_ramp=False,
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One student of a distillation; each has the one before as its teacher, the first the member.

    Attributes:
      name: of its folder.
      kind: `imitation` (one call says what the teacher says), `codi`, `lcm`, or `halving`.
      train: its run.
      steps: that it halves its teacher's to; 0 for another kind.
      told: whether it is told its guidance rate.
      trained: optimiser steps of all stages up to its own.
    """

    name: str
    kind: str
    train: Train
    steps: int
    told: bool
    trained: int

    @property
    def run(self) -> str:
        """The key of its run."""
        return "imitation" if self.kind == "imitation" else "train"


@dataclasses.dataclass(frozen=True)
class Distill:
    """What both kinds of distillation are told, see docs/distillation.md. Students lie in the
    workdir of the study that trained their teachers.

    Attributes:
      method: of the kind's; empty is none.
      prediction: of students; empty is the teacher's. Another one is learnt first, by a stage that
        imitates the teacher.
      rates: the lowest and the highest guidance rate that students of `lcm` and `guided` are told,
        1 is no guidance.
      guidance_dim: width of the embedding of that rate.
      imitation: the run of the stage that imitates.
      train: the run of every other stage.
      sample: what is drawn along the way, and by `ldm-scaling sample`; halving's students take
        their own steps.
      sweep: what is measured of students.
    """

    NAME: ClassVar[str]
    TASKS: ClassVar[dict[str, str]]
    SAMPLERS: ClassVar[dict[str, str]]
    TOLD: ClassVar[str]

    method: str = ""
    prediction: str = ""
    rates: tuple[float, ...] = (1.0, 15.0)
    guidance_dim: int = 256
    imitation: Train = dataclasses.field(default_factory=_train)
    train: Train = dataclasses.field(default_factory=_train)
    sample: Sample = dataclasses.field(default_factory=Sample)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)

    def __post_init__(self):
        name = self.NAME
        require(self.method in ("", *self.TASKS), f"{name}.method", self.method,
                f"choose {' or '.join(self.TASKS)}, or leave it empty")
        require(self.prediction in ("", "epsilon", "v", "x0", "flow"), f"{name}.prediction",
                self.prediction, "choose epsilon, v, x0 or flow, or leave it empty for the "
                "teacher's")
        require(len(self.rates) == 2 and 1 <= self.rates[0] <= self.rates[-1] < float("inf"),
                f"{name}.rates", self.rates, "two from 1 (no guidance) on, the lower first")
        self.sweep.require_none_of_its_own(name)
        wide = self.guidance_dim
        require(wide >= 4 and wide % 2 == 0, f"{name}.guidance_dim", wide,
                "an even number from 4 on")
        if self.told:
            low, high = self.rates
            for key, asked in (("sweep.guidance", self.sweep.guidance),
                               ("sample.guidance", (self.sample.guidance,))):
                require(all(low <= w <= high for w in asked), f"{name}.{key}", asked,
                        f"students are told rates of {name}.rates={self.rates} alone: leave out "
                        "others, or widen it")
        if self.method:
            for key, names in (("sweep.samplers", self.sweep.samplers),
                               ("sample.sampler", (self.sample.sampler,))):
                for n in names:
                    require(not (why := self.refuses(n)), f"{name}.{key}", n, why)

    @property
    def sampler(self) -> str:
        """The one that students are drawn by, with whatever options."""
        return self.SAMPLERS[self.method]

    def refuses(self, sampler: str, imitates: bool = False) -> str:
        """Why a student is not drawn by a sampler, or not with its options; empty where it is. One
        that `imitates` is drawn by any, as its teacher is."""
        name, _, options = sampler.partition(":")
        if name != self.sampler and not imitates:
            return (f"students of {self.method} are drawn by {self.sampler} alone, at whose nodes "
                    "they are trained")
        pairs = [pair.partition("=") for pair in options.split(",")]
        given = {option.strip(): value.strip() for option, _, value in pairs}
        if not self.told:
            return ""
        if "rescale" in given:
            return ("students that are told their rate are called once, so that there is nothing "
                    "to rescale by: leave rescale out")
        if {"guidance_low", "guidance_high"} & given.keys() and self.rates[0] > 1:
            return ("outside of the interval students are told rate 1, which is none of "
                    f"{self.NAME}.rates={self.rates}: leave it out, or begin rates with 1")
        return ""

    @property
    def task(self) -> str:
        """Of the students' records."""
        return self.TASKS[self.method]

    @property
    def told(self) -> bool:
        """Whether the last student is told its guidance rate."""
        return self.method == self.TOLD

    def stages(self, prediction: str) -> tuple[Stage, ...]:
        """The students, first to last.

        Args:
          prediction: of the pretrained members.
        """
        raise NotImplementedError

    def runs(self, prediction: str) -> dict[str, Train]:
        """The runs that are used, by their keys; `prediction` as of `stages`."""
        used = {s.run for s in self.stages(prediction)}
        return {f"{self.NAME}.{name}": getattr(self, name) for name in sorted(used)}

    def _stages(self, imitates: bool, rest: list[tuple[str, str, int]]) -> tuple[Stage, ...]:
        out: list[Stage] = []
        if imitates:
            told = self.method == "guided"
            out.append(Stage(
                "imitation", "imitation", self.imitation, 0, told, self.imitation.steps
            ))
        for name, kind, steps in rest:
            before = out[-1].trained if out else 0
            trained = before + self.train.steps
            out.append(Stage(name, kind, self.train, steps, self.told, trained))
        return tuple(out)

    @property
    def hash(self) -> str:
        """Of all that decides the students but the pretrained network."""
        decides = {"method": self.method, "prediction": self.prediction, **self._decides()}
        if self.told:
            decides |= {"rates": self.rates, "guidance_dim": self.guidance_dim}
        runs = {"train": self.train}
        if self.method == "guided" or self.prediction:
            runs["imitation"] = self.imitation
        for name, run in runs.items():
            decides[name] = {k: v for k, v in dataclasses.asdict(run).items()
                             if k not in BOOKKEEPING and NEUTRAL.get(k) != v}
        return files.sha256_of(decides)

    @property
    def setting(self) -> str:
        """The method and what decides it, in a word."""
        return f"{self.method}_{self.hash[:8]}"

    def _decides(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Consistency(Distill):
    """Students whose one call goes to the end of a trajectory.

    Attributes:
      method: `codi` (conditional consistency distillation, the paper's) or `lcm` (latent
        consistency distillation).
      skip: timesteps between the two points that are made consistent.
      huber: c of lcm's loss.
      match: what codi makes consistent, `x0` or `epsilon`.
      data_weight: of codi's distance from the data.
      teacher_step: whether codi's step between the two points is the teacher's rather than the
        student's own, the paper's.
      one_timestep: whether codi draws one timestep for a whole batch.
    """

    NAME: ClassVar[str] = "consistency"
    TASKS: ClassVar[dict[str, str]] = {"codi": "consistency", "lcm": "consistency"}
    SAMPLERS: ClassVar[dict[str, str]] = {"codi": "codi", "lcm": "lcm"}
    TOLD: ClassVar[str] = "lcm"

    skip: int = 20
    huber: float = 0.001
    match: str = "x0"
    data_weight: float = 1.0
    teacher_step: bool = False
    one_timestep: bool = False
    sample: Sample = dataclasses.field(default_factory=lambda: Sample(sampler="codi", steps=4))
    sweep: Sweep = dataclasses.field(
        default_factory=lambda: Sweep(samplers=("codi",), steps=(1, 2, 4, 8))
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.match in ("x0", "epsilon"), "consistency.match", self.match,
                "choose x0 or epsilon")
        require(self.skip >= 1, "consistency.skip", self.skip, "at least 1")
        require(self.method != "lcm" or 20 % self.skip == 0, "consistency.skip", self.skip,
                "lcm's sampler stops at every 20th timestep, which must be among those that are "
                "trained: a divisor of 20")
        require(self.huber > 0, "consistency.huber", self.huber, "above 0")
        require(self.data_weight >= 0, "consistency.data_weight", self.data_weight, "not below 0")

    def stages(self, prediction: str) -> tuple[Stage, ...]:
        """See `Distill.stages`."""
        return self._stages(
            self.prediction not in ("", prediction), [("student", self.method, 0)]
        )

    def _decides(self) -> dict[str, Any]:
        names = {
            "codi": ("skip", "match", "data_weight", "teacher_step", "one_timestep"),
            "lcm": ("skip", "huber"),
        }[self.method]
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Halving(Distill):
    """Students of half their teacher's steps, one after the other. Each is measured at its own
    number of steps and at those of `sweep.steps`.

    Attributes:
      method: `guided` (guided distillation: a student that is told its guidance rate first) or
        `progressive` (progressive distillation).
      steps: of each student, half of those before; the first one's teacher takes twice its steps.
    """

    NAME: ClassVar[str] = "halving"
    TASKS: ClassVar[dict[str, str]] = {
        "guided": "guided_distillation", "progressive": "progressive_distillation",
    }
    SAMPLERS: ClassVar[dict[str, str]] = {"guided": "ddim", "progressive": "ddim"}
    TOLD: ClassVar[str] = "guided"

    steps: tuple[int, ...] = (16, 8, 4)
    train: Train = dataclasses.field(default_factory=lambda: dataclasses.replace(
        _train(), learning_rate_decay="linear", ema_decay=0.0))
    sample: Sample = dataclasses.field(default_factory=lambda: Sample(
        steps=4, spacing="trailing"))
    sweep: Sweep = dataclasses.field(default_factory=lambda: Sweep(
        samplers=("ddim",), steps=(4,), guidance=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
        spacing="trailing"))

    def __post_init__(self):
        super().__post_init__()
        halves = all(a == 2 * b for a, b in zip(self.steps, self.steps[1:]))
        require(bool(self.steps) and halves and self.steps[-1] >= 1, "halving.steps", self.steps,
                "each half of the one before, such as 16, 8, 4")
        require(bool(self.sweep.spacing), "halving.sweep.spacing", self.sweep.spacing,
                "students learn its nodes: give one whose every second node is that of half the "
                "steps, such as trailing")

    def stages(self, prediction: str) -> tuple[Stage, ...]:
        """See `Distill.stages`."""
        changes = self.prediction not in ("", prediction)
        return self._stages(
            self.method == "guided" or changes, [(f"s{n}", "halving", n) for n in self.steps]
        )

    def _decides(self) -> dict[str, Any]:
        # More halvings may follow: the first alone is part of it.
        return {"steps": self.steps[0], "spacing": self.sweep.spacing}
