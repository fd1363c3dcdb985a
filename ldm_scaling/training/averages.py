"""Averages of any length, made after training (post-hoc EMA): Karras et al. 2024 (EDM2, arXiv
2312.02696), section 3. A run tracks power-function averages of one or more lengths beside its `ema`
and leaves snapshots of them; an average of another length is a sum of these, see `profiles`.

    RUN/averages/STEP/    a tree of parameters for each of `train.averages`, float32
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_scaling.config import Train
from ldm_scaling.config.training import LENGTHS
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.training import checkpoint, consensus, profiles
from ldm_scaling.training.saver import Saver, StoreError

FOLDER = "averages"
TOLERANCE = 0.1
"""Largest `profiles.Mix.residual` of an average that is made: what is further off is another one.
"""
# Weights below this share of the largest are left out: float32 parameters know no such part.
_NOTHING = 1e-8
# Lengths that are tried for the words of an error, as these say them.
_TRIED = sorted({n for n in (float(f"{n:.2g}") for n in np.geomspace(*LENGTHS, 60))
                 if LENGTHS[0] <= n <= LENGTHS[1]})


def updated(averages: Any, rests: Any, params: Any, step: jax.Array) -> tuple[Any, Any]:
    """The averages and their rests after a step, beta(t) = (1 - 1/t)^(gamma + 1) of what they were
    (eq. 127).

    Half a million steps in a step is 1e-5 of the way, and less than float32 tells of most averages:
    what a sum loses is kept and added at the next step (Kahan's summation), in bfloat16.

    Args:
      averages, rests: length -> average, as `TrainState` has them, or ().
      params: after the step, projected.
      step: its number t, from 1.
    """
    if not averages:
        return averages, rests
    t = step.astype(jnp.float32)
    # In float32 1 - beta of a long run would be all rounding, and two factors that do not sum to 1
    # would let parameters drift that do not move.
    log = jnp.log1p(-1.0 / t)

    def more(length: str) -> Any:
        rate = -jnp.expm1((profiles.gamma_of(float(length)) + 1.0) * log)
        return jax.tree.map(lambda a, r, p: rate * (p - a) + r.astype(a.dtype), averages[length],
                            rests[length], params)

    mores = {length: more(length) for length in averages}
    sums = jax.tree.map(jnp.add, averages, mores)
    return sums, jax.tree.map(
        lambda a, m, s, r: (m - (s - a)).astype(r.dtype), averages, mores, sums, rests)


class Snapshots:
    """A run's folder of snapshots, one subfolder a step, complete or absent.

    Use as a context manager. With several processes, all call all of it at the same steps.

    Args:
      name: of the run, in messages.
      directory: of the run.
      config: the run's.
      start: the step that it goes on from. Snapshots of later steps are made again.
      about: see `loop.fit`.
    """

    def __init__(
        self, name: str, directory: epath.PathLike, config: Train, start: int,
        about: dict[str, Any] | None,
    ):
        self._name, self._config, self._about = name, config, about
        self._folder: checkpoint.Checkpoints | None = None
        if not config.averages:
            return
        folder = epath.Path(directory) / FOLDER
        if hosts.is_lead():
            for step in checkpoint.steps_of(folder):
                if step > start:
                    (folder / str(step)).rmtree()
        consensus.everyone(0)  # No process looks before that.
        self._folder = checkpoint.Checkpoints(folder, keep=None, apart=FOLDER)
        self._averages: Any = ()
        newest = int(consensus.everyone(self._folder.latest() or 0)[0, 0])
        self._saver = Saver(
            name, self._folder, config, newest, lambda step: None, self._begin, "snapshot"
        )

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, *error) -> None:
        if self._folder is not None:
            self._folder.__exit__(*error)

    def trouble(self) -> str | None:
        """See `Saver.trouble`."""
        return None if self._folder is None else self._saver.trouble()

    def save(
        self, step: int, averages: Any, settle: Callable[[], int],
        tell: Callable[[], None] = lambda: None, ends: Callable[[], bool] = lambda: False,
    ) -> None:
        """Writes a step's snapshot where one is due and not there, and returns when it is on disk.

        Args:
          step: which.
          averages: of `TrainState`.
          settle: where this fails for good, waits for other saves; gives the step that is on disk.
          tell, ends: see `Saver.finish`.
        Raises:
          StoreError: it could not be written for ten minutes.
          Interrupted: it could not, and the run is to end.
        """
        if not self._config.snapshot_due(step):
            return
        self._averages = averages
        try:
            self._saver.finish(step, tell, ends)
        except StoreError as e:
            what = f"at step {step}, whose averages cannot be written ({self._saver.why})"
            saved = settle()
            if ends():
                raise Interrupted(
                    f"{self._name} stopped by SIGTERM {what}; step {saved} is saved") from e
            raise StoreError(f"{self._name}: stopped {what}. The same command goes on from step "
                             f"{saved}") from e
        finally:
            self._averages = ()

    def _begin(self, step: int) -> None:
        self._folder.save_trees(step, {FOLDER: self._averages}, self._about)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A tracked average in a snapshot, and its weight in a sum."""

    step: int
    length: str
    weight: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """An average of a length as a sum of tracked ones.

    Attributes:
      step, length: of it.
      parts: what it is the sum of.
      residual: how far the profile is met, see `profiles.Mix`.
    """

    step: int
    length: float
    parts: Sequence[Part]
    residual: float


def _folder(directory: epath.PathLike) -> epath.Path:
    # Orbax reads from no relative path.
    return epath.Path(os.path.abspath(directory)) / FOLDER


def kept(directory: epath.PathLike, step: int) -> bool:
    """Whether a run has a snapshot of a step."""
    return step in checkpoint.steps_of(_folder(directory))


def require(directory: epath.PathLike, step: int) -> list[int]:
    """The steps of a run's snapshots. Raises `UserError` where there is none of this one."""
    folder = _folder(directory)
    steps = checkpoint.steps_of(folder)
    if step not in steps:
        have = f"holds snapshots of steps {', '.join(map(str, steps))}" if steps else (
            "holds no snapshots: averages of other lengths are made of those that a run leaves "
            "with train.averages=(0.05, 0.1), which is to be set before it begins")
        again = checkpoint.latest(folder.parent / "checkpoints") == step and bool(steps)
        raise UserError(f"averages at step {step}: {folder} {have}" + (
            ": run  ldm-scaling train  with the same --config and --workdir, which writes that of "
            f"step {step} again from the checkpoint" if again else ""))
    return steps


def recipe(directory: epath.PathLike, step: int, length: float) -> Recipe:
    """How an average is made of a run's snapshots up to its step; reads no parameters.

    Args:
      directory: of the run.
      step: of a snapshot.
      length: relative standard deviation.
    Raises:
      UserError: for a length that is none, or that the snapshots do not give within `TOLERANCE`, a
        step without a snapshot, and a run that has none.
    """
    folder = _folder(directory)
    low, high = LENGTHS
    if not low <= length <= high:
        raise UserError(
            f"an average of length {length:g}: give a relative standard deviation from {low:g} to "
            f"{high:g}"
        )
    steps = require(directory, step)
    tracked = checkpoint.parts_of(folder / str(step), FOLDER)
    if f"{length:g}" in tracked:
        return Recipe(step, length, (Part(step, f"{length:g}", 1.0),), 0.0)
    pairs = [(s, name) for s in steps if s <= step for name in tracked]
    mix = _mixed(pairs, step, length)
    if mix.residual > TOLERANCE:
        raise UserError(
            f"an average of length {length:g} at step {step}: the {len(pairs)} averages in "
            f"{folder} up to there miss its profile by {_above(mix.residual)}, and {TOLERANCE:.0%} "
            f"is allowed: choose a length {_given(pairs, step)}, or train with more snapshots, "
            "train.averages_every"
        )
    most = np.abs(mix.weight_I).max()
    parts = [
        Part(*pair, float(weight)) for pair, weight in zip(pairs, mix.weight_I, strict=True)
        if abs(weight) > _NOTHING * most
    ]
    return Recipe(step, length, parts, mix.residual)


def _above(residual: float) -> str:
    """A residual above `TOLERANCE` with the digits that tell it from that."""
    texts = ((f"{residual:.{d}%}", f"{TOLERANCE:.{d}%}") for d in range(16))
    return next((text for text, most in texts if text != most), f"more than {TOLERANCE:.0%}")


def _given(pairs: Sequence[tuple[int, str]], step: int) -> str:
    """The lengths that snapshots give, in words: ranges whose ends are given, and single ones."""
    tracked = {float(name) for _, name in pairs}  # These are always.
    runs: list[list[float]] = [[]]
    for n in sorted({*_TRIED, *tracked}):
        if n in tracked or _mixed(pairs, step, n).residual <= TOLERANCE:
            runs[-1].append(n)
        elif runs[-1]:
            runs.append([])
    return " or ".join(f"from {run[0]:g} to {run[-1]:g}" if run[1:] else f"of {run[0]:g}"
                       for run in runs if run)


def _mixed(pairs: Sequence[tuple[int, str]], step: int, length: float) -> profiles.Mix:
    gammas = {name: profiles.gamma_of(float(name)) for _, name in pairs}
    return profiles.solve(
        [s for s, _ in pairs], [gammas[name] for _, name in pairs], step,
        profiles.gamma_of(length),
    )


def average(
    directory: epath.PathLike, step: int, length: float, abstract: Any,
    network: Mapping[str, Any] | None = None,
) -> Any:
    """The parameters, averaged over a length; one tracked average at a time is read and added up,
    so that two trees are held at most. Any process may read by itself, onto its own devices.

    Args:
      directory: of the run.
      step, length: see `recipe`.
      abstract: shapes, types and shardings of the parameters.
      network: that they are of, see `checkpoint.check_network`.
    Raises:
      UserError: as `recipe` and `checkpoint.average`.
    """
    folder = _folder(directory)
    found = recipe(directory, step, length)
    if network is not None:
        checkpoint.check_network(folder, step, network)
    # Of all: to open arrays for their shapes takes as long as to read them.
    checkpoint.check_parts(folder / str(step), FOLDER, abstract)
    # Small weights first: what they add to is not yet large.
    first, *rest = sorted(found.parts, key=lambda part: abs(part.weight))

    def read(part: Part) -> Any:
        return checkpoint.read_part(folder / str(part.step), FOLDER, part.length, abstract)

    if not rest:
        return read(first)
    add, scale = _sums(tuple(jax.tree.leaves(jax.tree.map(lambda a: a.sharding, abstract))))
    leaves, structure = jax.tree.flatten(read(first))
    total = scale(leaves, np.float32(first.weight))
    for part in rest:
        total = add(total, jax.tree.leaves(read(part)), np.float32(part.weight))
    return jax.tree.unflatten(structure, total)


@functools.lru_cache(maxsize=8)
def _sums(shardings: tuple[Any, ...]) -> tuple[Callable, Callable]:
    out = {"out_shardings": list(shardings), "compiler_options": hosts.run_once_options()}
    return (
        jax.jit(lambda total, more, weight: [t + weight * m for t, m in zip(
            total, more, strict=True)], donate_argnums=0, **out),
        jax.jit(lambda first, weight: [weight * f for f in first], donate_argnums=0, **out),
    )
