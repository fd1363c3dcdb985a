"""A synthetic study with a known truth, in the records' own form, for the tests of this room."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.study import advice, options
from ldm_scaling.study.budgets import Budget
from ldm_scaling.study.records import Identity, Record

CHANNELS = {"c8": 8, "c16": 16, "c24": 24, "c32": 32, "c48": 48}
STEPS = {"ddim": (4, 6, 10, 20, 50), "ddpm": (4, 6, 10, 20, 50), "dpmpp_2m": (4, 6, 10, 20)}
GUIDANCE = (1.5, 3.0, 5.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the records are drawn from.

    FD = floor + bend / steps^power * (sampler factor) + dish * log(w / w*)^2, where the floor
    falls and the bend rises with width, so that small sizes win small budgets. `w*` falls with
    steps. Everything is deterministic given the cell; noise is added to it.
    """

    floors: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"c8": 52.0, "c16": 44.0, "c24": 40.5, "c32": 38.5, "c48": 36.0}
    )
    bend: float = 230.0
    power: float = 1.15
    dish: float = 9.0
    sampler: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"ddim": 1.0, "ddpm": 1.7, "dpmpp_2m": 0.8}
    )

    def best_rate(self, steps: int) -> float:
        """The guidance rate with the smallest distance."""
        return 7.0 * steps**-0.3

    def distance(self, model: str, sampler: str, steps: int, guidance: float) -> float:
        """The true Fréchet distance of a cell."""
        return (
            self.floors[model]
            + self.bend * self.sampler[sampler] / steps**self.power
            + self.dish * np.log(guidance / self.best_rate(steps)) ** 2
        )

    def agreement(self, model: str, sampler: str, steps: int, guidance: float) -> float:
        """The true caption agreement of a cell."""
        width = CHANNELS.get(model, 16)
        return 0.2 + 0.03 * np.log(width / 8) + 0.04 * np.log(guidance) - 0.1 / steps


def flat_truth(models: tuple[str, ...]) -> Truth:
    """Sizes that do not differ, at any step count or guidance."""
    return Truth(dict.fromkeys(models, 40.0), bend=0.0, dish=0.0)


def norm_cost(model: str) -> float:
    """Relative GFLOPs of a small U-Net; the widest is 1."""
    def gflops(c: int) -> float:
        return 0.0015 * c**2 + 0.02 * c + 0.05

    return gflops(CHANNELS[model]) / gflops(48)


def make(
    truth: Truth | None = None,
    *,
    models: tuple[str, ...] = tuple(CHANNELS),
    samplers: tuple[str, ...] = tuple(STEPS),
    steps: dict[str, tuple[int, ...]] | None = None,
    guidance: tuple[float, ...] = GUIDANCE,
    noise: float = 0.6,
    shared: float = 1.5,
    replicates: int = 200,
    num_images: int = 512,
    report_blocks: tuple[int, ...] = (1,),
    seed: int = 0,
) -> list[Record]:
    """Records of a whole study: every rate on block 0, the best of each cell on those that report.

    Args:
      truth: see `Truth`.
      models: the sizes.
      samplers: the samplers.
      steps: step counts of every sampler.
      guidance: rates on block 0.
      noise: standard deviation of the error that every cell has alone.
      shared: standard deviation of the error that all cells of a block share (its prompts).
      replicates: bootstrap replicates on these. They scatter about the cell's noisy value as
        that value scatters about the truth, which is what a bootstrap aims at.
      num_images: images of a block.
      report_blocks: the blocks that report.
      seed: of all the noise.
    """
    truth, steps = truth or Truth(), steps or STEPS
    rng = np.random.default_rng(seed)
    common = dict(zip((0, *report_blocks), rng.normal(0, shared, 1 + len(report_blocks)),
                      strict=True))
    common_R = {block: rng.normal(0, shared, replicates) for block in report_blocks}
    out = []

    def record(model: str, sampler: str, n: int, rate: float, block: int) -> Record:
        true = {
            "fd_effnetlite0": truth.distance(model, sampler, n, rate),
            "caption_agreement": truth.agreement(model, sampler, n, rate),
        }
        scale = {"fd_effnetlite0": 1.0, "caption_agreement": 0.002}
        metrics, intervals, drawn = {}, {}, {}
        for name, value in true.items():
            metrics[name] = float(value + scale[name] * (common[block] + rng.normal(0, noise)))
            if block and replicates:
                noise_R = common_R[block] + rng.normal(0, noise, replicates)
                values_R = metrics[name] + scale[name] * noise_R
                drawn[name] = [float(v) for v in values_R]
                low, high = np.percentile(values_R, (2.5, 97.5))
                intervals[name] = (float(low), float(high))
        identity = Identity(
            model=model, model_hash=f"{model}-hash", train_step=2000, sampler=sampler, steps=n,
            spacing="leading", guidance=rate, seed_block=block, num_images=num_images,
            reference_hash="ref", version="1",
        )
        c = CHANNELS[model]
        cost = norm_cost(model)
        return Record(
            identity=identity, base_channels=c, params=430 * c**2 + 9000 * c, gflops=2.1 * cost,
            norm_cost=cost, calls=n, metrics=metrics, intervals=intervals, replicates=drawn,
            seconds_per_image=0.004 + 0.011 * (0.15 + cost) * n, device="2 CPU cores",
        )

    for model in models:
        for sampler in samplers:
            for n in steps[sampler]:
                block_0 = [record(model, sampler, n, rate, 0) for rate in guidance]
                best = min(block_0, key=lambda r: r.metrics["fd_effnetlite0"])
                out += block_0
                out += [record(model, sampler, n, best.identity.guidance, b) for b in report_blocks]
    return out


