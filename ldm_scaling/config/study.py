"""All settings of a study."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ldm_scaling import files
from ldm_scaling.config import averaging
from ldm_scaling.config import repeats as repeats_lib
from ldm_scaling.config.cascade import Cascade
from ldm_scaling.config.check import require
from ldm_scaling.config.data import NEUTRAL_DATA, SHARDS, Data
from ldm_scaling.config.distill import Consistency, Distill, Halving
from ldm_scaling.config.dreambooth import DreamBooth
from ldm_scaling.config.early import Early
from ldm_scaling.config.finetune import FineTune
from ldm_scaling.config.measuring import LEAST_IMAGES, Sample, Sweep
from ldm_scaling.config.start import Start
from ldm_scaling.config.training import (
    AUTO,
    BOOKKEEPING,
    NEUTRAL,
    NEUTRAL_DIFFUSION,
    Autoencoder,
    Diffusion,
    Mesh,
    Train,
)

LEFT_OUT = {
    "data": NEUTRAL_DATA, "train": NEUTRAL, "autoencoder": {"train": NEUTRAL},
    "diffusion": NEUTRAL_DIFFUSION,
}
"""Keys of which `Study.identity` says nothing at these values."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything.

    Attributes:
      name: of the study, in titles.
      seed: of every training run, from 0 to 2**32 - 1.
      members: names of the family's members, see `ldm-scaling zoo`.
      repeats: how often each member is trained: 3 are three runs, with the seeds `seed`, `seed` + 1
        and `seed` + 2 of beginning, noise and order of pictures, over one autoencoder. Those after
        the first are drawn at the guidance that it chose, and quality is the mean over runs, with
        intervals that cover the chance of another one, see `study.repeated`. A workdir is not bound
        to it: runs can be added later.
      reference: the member whose cost is 1.
      weights: folder of a published Stable Diffusion, see `models.sd_folder`: it is the only
        member, under any name, and nothing is trained. Empty where members are trained.
      weights_hash: of the folder's files. Filled in when the folder is read; given, it is what
        they must have.
      average: the length of the average whose parameters members are drawn and measured with, a
        relative standard deviation: `0.1`, or members' own, `c8=0.12,c16=0.09`, or both, where the
        number alone is of all others. Without any, empty, it is the run's own, `ema`. Made after
        training, see `training.averages`; a record's network is named by it, and a workdir is not
        bound to it.
      plugins: code of one's own, which registers what is named here: dotted modules, and .py files,
        which `config.parse` makes absolute. A workdir keeps them, and is not bound to them. See
        docs/extending.md.
      data, autoencoder, diffusion, train, start, mesh, sample, sweep, early, finetune, consistency,
        halving, cascade, dreambooth: see their classes.
    """

    name: str = "study"
    seed: int = 0
    members: tuple[str, ...] = ("866m",)
    repeats: int = 1
    reference: str = "866m"
    weights: str = ""
    weights_hash: str = ""
    average: str = ""
    plugins: tuple[str, ...] = ()
    data: Data = dataclasses.field(default_factory=Data)
    autoencoder: Autoencoder = dataclasses.field(default_factory=Autoencoder)
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
    train: Train = dataclasses.field(default_factory=Train)
    start: Start = dataclasses.field(default_factory=Start)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    sample: Sample = dataclasses.field(default_factory=Sample)
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    early: Early = dataclasses.field(default_factory=Early)
    finetune: FineTune = dataclasses.field(default_factory=FineTune)
    consistency: Consistency = dataclasses.field(default_factory=Consistency)
    halving: Halving = dataclasses.field(default_factory=Halving)
    cascade: Cascade = dataclasses.field(default_factory=Cascade)
    dreambooth: DreamBooth = dataclasses.field(default_factory=DreamBooth)

    def __post_init__(self):
        require(len(self.members) > 0, "members", self.members, "give at least one")
        require(len(set(self.members)) == len(self.members), "members", self.members,
                 "has a name twice")
        if self.weights:
            require(len(self.members) == 1, "members", self.members,
                     f"weights={self.weights!r} is one network: give one name for it")
        for name in ("schedule", "prediction"):
            value = getattr(self.diffusion, name)
            require(bool(self.weights) or value != AUTO, f"diffusion.{name}", value,
                     "only weights decide it: give a value, or --config.weights=DIR, the folder of "
                     "a published model, such as that of https://huggingface.co/"
                     "stable-diffusion-v1-5/stable-diffusion-v1-5")
        require(self.autoencoder.train.remat == "none", "autoencoder.train.remat",
                 self.autoencoder.train.remat, "the autoencoder has no blocks to recompute: none")
        require(self.autoencoder.train.attention in ("auto", "plain", "chunked"),
                "autoencoder.train.attention", self.autoencoder.train.attention, "fused "
                "kernels are not for its one wide head: auto, plain or chunked")
        self._check_repeats()
        self._check_transfer()
        self._check_average()
        for name, value in (("weights", self.weights), ("finetune.pretrained",
                                                        self.finetune.pretrained)):
            require(not (value and self.start.workdir), "start.workdir", self.start.workdir,
                     f"with {name}={value!r} no member is trained here: give one of the two")
        require(self.start.passed < self.train.steps, "start.step", self.start.step,
                 f"the run is to go on from there to train.steps={self.train.steps}: give more")
        require(not (self.weights and self.finetune.pretrained), "finetune.pretrained",
                 self.finetune.pretrained, f"weights={self.weights!r} are the pretrained network: "
                 "give one of the two")
        require(not (self.autoencoder.weights and self.finetune.pretrained), "autoencoder.weights",
                 self.autoencoder.weights, "the members of finetune.pretrained bring their own "
                 "autoencoder: leave it out")
        same = ("select_block", "report_block", "more_blocks", "replicates")
        for name in (key.partition(".")[0] for key in self.further):
            sweeps = getattr(self, name).sweep, self.sweep
            theirs, ours = ([getattr(s, k) for k in same] for s in sweeps)
            require(theirs == ours, f"{name}.sweep", theirs,
                    f"its {', '.join(same)} must be those of sweep, {ours}: one page reports both")
        for distill in self.distillations:
            self._check(distill)
        if self.cascade.base:
            self._check_cascade()
        if self.data.composed:
            self.check_counts(self.data.train_pictures, self.data.validation_pictures)

    def _check_repeats(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "each member is trained once at least")
        if self.repeats == 1:
            return
        others = {"weights": self.weights, "finetune.pretrained": self.finetune.pretrained,
                  "start.workdir": self.start.workdir}
        for name, value in others.items():
            require(not value, "repeats", self.repeats, f"with {name}={value!r} members do not "
                    "begin with nothing here: 1")
        for member in self.members:
            require(repeats_lib.parse(member) == (member, 0), "members", self.members,
                    f"{member} reads as a further run of another, see repeats: rename it")

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the networks of all members' training runs, see `config.repeats`: the first run
        of every member, the second of every one, and so on."""
        return tuple(
            repeats_lib.name(member, run) for run in range(self.repeats) for member in self.members)

    def run_of(self, network: str) -> tuple[str, int]:
        """The member and the number of its run, from 0, of a name of `trained`."""
        return (network, 0) if network in self.members else repeats_lib.parse(network)

    def seed_of(self, network: str) -> int:
        """The seed of a network's training run."""
        return (self.seed + self.run_of(network)[1]) % 2**32

    def _check_transfer(self) -> None:
        """Members alone are a family of widths: others' runs have rates of their own."""
        runs = {"autoencoder.train": self.autoencoder.train, "finetune.train": self.finetune.train,
                "dreambooth.train": self.dreambooth.train}
        for part in (self.consistency, self.halving):
            runs |= {f"{part.NAME}.{k}": getattr(part, k) for k in ("train", "imitation")}
        runs |= {f"cascade.{k}": getattr(self.cascade, k) for k in ("base_train", "train")}
        for name, run in runs.items():
            require(run.width_transfer == "none", f"{name}.width_transfer", run.width_transfer,
                    "it is for train, in which members begin: give none here")
            require(not run.averages, f"{name}.averages", run.averages,
                    "averages of other lengths are made of members alone: give them in train")

    def _check_average(self) -> None:
        if not self.average:
            return
        named = averaging.parse(self.average, self.members)  # Raises for what is none.
        # One spelling of all that say the same.
        object.__setattr__(self, "average", averaging.spell(named))
        others = {"weights": self.weights, "finetune.pretrained": self.finetune.pretrained}
        for name, value in (others | self.further).items():
            require(not value, "average", self.average, f"with {name}={value!r}: what is made of "
                    "members begins with their ema, and is compared with that: leave out one of "
                    "the two, a workdir may serve several configs")
        require(bool(self.train.averages), "average", self.average,
                "it is made of train.averages: name those that the members were trained with, such "
                "as train.averages=(0.05, 0.1)")

    @property
    def trains_members(self) -> bool:
        """Whether members are trained here: neither published, nor another study's."""
        return not (self.weights or self.finetune.pretrained)

    def average_of(self, member: str) -> float | None:
        """The length of the average that a member is measured with; None is its `ema`."""
        named = averaging.parse(self.average, self.members)
        return named.get(self.run_of(member)[0], named.get(""))

    @property
    def distillations(self) -> tuple[Distill, ...]:
        """Those that there are."""
        return tuple(d for d in (self.consistency, self.halving) if d.method)

    @property
    def further(self) -> dict[str, str]:
        """What is made of members and has a sweep of its own: the key that says so, and its value;
        those that there are."""
        found = {"finetune.task": self.finetune.task, "cascade.base": self.cascade.base}
        found |= {f"{d.NAME}.method": d.method for d in self.distillations}
        return {key: value for key, value in found.items() if value}

    def _check(self, distill: Distill) -> None:
        name = distill.NAME
        require(not self.finetune.task, f"{name}.method", distill.method,
                f"with finetune.task={self.finetune.task!r}: fine-tuned members are not distilled; "
                "give one of the two in a config, a workdir may serve several configs")
        same = ("num_images", "feature_side")
        theirs, ours = ([getattr(s, k) for k in same] for s in (distill.sweep, self.sweep))
        require(theirs == ours, f"{name}.sweep", theirs,
                f"its {' and '.join(same)} must be those of sweep, {ours}: students are compared "
                "with their teachers")
        wanted = distill.prediction or self.diffusion.prediction
        noise = self.diffusion.schedule.partition(":")[0] in ("sd_zero_snr", "flow")
        require(not noise or wanted != "epsilon", f"{name}.prediction", wanted,
                "the schedule ends in pure noise, of which epsilon tells nothing: v, x0 or flow")

    @property
    def upper(self) -> tuple[str, ...]:
        """Members that are second stages of cascades."""
        return self.cascade.upper or self.members

    def _check_cascade(self) -> None:
        cascade, given = self.cascade, self.cascade.base
        others = self.further | {"weights": self.weights, "cascade.base": ""}
        for name, value in others.items():
            require(not value, "cascade.base", given, f"with {name}={value!r}: cascades are made "
                    "of members that a study trains, and of these alone; give one of the two in a "
                    "config, a workdir may serve several configs")
        unknown = [m for m in cascade.upper if m not in self.members]
        require(not unknown, "cascade.upper", cascade.upper, f"choose from members={self.members}")
        same = ("num_images", "feature_side")
        theirs, ours = ([getattr(s, k) for k in same] for s in (cascade.sweep, self.sweep))
        require(theirs == ours, "cascade.sweep", theirs,
                f"its {' and '.join(same)} must be those of sweep, {ours}: cascades are compared "
                "with single networks")
        require(self.data.side % cascade.factor == 0, "cascade.factor", cascade.factor,
                f"does not divide data.side={self.data.side}")
        require(self.data.side // cascade.factor >= 16, "cascade.factor", cascade.factor,
                f"makes pictures of {self.data.side // cascade.factor} pixels of data.side="
                f"{self.data.side}: at least 16")
        require(self.data.max_aspect == 1, "data.max_aspect", self.data.max_aspect,
                "cascades take square pictures: 1")

    def check_counts(self, train: int, validation: int, total: int = 0) -> None:
        """Raises `UserError` where there are too few pictures for the batches or the sweep.

        Args:
          train, validation: how many are taken.
          total: how many there are, of both splits; those if not given.
        """
        runs = [("autoencoder.train", self.autoencoder.train), ("train", self.train)]
        sweeps = [("sweep", self.sweep, (self.sweep.select_block, *self.sweep.report_blocks))]
        if not self.trains_members:
            runs = []
        elif self.autoencoder.weights:
            del runs[0]
        if self.finetune.task:
            sweep = self.finetune.sweep
            chooses = (sweep.select_block,) if len(sweep.guidance) > 1 else ()
            runs.append(("finetune.train", self.finetune.train))
            sweeps.append(("finetune.sweep", sweep, (*chooses, *sweep.report_blocks)))
            if self.finetune.pretrained:
                del sweeps[0]
        if self.cascade.base:
            runs += [(f"cascade.{n}", getattr(self.cascade, n)) for n in ("base_train", "train")]
        for distill in self.distillations:
            runs += distill.runs(self.diffusion.prediction).items()
        for name, run in runs:
            require(run.batch_size <= train, f"{name}.batch_size", run.batch_size,
                    f"more than the {train} pictures for training: lower it")
        for name, sweep, used in sweeps:
            blocks = max(used) + 1
            need = sweep.num_images * blocks
            fits = validation // blocks
            lower = f"lower it to {fits}, or " if fits >= LEAST_IMAGES else ""
            require(need <= validation, f"{name}.num_images", sweep.num_images,
                    f"{blocks} blocks of as many prompts need at least {need} pictures for "
                    f"validation, there are {validation}: {lower}"
                    f"{self._more(total or train + validation, validation, need)}")

    def _more(self, total: int, validation: int, need: int) -> str:
        """How so many of a total are there for validation."""
        data, several = self.data, len(self.data.sources)
        cap = several * data.validation_pictures
        raised = f"raise data.validation_pictures to {-(-need // several)}"
        if 0 < validation == cap:
            return raised
        # Which pictures they are is drawn by lot: by three deviations more than are needed.
        wanted = (1.5 + math.sqrt(2.25 + need)) ** 2
        if wanted > 0.99 * total:
            return f"take a larger collection than this of {total} pictures"
        share = f"data.prepare.validation_share={math.ceil(100 * wanted / total) / 100}"
        anew = all(source.startswith(f"{SHARDS}:") for source in data.sources)
        more = f"prepare the shards anew by {share}" if anew else f"hold back more by {share}"
        return f"{raised} and {more}" if 0 < cap < need else more

    def require_new(self) -> None:
        """Raises `UserError` for what no study begins with; workdirs from before may have it."""
        # Of another seed a key takes the last 32 bits, or none.
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        require(self.sweep.replicates >= 2, "sweep.replicates", self.sweep.replicates,
                "at least 2, or there is no spread")

    def identity(self) -> dict[str, Any]:
        """What a workdir is bound to: all that decides a trained network or a record's numbers.

        Members, the sweep's grid and bookkeeping are free: a record's own key tells them apart,
        so a sweep can be widened in the same workdir.
        """
        tree = dataclasses.asdict(self)
        for run in (tree["train"], tree["autoencoder"]["train"]):
            for name in BOOKKEEPING:
                del run[name]
            for name, value in NEUTRAL.items():
                if run[name] == value:
                    del run[name]
        for name, value in NEUTRAL_DIFFUSION.items():
            if tree["diffusion"][name] == value:
                del tree["diffusion"][name]
        tree["data"] = self.data.identity()
        tree["start"] = self.start.hash
        weights, hash = (tree["autoencoder"].pop(name) for name in ("weights", "weights_hash"))
        if weights:
            encoded = tree["autoencoder"]["train"]["compute_dtype"]
            tree["autoencoder"] = {"weights_hash": hash}
            if encoded == "bfloat16":  # Latents of `auto` are float32's.
                tree["autoencoder"]["compute_dtype"] = encoded
        kept = ["seed", "reference", "data", "autoencoder", "diffusion", "train"]
        kept += ["start"] if self.start.hash else []
        if self.finetune.pretrained:  # Of these nothing else is trained here.
            tree["pretrained_hash"] = self.finetune.pretrained_hash
            kept = ["seed", "reference", "data", "diffusion", "pretrained_hash"]
        if self.weights:  # Nothing is trained.
            tree["train"] = {"compute_dtype": self.train.compute_dtype}
            kept = ["weights_hash", *(key for key in kept if key != "autoencoder")]
        # The roles of the blocks too: only the reported one's records hold intervals.
        fixed = ("replicates", "feature_side", "select_block", "report_block")
        sweep = {k: tree["sweep"][k] for k in fixed}
        return {k: tree[k] for k in kept} | {"sweep": sweep}

    def training_hash(self, member: str | None) -> str:
        """Hash of all that decides a network: the autoencoder's, or a member's."""
        tree = self.identity()
        if self.finetune.pretrained:
            kept = {k: tree[k] for k in ("seed", "data", "diffusion", "pretrained_hash")}
            return files.sha256_of(kept | {"member": member})
        if self.weights:
            kept = ("seed", "data", "diffusion", "train", "weights_hash")
            return files.sha256_of({k: tree[k] for k in kept})
        kept = {k: tree[k] for k in ("seed", "data", "autoencoder")}
        if not self.autoencoder.weights:
            del kept["autoencoder"]["train"]["caption_dropout"]
        if self.start.hash:
            kept["start"] = tree["start"]
        if member is not None:
            kept |= {"member": member, "diffusion": tree["diffusion"], "train": tree["train"]}
        return files.sha256_of(kept)
