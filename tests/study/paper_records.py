"""Synthetic records of the paper's shape, with a planted truth: 10 sizes, 3 samplers, 6 step
counts and 8 guidance rates, and one small set for every other task."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.models import zoo
from ldm_scaling.study.records import Identity, Record

MEMBERS = {m.name: m for m in zoo.PAPER[:10]}
SIZES = tuple(MEMBERS)
STEPS = (4, 6, 8, 10, 20, 50)
SAMPLERS = {"ddim": 1.0, "ddpm": 1.8, "dpmpp_2m": 0.7}
GUIDANCE = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
CHECKPOINTS = (50_000, 100_000, 200_000, 350_000)
LAST = 500_000
FID, CLIP = "fid_tf2015", "clip_score_l14"


def floor(model: str, train_step: int = LAST) -> float:
    """The FID that infinitely many steps would reach: it falls as training goes on."""
    return 0.8 * MEMBERS[model].published.fid * (LAST / train_step) ** 0.12


def best_rate(steps: int) -> float:
    """The guidance rate with the smallest FID."""
    return 8.0 * steps**-0.25


def fid(model: str, sampler: str, steps: int, guidance: float, train_step: int = LAST) -> float:
    """The true FID of a cell. What a step count lacks is the same for all sizes, so that at equal
    cost small ones are better where the budget is small."""
    dish = 5.0 * np.log(guidance / best_rate(steps)) ** 2
    return floor(model, train_step) + 110 * SAMPLERS[sampler] / steps**1.3 + dish


def clip(model: str, steps: int, guidance: float) -> float:
    """The true CLIP score of a cell: guidance goes on raising it."""
    return MEMBERS[model].published.clip + 0.006 * np.log(guidance) - 0.05 / steps


class Maker:
    """Draws records about the truth.

    Args:
      noise: relative error that every cell has alone.
      shared: relative error that all cells of a seed block share.
      replicates: on the report block.
      seed: of all the noise.
    """

    def __init__(self, noise: float = 0.006, shared: float = 0.012, replicates: int = 60,
                 seed: int = 0):
        self.noise, self.replicates = noise, replicates
        self.rng = np.random.default_rng(seed)
        self.common = self.rng.normal(0, shared, 2)
        self.common_R = self.rng.normal(0, shared, replicates)

    def record(self, model, sampler, steps, guidance, block, truth, *, train_step=LAST,
               task="text_to_image", scale=1.0) -> Record:
        """One record; `truth` is measure -> true value, `scale` shrinks the error."""
        member = MEMBERS[model]
        metrics, intervals, drawn = {}, {}, {}
        for name, value in truth.items():
            small = scale * (0.1 if value < 1 else 1.0)
            error = small * (self.common[block] + self.rng.normal(0, self.noise))
            metrics[name] = float(value * (1 + error))
            if block and self.replicates:
                errors_R = small * (self.common_R + self.rng.normal(0, self.noise, self.replicates))
                drawn[name] = [float(v) for v in metrics[name] * (1 + errors_R)]
                intervals[name] = tuple(float(v) for v in np.percentile(drawn[name], (2.5, 97.5)))
        cost = member.published.norm_cost
        return Record(
            Identity(model, f"{model}-{task}", train_step, sampler, steps, "leading", guidance,
                     block, 30_000, "coco", "1"),
            base_channels=member.spec.base_channels, params=int(1e6 * member.published.params),
            gflops=789.3 * cost, norm_cost=cost, calls=steps, metrics=metrics, intervals=intervals,
            replicates=drawn, seconds_per_image=0.02 + 0.011 * (0.1 + cost) * steps,
            device="synthetic", task=task,
        )

    def cell(self, model, sampler, steps, rates=GUIDANCE, **more) -> list[Record]:
        """Every rate on block 0, the best of them on block 1."""
        step = more.get("train_step", LAST)

        def at(rate, block):
            truth = {FID: fid(model, sampler, steps, rate, step), CLIP: clip(model, steps, rate)}
            return self.record(model, sampler, steps, rate, block, truth, **more)

        chosen = [at(rate, 0) for rate in rates]
        best = min(chosen, key=lambda r: r.metrics[FID])
        return [*chosen, at(best.identity.guidance, 1)]


def grid(samplers=tuple(SAMPLERS), sizes=SIZES, steps=STEPS, rates=GUIDANCE,
         **noise) -> list[Record]:
    """The main study."""
    maker = Maker(**noise)
    return [r for m in sizes for s in samplers for n in steps for r in maker.cell(m, s, n, rates)]


def checkpoints(sizes=SIZES, **noise) -> list[Record]:
    """Earlier steps of the main study's training."""
    maker = Maker(seed=1, **noise)
    return [r for m in sizes for t in CHECKPOINTS
            for r in maker.cell(m, "ddim", 50, (2.0, 3.0, 4.0), train_step=t)]