def trained_again(
    records: list[Record], runs: int, luck: float, *, seed: int = 0, select: bool = True,
    models: tuple[str, ...] = tuple(CHANNELS),
) -> list[Record]:
    """The records, of whose sizes each run has luck of its own, and those of further runs of some
    sizes, at the rates that are reported: on block 0 too if `select`.

    A run's luck multiplies its distances, in all cells by one factor and in each by another whose
    logarithm has half the deviation; caption agreement stays.
    """
    rng = np.random.default_rng([seed, 11])
    factors: dict[tuple, float] = {}

    def factor(run: int, *of: object) -> float:
        model = of[0]
        for key, sd in (((run, model), luck), ((run, *of), luck / 2)):
            if key not in factors:
                factors[key] = float(np.exp(rng.normal(0, sd))) if luck else 1.0
        return factors[run, model] * factors[run, *of]

    def lucky(r: Record, run: int) -> Record:
        i, name = r.identity, "fd_effnetlite0"
        by = factor(run, i.model, i.sampler, i.steps)
        out = dataclasses.replace(
            r, metrics=r.metrics | {name: by * r.metrics[name]},
            replicates={n: [by * v for v in own] if n == name else own
                        for n, own in r.replicates.items()},
            intervals={n: (by * low, by * high) if n == name else (low, high)
                       for n, (low, high) in r.intervals.items()})
        if not run:
            return out
        return dataclasses.replace(
            out, repeats=i.model_hash, run=run,
            identity=dataclasses.replace(i, model_hash=f"{i.model_hash}-run{run}"))

    told = {(i.model, i.sampler, i.steps, i.guidance) for i in (r.identity for r in records)
            if i.seed_block}
    return [lucky(r, 0) for r in records] + [
        lucky(r, run) for run in range(1, runs) for r in records for i in [r.identity]
        if i.model in models and (i.seed_block or select)
        and (i.model, i.sampler, i.steps, i.guidance) in told
    ]


def students(
    records: list[Record], task: str = "consistency", better: float = 0.0, *,
    models: tuple[str, ...] = ("c8", "c16"), steps: tuple[int, ...] = (4, 6), told: bool = False,
    sampler: str = "codi", setting: str = "codi_1",
) -> list[Record]:
    """Students of some sizes in few steps, each its teacher's DDIM cell with a distance that is
    smaller by `better`."""
    return [
        dataclasses.replace(
            r, task=task, told=told, setting=setting,
            metrics=r.metrics | {"fd_effnetlite0": r.metrics["fd_effnetlite0"] - better},
            replicates={k: [v - better * (k == "fd_effnetlite0") for v in values]
                        for k, values in r.replicates.items()},
            intervals={},
            identity=dataclasses.replace(
                r.identity, sampler=sampler, model_hash=f"{r.identity.model}-{task}",
                train_step=200),
        )
        for r in records
        if r.identity.model in models and r.identity.sampler == "ddim" and r.identity.steps in steps
    ]


def training(models: tuple[str, ...] = tuple(CHANNELS)) -> dict[str, list[list[float | None]]]:
    """Loss curves: [step, train loss, validation loss (every fifth point)]."""
    rng = np.random.default_rng(1)
    out = {}
    for model in models:
        steps = np.arange(20, 2001, 20)
        loss = 0.9 / np.log(CHANNELS[model]) * (1 + 6 / np.sqrt(steps)) ** 1.2
        noisy = loss * (1 + rng.normal(0, 0.03, len(steps)))
        out[model] = [
            [int(s), float(a), float(b) if n % 5 == 4 else None]
            for n, (s, a, b) in enumerate(zip(steps, noisy, loss * 1.02, strict=True))
        ]
    return out


def images(models: tuple[str, ...] = tuple(CHANNELS), n: int = 6, size: int = 32) -> dict:
    """Discs on a background, noisier where the truth's distance is larger."""
    truth, rng = Truth(), np.random.default_rng(2)
    y, x = np.mgrid[:size, :size] / size - 0.5
    hue_N3 = np.array([[200, 60, 60], [60, 120, 200], [80, 170, 90], [230, 180, 50],
                       [150, 90, 180], [90, 90, 90], [20, 160, 160], [240, 130, 180]])
    out = {}
    for model in models:
        for sampler, counts in STEPS.items():
            for steps in counts:
                level = truth.distance(model, sampler, steps, truth.best_rate(steps)) - 34
                pictures = []
                for k in range(n):
                    disc = (np.hypot(x, y * (1 + 0.1 * k)) < 0.32)[..., None]
                    picture = np.where(disc, hue_N3[k % 8], hue_N3[(k + 3) % 8] * 0.3 + 170)
                    noise = rng.normal(0, 1.1 * level, picture.shape)
                    pictures.append(np.clip(picture + noise, 0, 255).astype(np.uint8))
                out[model, sampler, steps] = np.stack(pictures)
    return out


CAPTIONS = ["a red circle on a pale yellow field", "a blue ball <b>& \"quotes\"</b>",
            "a green disc", "an amber sun on a grey sky", "a violet plum", "a $grey^stone"]


def untimed(records, lacking=lambda identity: True):
    """Records of which some hold no measured seconds."""
    return [dataclasses.replace(r, seconds_per_image=0.0) if lacking(r.identity) else r
            for r in records]


def within(records, budget, unit="cost", **kw):
    """Advice on them within a budget."""
    return advice.advise(options.of_records(records, unit, **kw), Budget(budget, unit))


def cell(p):
    """The cell that a point is of."""
    return p.model, p.sampler, p.steps
