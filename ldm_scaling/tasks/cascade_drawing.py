"""Drawing with two networks in a row: small pictures, and large ones of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ldm_scaling.config import Cascade
from ldm_scaling.sampling import packing, sampler
from ldm_scaling.sampling.guidance import Correction
from ldm_scaling.sampling.lanes import Finished
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.table import SamplerTable
from ldm_scaling.tasks import cascade as cascade_task
from ldm_scaling.tasks.drawing import Drawer

_FIRST, _NOISE = 1, 2  # Keys of their own; the second stage draws a single network's noise.


class CascadeDrawer:
    """Draws with two networks in a row; to a sweep or a gallery it is a `Drawer` whose parameters
    are a pair, whose tables are the second stage's and whose guidance rates are the first's.

    Args:
      first: draws the small pictures.
      second: draws the large ones.
      cascade: the config's.
    """

    def __init__(self, first: Drawer, second: Drawer, cascade: Cascade):
        self.first, self.second, self.cascade = first, second, cascade
        self.frozen, self.mesh, self.batch_size = second.frozen, second.mesh, second.batch_size
        self.table, self.decode = second.table, second.decode
        self.program = {"first": first.program, "second": second.program}
        self.before: SamplerTable | None = None
        self._seconds: dict[tuple[str, bool, Correction, str], tuple[float, float]] = {}

    def after(self, steps: int) -> CascadeDrawer:
        """The same, drawing the first stage in so many steps."""
        other, cascade = copy.copy(self), self.cascade
        other.before = self.first.table(cascade.first_sampler, steps, cascade.first_spacing)
        return other

    def _upper(self, configurations: Sequence[Configuration]) -> list[Configuration]:
        rate = self.cascade.upper_guidance
        return [dataclasses.replace(c, guidance=rate) for c in configurations]

    @staticmethod
    def _alike(configurations: Sequence[Configuration]) -> list[list[int]]:
        """Numbers of those that differ in the second stage alone, of which the first is drawn once.
        """
        kinds: dict[tuple, list[int]] = {}
        for number, c in enumerate(configurations):
            kind = (c.guidance, c.index_N.tobytes(), c.prompt_N.tobytes())
            kinds.setdefault(kind, []).append(number)
        return list(kinds.values())

    def plans(self, configurations: Sequence[Configuration]) -> list[packing.Plan]:
        """Where each sample of the second stage runs, see `Lanes.plans`."""
        return [
            plan for some in self._alike(configurations)
            for plan in self.second.plans(self._upper([configurations[i] for i in some]))
        ]

    def split(self, configurations: Sequence[Configuration]) -> list[tuple[bool, list[int]]]:
        """By whether the first stage is guided, see `packing.split`."""
        return self.first.split(configurations)

    def small(
        self, params: Any, configuration: Configuration, ctx_PLD: np.ndarray, key: jax.Array
    ) -> np.ndarray:
        """The first stage's latents, (N, h, w, C), without noise.

        Args:
          params: of the first network alone.
          configuration: whose guidance, numbers and prompts these are; its table does not matter.
          ctx_PLD, key: see `Drawer.draw`.
        """
        out_NhwC = self._no_small(configuration)
        for _ in self._filled(out_NhwC, params, configuration, ctx_PLD, key):
            pass
        return out_NhwC

    def _no_small(self, configuration: Configuration) -> np.ndarray:
        shape = (len(configuration.index_N), *self.first.frozen.latent_shape)
        return np.zeros(shape, np.float32)

    def _filled(
        self, out_NhwC: np.ndarray, params: Any, configuration: Configuration, ctx_PLD: np.ndarray,
        key: jax.Array,
    ) -> Iterator[Finished]:
        """Writes `small` into an array, and tells of the rows that it takes, without samples."""
        nothing = np.zeros((0, *self.frozen.latent_shape), np.float32)
        before = dataclasses.replace(configuration, table=self.before)
        for done in self.first.draw(params, [before], ctx_PLD, jax.random.fold_in(key, _FIRST)):
            out_NhwC[done.position] = done.latents_JHWC
            yield done._replace(
                configuration=done.configuration[:0], position=done.position[:0],
                latents_JHWC=nothing, first=True,
            )

    def _noised(self, low_NhwC: np.ndarray, index_N: np.ndarray, key: jax.Array) -> np.ndarray:
        """With noise of the level that is drawn with, a function of (key, number) alone."""
        level = self.cascade.level
        if not level:
            return low_NhwC
        key, shape = jax.random.fold_in(key, _NOISE), low_NhwC.shape[1:]
        return np.concatenate([
            cascade_task.noised(low_NhwC[some], sampler.normal(key, index_N[some], 0, shape), level)
            for some in np.array_split(np.arange(len(index_N)), -(-len(index_N) // 1024))
        ])

    def draw(
        self, params: Any, configurations: Sequence[Configuration], ctx_PLD: np.ndarray,
        key: jax.Array, condition_PHWC: None = None,
    ) -> Iterator[Finished]:
        """The second stage's latents as they end, see `Lanes.run`. Before them the first stage is
        drawn, once for all configurations that differ in the second alone, and these are whole
        before the next ones begin: one rate's small latents are held at a time.

        Args:
          params: of the first network and of the second.
          configurations: see the class.
          ctx_PLD, key: see `Drawer.draw`.
          condition_PHWC: there is none but what the first stage draws.
        """
        for some in self._alike(configurations):
            one = configurations[some[0]]
            low_NhwC = self._no_small(one)
            yield from self._filled(low_NhwC, params[0], one, ctx_PLD, key)
            drawn = self._large(
                params[1], [configurations[i] for i in some],
                self._noised(low_NhwC, one.index_N, key), ctx_PLD, key,
            )
            for done in drawn:
                yield done._replace(configuration=np.array(some)[done.configuration])

    def _large(
        self, params: Any, configurations: Sequence[Configuration], low_NhwC: np.ndarray,
        ctx_PLD: np.ndarray, key: jax.Array,
    ) -> Iterator[Finished]:
        """The second stage, of small latents that all these have in common."""
        prompt_N = configurations[0].prompt_N
        upper = [dataclasses.replace(c, prompt_N=np.arange(len(prompt_N)))
                 for c in self._upper(configurations)]

        def cond_of(row_M: np.ndarray) -> dict[str, np.ndarray]:
            level_M = np.full(len(row_M), self.cascade.level, np.float32)
            condition = cascade_task.seen(low_NhwC[row_M], level_M, self.cascade)
            return {"context": ctx_PLD[prompt_N[row_M]], "condition": condition}

        # Guidance is away from the caption: both evaluations see the small picture (Imagen,
        # arXiv 2205.11487).
        uncond = {"context": self.frozen.null_ctx_LD[None]}
        return self.second.lanes.run(params, upper, cond_of, uncond, key)

    pictures = Drawer.pictures  # All that it needs of a drawer is here.

    def seconds(
        self, params: Any, configuration: Configuration, ctx_PLD: np.ndarray, key: jax.Array,
        condition_PHWC: None = None,
    ) -> tuple[float, float]:
        """Measured seconds of one row of the second stage, and of all else that one picture needs:
        its first stage and decoding, see `Drawer.seconds`."""
        (upper,) = self._upper([configuration])
        before = dataclasses.replace(configuration, table=self.before)
        height, width, deep = self.frozen.latent_shape
        deep = cascade_task.channels(self.cascade, deep)
        nothing = np.zeros((len(ctx_PLD), height, width, deep), np.float32)
        stages = (
            ("first", self.first, params[0], before, None),
            ("second", self.second, params[1], upper, nothing),
        )
        found = []
        for name, drawer, weights, one, condition in stages:
            table, guided = one.table, one.guidance != 1 and bool(one.table.g.any())
            kind = (name, guided, table.correction, table.name if table.partly else "")
            if kind not in self._seconds:
                self._seconds[kind] = drawer.seconds(weights, one, ctx_PLD, key, condition)
            found.append(self._seconds[kind])
        (first_row, _), (second_row, decode) = found
        return second_row, self.before.calls * first_row + decode
