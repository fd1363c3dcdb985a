"""What all training runs of a study share: what they are checked for, their data loaders, whether
they are done, their training where they are not, and what they leave."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from etils import epath

from ldm_scaling.config import Study, Train
from ldm_scaling.config.check import placed
from ldm_scaling.data.loading import loader
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import processes
from ldm_scaling.training import averages, checkpoint, loop, optimizer, step
from ldm_scaling.training.task import Task, check_metric

log = logging.getLogger(__name__)

MANY_PASSES = 100
"""Passes over its pictures from which on a run may draw them again. What Carlini et al. (arXiv
2301.13188, Fig. 5) got out of Stable Diffusion was mostly what its data held 100 times or more."""


def check(name: str, run: Train, mesh: jax.sharding.Mesh, ranks: Sequence[str]) -> None:
    """Raises `UserError` for settings of a run with which it could not begin, or not go on.

    Args:
      name: its key in the config.
      run: the settings.
      mesh: that it is on.
      ranks: see `Task`.
    """
    mesh_lib.check_batch(mesh, run.batch_size, f"config: {name}.batch_size")
    part = run.batch_size // run.micro_batches
    mesh_lib.check_batch(mesh, part, f"config: {name}.batch_size / micro_batches")
    if run.batch_size % jax.process_count():
        raise UserError(
            f"config: {name}.batch_size={run.batch_size} cannot be shared equally by "
            f"{jax.process_count()} processes: use a multiple of them"
        )
    check_metric(f"config: {name}", run, ranks)


def check_factors(name: str, run: Train, networks: Iterable[Any]) -> None:
    """Raises `UserError` for one of a run's `rate_factors` that is of no parameter.

    Args:
      name: the run's key in the config.
      run: its settings.
      networks: shapes of the parameters, of each network that it trains.
    """
    for shapes in networks if run.rate_factors else ():
        with placed("train.", f"{name}."):
            jax.eval_shape(optimizer.make(run).init, shapes)


def passes(study: Study, train: Train, counts: Sequence[int]) -> tuple[float, str]:
    """How often a run sees a picture on average, of several sources by weights one of the source
    that it sees most often; and a sentence on it.

    Args:
      study: whose data it is.
      train: the run's settings.
      counts: training pictures of each source.
    """
    examples, weights = train.steps * train.batch_size, study.data.weights
    shares = zip((w / sum(weights) for w in weights), counts, strict=True) if weights else [
        (1.0, sum(counts))]
    most, among = max((share * examples / count, count) for share, count in shares)
    where = f"the {among:,} pictures of the source that is seen most often" if weights else (
        f"{among:,} pictures")
    return most, f"{examples:,} examples are {most:,.2f} passes over {where}"


def tell_passes(name: str, study: Study, train: Train, counts: Sequence[int]) -> None:
    """Logs the `passes` of a member's run, and warns of `MANY_PASSES`."""
    number, words = passes(study, train, counts)
    log.info("%s: %s", name, words)
    if number >= MANY_PASSES:
        log.warning(
            "%s: after %d passes or more a network may draw its pictures again: see whether "
            "validation/loss in curves.csv rises, and take fewer steps or more pictures if it "
            "does (docs/training.md)", name, MANY_PASSES)


def loader_of(study: Study, source: Source | Mixture, train: Train) -> Callable:
    """What makes a run's loader: this process's share of the batches."""
    data = study.data
    return functools.partial(
        loader.train_loader, source, train.batch_size, seed=study.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
        workers=data.workers, max_corrupt=data.max_corrupt,
    )


def network(spec: backbone.Spec) -> dict[str, Any]:
    """What checkpoints say of a network, see `checkpoint.check_network`."""
    recipe = backbone.recipe(spec)
    own = {checkpoint.RECIPE: recipe} if recipe else {}
    return {"kind": type(spec).__name__, **dataclasses.asdict(spec), **own}


def about(study: Study, spec: backbone.Spec) -> dict[str, Any]:
    """What the checkpoints of a network's run say of it: the config, and the network."""
    return {**dataclasses.asdict(study), checkpoint.NETWORK: network(spec)}


def done(folder: epath.Path, run: Train, spec: backbone.Spec | None = None) -> bool:
    """Whether a run is done; all processes hear the same, whenever they ask. One whose last
    snapshot is gone from among others is not: its checkpoint gives it.

    Raises:
      UserError: where it was of another network than `spec`, if one is given.
    """
    def found() -> bool:
        if checkpoint.latest(folder / "checkpoints") != run.steps:
            return False
        if spec is not None:
            checkpoint.check_network(folder / "checkpoints", run.steps, network(spec))
        there = not run.averages or averages.kept(folder, run.steps)
        if there or not (folder / averages.FOLDER).exists():
            return True
        tracked = checkpoint.averages_of(folder / "checkpoints", run.steps)
        return sorted(map(float, tracked)) != sorted(run.averages)

    return processes.from_lead("trained", found)


def fit(
    study: Study, mesh: jax.sharding.Mesh, folder: epath.Path, run: Train, spec: backbone.Spec,
    task: Callable[[], Task], source: Callable[[], Source | Mixture],
) -> None:
    """A network's run, unless it is done.

    Args:
      study: whose run it is.
      mesh: that it is on.
      folder: of the run.
      run: its settings.
      spec: the network.
      task, source: make what is trained, and on what; called where the run is not done.
    Raises:
      UserError: as `done` and `loop.fit`.
    """
    if not done(folder, run, spec):
        loop.fit(task(), run, loader_of(study, source(), run), folder, mesh, study.seed,
                 about=about(study, spec))


def average(
    spec: backbone.Spec, folder: epath.Path, run: Train, mesh: jax.sharding.Mesh, steps: int,
    length: float | None = None,
) -> Any:
    """The averaged parameters of a network's run after so many steps, laid out for a mesh: its
    `ema`, or the average of a length. Raises `UserError` where the run was of another network, and
    as `averages.average`."""
    abstract = step.abstract_state(backbone.initializer(spec), run, mesh)
    if length is not None:
        return averages.average(folder, steps, length, abstract.params, network(spec))
    return checkpoint.average(folder / "checkpoints", steps, abstract, network(spec))


def require(folder: epath.Path, run: Train, what: str, done: str = "trained") -> None:
    """Raises `UserError` that says `what` is not `done` where a run has not come to its end."""
    folder = folder / "checkpoints"
    have = checkpoint.latest(folder)
    if have != run.steps:
        raise UserError(
            f"{what} is not {done}: {folder} holds step {have or 0} of {run.steps}; run  "
            "ldm-scaling train  with the same --config and --workdir"
        )