def super_resolution(sizes=SIZES, **noise) -> list[Record]:
    """Without guidance, on the report block alone, at several lengths of fine-tuning."""
    maker, out = Maker(seed=2, **noise), []
    for m in sizes:
        for t, counts in ((5_000, (50,)), (10_000, (50,)), (20_000, (4, 6, 8, 10, 20, 50, 100,
                                                                     250))):
            for n in counts:
                far = floor(m) * (20_000 / t) ** 0.1 + 40 / n
                truth = {FID: 0.6 * far, "lpips_alex": 0.012 * far, "inception_score": 300 / far}
                out.append(maker.record(m, "ddim", n, 1.0, 1, truth, train_step=t,
                                        task="super_resolution"))
    return out


def distilled(sizes=SIZES, **noise) -> list[Record]:
    """In 4 steps a hair worse than undistilled in 20: a speed-up of 5."""
    maker = Maker(seed=3, **noise)
    truth = {m: 1.001 * min(fid(m, "ddim", 20, rate) for rate in GUIDANCE) for m in sizes}
    return [maker.record(m, "lcm", 4, 1.0, 1, {FID: truth[m]}, train_step=50_000,
                         task="consistency") for m in sizes]


def guided(sizes=("83m", "223m"), **noise) -> list[Record]:
    """Students of 16, 8 and 4 steps, each measured at its own and at fewer; the larger gains and
    the smaller loses."""
    maker = Maker(seed=4, **noise)
    return [
        dataclasses.replace(
            maker.record(m, "ddim", n, 1.0, 1, {FID: floor(m) + (30 + 40 * k + own / 4) / n},
                         train_step=k * 1000 + 10_000 * place, task="guided_distillation"),
            told=True, student_steps=own,
        )
        for k, m in enumerate(sizes) for place, own in enumerate((16, 8, 4), 1)
        for n in (4, 8, 16) if n <= own
    ]


def dreambooth(sizes=SIZES, **noise) -> list[Record]:
    """Fidelity rises with size."""
    maker, out = Maker(seed=5, **noise), []
    for m in sizes:
        gain = 0.05 * np.log(MEMBERS[m].published.params / 38.8)
        truth = {"dino": 0.5 + gain, "clip_i": 0.7 + 0.6 * gain, "clip_t": 0.3 + 0.1 * gain}
        out.append(maker.record(m, "ddim", 50, 7.5, 1, truth, train_step=400, task="dreambooth"))
    return out


def everything() -> list[Record]:
    """All of them together."""
    return [*grid(), *checkpoints(), *super_resolution(), *distilled(), *guided(), *dreambooth()]


def losses(sizes=SIZES) -> dict[str, list]:
    """Loss curves: [step, train loss, validation loss (every fifth)]."""
    rng = np.random.default_rng(6)
    out = {}
    for k, m in enumerate(sizes):
        steps = np.arange(5000, LAST + 1, 5000)
        loss = 0.16 * (1 - 0.02 * k) * (1 + 40 / np.sqrt(steps))
        noisy = loss * (1 + rng.normal(0, 0.01, len(steps)))
        out[m] = [[int(s), float(a), float(b) if i % 5 == 4 else None]
                  for i, (s, a, b) in enumerate(zip(steps, noisy, loss * 1.01, strict=True))]
    return out


def images(sizes=SIZES, n: int = 6, side: int = 24) -> dict:
    """Discs, noisier where the truth is worse."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:side, :side] / side - 0.5
    disc = (np.hypot(x, y) < 0.32)[..., None]
    out = {}
    for m in sizes:
        for count in STEPS:
            level = fid(m, "ddim", count, best_rate(count)) - 15
            out[m, "ddim", count] = np.stack([
                np.clip(np.where(disc, 40 * k, 220 - 20 * k) + rng.normal(0, 4 * level,
                                                                         (side, side, 3)), 0, 255)
                for k in range(n)
            ]).astype(np.uint8)
    return out


CAPTIONS = [f"caption number {k} of a coloured disc" for k in range(6)]
