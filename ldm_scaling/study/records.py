"""`Record`: what one configuration scored. One JSON file each; the file's name is the resume."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from ldm_scaling import files
from ldm_scaling.config.cascade import TASK as CASCADE
from ldm_scaling.data.conditions import table as conditions
from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"[0-9a-f]{16}\.json")
"""The name of a record's file, see `Identity.key`."""
TEXT_TO_IMAGE = "text_to_image"
DISTILLED = ("consistency", "guided_distillation", "progressive_distillation")
RESTORING = tuple(conditions.CONDITIONS)
"""Image-conditioned tasks, super-resolution first."""
TASKS = (TEXT_TO_IMAGE, *RESTORING, "dreambooth", *DISTILLED, CASCADE)
"""What networks of records are for."""
FROM_TEXT = (TEXT_TO_IMAGE, CASCADE, *DISTILLED)
"""Tasks that draw the same prompts from the same noise, so that a budget can be spent on any."""
CHOSEN = (TEXT_TO_IMAGE, CASCADE)
"""Tasks whose steps within a budget are chosen, so that a block of its own chooses."""


@dataclasses.dataclass(frozen=True)
class First:
    """The first stage of a cascade, which draws the small pictures.

    Attributes:
      model: name of its network.
      sampler, steps, spacing: see `Identity`; its guidance rate is the identity's.
      upper_guidance: rate of the second stage.
      level: of the noise on what the second stage sees.
      gflops, norm_cost, calls, guided_calls: see `Record`.
    """

    model: str
    sampler: str
    steps: int
    spacing: str
    upper_guidance: float
    level: float
    gflops: float
    norm_cost: float
    calls: int
    guided_calls: int | None = None

    @property
    def spelling(self) -> str:
        """All of it that decides numbers, and the network's name, in one way."""
        words = [self.model, self.sampler, str(self.steps), self.spacing]
        return " ".join([*words, f"w{self.upper_guidance:.12g}", f"l{self.level:.12g}"])

    @property
    def cost(self) -> float:
        """As `Record.cost`, of this stage."""
        return self.norm_cost * self.calls


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes a record the one it is: everything that decides its numbers.

    Attributes:
      model: name of the family member; of a cascade both, `FIRST+SECOND`.
      model_hash: hash of the network's spec and of how it was trained.
      train_step: training step of the checkpoint.
      sampler: name of the sampler, e.g. `ddim`.
      steps: sampling steps.
      spacing: timestep spacing of the grid.
      guidance: guidance rate w; 1 is no guidance.
      seed_block: which block of prompts and noise.
      num_images: images in the block.
      reference_hash: hash of the reference statistics, the feature network included.
      version: version of the code that decides numbers, see `versions.of`.
      first: of a cascade how its first stage draws, see `First.spelling`: all before is of the
        second then, but guidance, which is the first's; empty of one network.
    """

    model: str
    model_hash: str
    train_step: int
    sampler: str
    steps: int
    spacing: str
    guidance: float
    seed_block: int
    num_images: int
    reference_hash: str
    version: str
    first: str = ""

    @property
    def key(self) -> str:
        """16 hex digits: the record's file name."""
        decides = dataclasses.asdict(self)
        if not self.first:  # Records were named before there were cascades.
            del decides["first"]
        return files.sha256_of(decides)


