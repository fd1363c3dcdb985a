"""What a task is: the three functions that the one loop trains, and what it shows on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError


class Beside(NamedTuple):
    """What a loss sees beside its parameters, and has no gradient in.

    Attributes:
      frozen: the task's, such as a teacher or an autoencoder.
      average: the exponential moving average of the parameters, before the step.
    """

    frozen: Any
    average: Any


def _nothing(params: Any, step: int) -> dict[str, Any]:
    return {}


def _sound(averages: dict[str, float]) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
      name: in logs and progress bars.
      init: `init(key) -> params`.
      start: gives the parameters that a run begins with, where they are not `init`'s: of the same
        shapes, on the run's mesh. Not called where the run goes on.
      make_batch: `make_batch(host_batch) -> batch`, numpy to numpy, on the host.
      loss: `loss(params, batch, key) -> (scalar, {name: scalar})`, traced; with `frozen`
        `loss(params, batch, key, beside)`, see `Beside`.
      validate: `validate(params, step) -> {name: float}`.
      show: `show(params, step) -> {name: uint8 image (H, W, 3)}`; where it raises `UserError`, the
        run goes on without. With several processes all call both.
      flops_per_example: gives those of training, forward and backward, without what is recomputed;
        None has XLA count the lowered step.
      frozen: arrays on the run's mesh that a step reads and leaves alone: an argument of the
        compiled step, neither a constant in it nor donated, nor part of a checkpoint.
      diverges: `diverges(averages) -> what is wrong`, in words or empty, of the metrics' averages
        over `log_every` steps. What is wrong ends the run, without a checkpoint of that step.
      rates: by parameter, what the optimiser's steps are multiplied by; None where by 1 alone.
      project: `project(params) -> params`, traced: what parameters are brought back to after every
        step, before they are averaged, such as weights of unit norm; None leaves them.
      ranks: those of `validate`'s scalars that checkpoints may be ranked by, the lower the better;
        empty where they are known once it has run.
    """

    name: str
    init: Callable[[jax.Array], Any]
    make_batch: Callable[[dict[str, np.ndarray]], Any]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    validate: Callable[[Any, int], dict[str, float]] = _nothing
    show: Callable[[Any, int], dict[str, np.ndarray]] = _nothing
    flops_per_example: Callable[[], float] | None = None
    start: Callable[[], Any] | None = None
    frozen: Any = None
    diverges: Callable[[dict[str, float]], str] = _sound
    rates: Any = None
    project: Callable[[Any], Any] | None = None
    ranks: tuple[str, ...] = ()


def check_metric(run: str, config: Train, known: Iterable[str]) -> None:
    """Raises `UserError` where the best checkpoints of a run cannot be told.

    Args:
      run: its key, in the message.
      config: the run.
      known: the validation scalars that there are.
    """
    if config.keep_best and config.keep_metric not in known:
        raise UserError(
            f"{run}.keep_metric={config.keep_metric!r} is no validation scalar that is "
            f"better when lower: name one of {sorted(known)}, or set keep_best=0"
        )
