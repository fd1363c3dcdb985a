"""The one loop that trains every task; the same call goes on from where it was."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from etils import epath
from jax.sharding import Mesh

from ldm_scaling import files
from ldm_scaling.config import Train
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import checkpoint, step
from ldm_scaling.training import feed as feed_lib
from ldm_scaling.training.events import Events
from ldm_scaling.training.state import TrainState
from ldm_scaling.training.task import Task

log = logging.getLogger(__name__)


class NonFiniteLossError(UserError):
    """The loss, or another metric, was NaN or infinite."""


def _due(number: int, every: int, last: int) -> bool:
    return every > 0 and (number % every == 0 or number == last)


def fit(
    task: Task, config: Train, make_loader: Callable[[], Any], directory: epath.PathLike,
    mesh: Mesh, seed: int,
) -> TrainState:
    """Trains `task` to `config.steps` and returns the final state.

    Starts from the newest checkpoint in `directory` if there is one: parameters, optimiser,
    average and data iterator go on exactly where they were, so a killed run ends with the numbers
    of an unbroken one.

    Besides the task's metrics it records `time/data_wait`, the share of the steps' time that was
    spent waiting for data.

    Args:
      task: what is trained.
      config: for how long and how.
      make_loader: returns an iterator of host batches with `get_state()`,
        `set_state()` and `close()`.
      directory: holds `checkpoints/`, `events/`, `samples/` and `curves.csv`.
      mesh: where it runs.
      seed: of initialisation and training noise.
    Raises:
      NonFiniteLossError: naming the step; the last good checkpoint stays.
      Interrupted: after SIGTERM, when the step in hand is done and saved.
      UserError: for a batch that does not split over the mesh, or a checkpoint that does not fit.
    """
    mesh_lib.check_batch(mesh, config.batch_size, f"{task.name}: batch_size")
    directory = epath.Path(directory)
    root = jax.random.key(seed)
    abstract = step.abstract_state(task.init, config, mesh)
    with checkpoint.Checkpoints(directory / "checkpoints", config.keep) as checkpoints:
        loader = None
        if checkpoints.latest() is None:
            state = step.init_state(task.init, config, mesh, jax.random.fold_in(root, 0))
        else:
            state, iterator = checkpoints.restore(abstract)
            if checkpoints.latest() >= config.steps:
                return state
            loader = make_loader()
            loader.set_state(iterator)
            log.info("%s goes on from step %d", task.name, int(state.step))
        loader = make_loader() if loader is None else loader
        feed = feed_lib.Feed(loader, task.make_batch, mesh_lib.batch_sharding(mesh))
        with feed, _terminated() as terminated:
            return _run(
                task, config, feed, directory, mesh, root, abstract, state, checkpoints, terminated
            )


@contextlib.contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where this thread gets signals and is the only process.

    Several processes are told at different steps, and could not save one together.
    """
    event = threading.Event()
    alone = threading.current_thread() is threading.main_thread() and jax.process_count() == 1
    if not alone:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *unused: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(
    task, config, feed, directory, mesh, root, abstract, state, checkpoints, terminated
) -> TrainState:
    train = step.make(task.loss, config, mesh, abstract)
    key = jax.device_put(jax.random.fold_in(root, 1), mesh_lib.replicated(mesh))
    start, last = int(state.step), config.steps
    events = Events(directory, start) if hosts.is_lead() else None
    averages, pending = {}, None
    waited, spent = feed.waited, 0.0  # seconds since the last log

    def read(pending):
        """Metrics of the step before, so that the device never waits for the host."""
        number, values = pending
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            raise NonFiniteLossError(
                f"{task.name}: {', '.join(bad)} is not finite at step {number}; the checkpoint of "
                f"step {checkpoints.latest() or 0} is kept in {directory}/checkpoints. Lower "
                "learning_rate or clip_norm, or raise warmup_steps, in a fresh --workdir"
            )
        for name, value in values.items():
            average = averages.get(name, clu_metrics.Average.empty())
            new = clu_metrics.Average.from_model_output(jnp.float32(value))
            averages[name] = average.merge(new)
        return values["loss"]

    with files.progress(last, f"train {task.name}", "step", initial=start) as bar:
        try:
            for number in range(start + 1, last + 1):
                began = time.perf_counter()
                batch = next(feed)
                with jax.transfer_guard("disallow"):
                    state, metrics = train(state, batch, key)
                if pending is not None:
                    read(pending)
                pending = (number, metrics)
                logs = _due(number, config.log_every, last)
                validates = _due(number, config.validate_every, last)
                saves = _due(number, config.checkpoint_every, last)
                shows = _due(number, config.sample_every, last)
                stops = terminated.is_set()
                if logs or validates or saves or shows or stops:
                    loss, pending = read(pending), None
                    spent += time.perf_counter() - began
                    wait = (feed.waited - waited) / spent
                    bar.set_postfix_str(f"loss {loss:.4f}, data {wait:.1%}", refresh=False)
                else:
                    spent += time.perf_counter() - began
                if logs:
                    waited, spent = feed.waited, 0.0
                if events is not None:
                    if logs:
                        values = {k: float(v.compute()) for k, v in averages.items()}
                        events.scalars(number, {f"train/{k}": v for k, v in values.items()})
                        events.scalars(number, {"time/data_wait": wait})
                        averages.clear()
                    if validates:
                        values = task.validate(state.ema, number)
                        events.scalars(number, {f"validation/{k}": v for k, v in values.items()})
                    if shows:
                        for name, image in task.show(state.ema, number).items():
                            events.image(number, name, image)
                    if saves or stops:
                        events.flush()
                if saves or stops:
                    checkpoints.save(number, state, feed.state)
                bar.update()
                if stops:
                    checkpoints.wait()
                    raise Interrupted(f"{task.name} stopped by SIGTERM after step {number}")
        finally:
            if events is not None:
                events.close()
    checkpoints.wait()
    return state