def raced_reference(identity: Identity) -> str:
    """The reference's hash of records of a race for this one. What a distance is foretold for
    decides it, so it is hashed with what else does."""
    return files.sha256_of([identity.reference_hash, identity.num_images])


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of the study.

    Attributes:
      identity: see `Identity`.
      base_channels: width c of the network.
      params: parameters of the network; of both networks of a cascade.
      gflops: XLA's GFLOPs of one forward pass at batch 1 (2 per multiply-add, no guidance).
      norm_cost: gflops over those of the family's reference member.
      calls: network calls per image, a guided pair counted once (the paper's convention).
      metrics: metric name -> value.
      intervals: metric name -> (low, high), 95%; only where replicates were drawn.
      replicates: metric name -> bootstrap replicates, already centred. Replicate r resamples the
        same prompts in every record of a seed block, so differences between records are paired.
      seconds_per_image: measured seconds of network and decoder for one image in a batch; 0 where
        they were not measured, which takes no part where seconds count.
      device: what it was measured on.
      round: of a race, counted from 1, see `study.raced`: its images are the first
        `identity.num_images` of the block, and its distance is foretold for all of them. 0 where it
        raced with nothing.
      task: what the network is for, of `TASKS`. A fine-tuned or distilled one's
        `identity.train_step` counts that training.
      told: whether the network is told its guidance rate, so that a guided call is one evaluation.
      student_steps: that halving was to reach; 0 of other networks.
      setting: how it was distilled, fine-tuned or taught: the method, and a hash of all that
        decides it; empty of other networks, and of records of fine-tuning and DreamBooth that were
        paid for before this was told.
      first: the first stage of a cascade; None of one network.
      guided_calls: how many of the calls guidance makes pairs, where it is asked for: those within
        a guidance interval. None is all of them, as records paid for before this was told.
      repeats: of a network that was trained again, of another seed, `Identity.model_hash` of the
        first; empty of the first, and where there is no other. See `study.repeated`.
      run: which of its training runs, from 0.
      runs: of training, that it is the mean of. What is stored is of one.
      freedom: degrees of freedom of the luck of a training run that replicates hold; 0 where they
        hold none, as all that is stored.
    """

    identity: Identity
    base_channels: int
    params: int
    gflops: float
    norm_cost: float
    calls: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    replicates: dict[str, list[float]]
    seconds_per_image: float
    device: str
    round: int = 0
    task: str = TEXT_TO_IMAGE
    told: bool = False
    student_steps: int = 0
    setting: str = ""
    first: First | None = None
    guided_calls: int | None = None
    repeats: str = ""
    run: int = 0
    runs: int = 1
    freedom: int = 0

    def __post_init__(self) -> None:
        if self.identity.first != (self.first.spelling if self.first else ""):
            raise UserError(f"a record's first stage is {self.first}, its identity says "
                            f"{self.identity.first!r}")
        if self.task not in TASKS:
            raise UserError(f"a record's task is {self.task!r}: use one of {', '.join(TASKS)}")

    @property
    def cost(self) -> float:
        """Sampling cost: normalised cost per call x calls of the network, guidance not doubled.
        For all samplers of the paper a call is a step. A cascade's is the sum of both stages'.
        """
        return self.norm_cost * self.calls + (self.first.cost if self.first else 0.0)

    def flat(self) -> dict[str, Any]:
        """One flat row (no replicates), for tables."""
        row = dataclasses.asdict(self.identity) | {"key": self.identity.key, "cost": self.cost}
        for name in ("base_channels", "params", "gflops", "norm_cost", "calls"):
            row[name] = getattr(self, name)
        row |= self.metrics
        for name, (low, high) in self.intervals.items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        return row | {"seconds_per_image": self.seconds_per_image or None, "device": self.device,
                      "round": self.round, "task": self.task, "told": self.told,
                      "student_steps": self.student_steps, "setting": self.setting,
                      "first_cost": self.first.cost if self.first else 0.0,
                      "guided_calls": self.calls if self.guided_calls is None else
                      self.guided_calls, "runs": self.runs}


def path_of(directory: epath.PathLike, key: str) -> epath.Path:
    """Where the record with this key lies."""
    return epath.Path(directory) / f"{key}.json"


def write(directory: epath.PathLike, record: Record) -> None:
    """Writes one record by atomic rename. Raises `UserError` on a value that is not finite, and
    `ValueError` for the mean of several runs, which is no measurement."""
    if record.runs != 1 or record.freedom:
        raise ValueError(f"a record is of one training run, this one is the mean of {record.runs}")
    for name, value in record.metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} of {record.identity.model}, {record.identity.sampler}, "
                f"{record.identity.steps} steps, guidance {record.identity.guidance} is {value}: "
                "the sampled images or features are not finite; check the checkpoint"
            )
    payload = {"format": FORMAT, "key": record.identity.key, **dataclasses.asdict(record)}
    del payload["runs"], payload["freedom"]
    if not record.repeats:  # As records were before networks were trained again.
        del payload["repeats"], payload["run"]
    text = json.dumps(payload, indent=1, sort_keys=True, allow_nan=False)
    files.atomic_write_text(path_of(directory, record.identity.key), text + "\n")


def _check(record: Record) -> None:
    """Raises `ValueError` or `TypeError` where a value is none that `write` wrote."""
    numbers = {
        name: getattr(record, name) for name in (
            "base_channels", "params", "gflops", "norm_cost", "calls", "seconds_per_image", "round",
            "student_steps")
    } | record.metrics
    for name, value in numbers.items():
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, no finite number")
    if numbers["seconds_per_image"] < 0:
        raise ValueError(f"seconds_per_image is {numbers['seconds_per_image']}, below 0")
    for name in ("norm_cost", "calls"):
        if not numbers[name] > 0:
            raise ValueError(f"{name} is {numbers[name]}, not above 0")
        value = getattr(record.first, name, 1)
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} of the first stage is {value!r}, not above 0")
    for part in (record, record.first):
        if part and part.guided_calls is not None and not 0 <= part.guided_calls <= part.calls:
            raise ValueError(f"{part.guided_calls} of {part.calls} calls are guided")
    for name, values in (*record.intervals.items(), *record.replicates.items()):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"an interval or a replicate of {name} is not finite")


ANEW = ("restore the file, or delete it and run  ldm-scaling sweep  (or whichever command wrote "
        "it), which measures anew what it held")
"""What to do about a damaged file of measurements: most that reads one measures nothing."""


def read(path: epath.PathLike) -> Record:
    """Reads one record. Raises `UserError` when the file is damaged, a value is not of its type or
    not finite, or its key does not fit."""
    path = epath.Path(path)
    try:
        payload = json.loads(path.read_text())
        if payload.pop("format") != FORMAT:
            raise ValueError("another format")
        key = payload.pop("key")
        identity = Identity(**payload.pop("identity"))
        intervals = {k: (v[0], v[1]) for k, v in payload.pop("intervals").items()}
        first = payload.pop("first", None)
        first = None if first is None else First(**first)
        record = Record(identity=identity, intervals=intervals, first=first, **payload)
        _check(record)
        if not key == identity.key == path.stem:
            raise ValueError(f"its key says {key}, its contents {identity.key}")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, IsADirectoryError) as e:
        raise UserError(f"the record {path} is damaged ({e}): {ANEW}") from e
    return record


def read_all(directory: epath.PathLike) -> list[Record]:
    """All records of a folder, in a stable order. An empty or missing folder gives [].

    Files whose names are no record's are left alone, with a warning of those that end in .json.
    Raises `UserError` as `read` does, with how many are damaged where several are.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    paths = sorted(p for p in directory.glob("*.json") if not p.name.startswith("."))
    strange = [p.name for p in paths if not NAME.fullmatch(p.name)]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        log.warning("%s holds files that are no records and are not read: %s%s", directory,
                    ", ".join(strange[:3]), more)
    found, errors = [], []
    for path in (p for p in paths if NAME.fullmatch(p.name)):
        try:
            found.append(read(path))
        except UserError as e:
            errors.append(e)
    if errors:
        several = f"{len(errors)} records in {directory} are damaged. The first: "
        raise UserError(f"{several if len(errors) > 1 else ''}{errors[0]}") from errors[0]
    return sorted(found, key=lambda r: dataclasses.astuple(r.identity))


def missing(directory: epath.PathLike, wanted: Iterable[Identity]) -> list[Identity]:
    """Those of `wanted` that have no record yet."""
    return [i for i in wanted if not path_of(directory, i.key).exists()]
