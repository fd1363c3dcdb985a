"""The one loop that trains every task; the same call goes on from where it was."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from ldm_scaling import files
from ldm_scaling.config import Train
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import checkpoint, consensus, meter, nonfinite, step, watchdog
from ldm_scaling.training import feed as feed_lib
from ldm_scaling.training.averages import Snapshots
from ldm_scaling.training.events import TIMED, Events
from ldm_scaling.training.interruption import Interruption
from ldm_scaling.training.meter import Meter
from ldm_scaling.training.nonfinite import DivergedError, NonFiniteLossError
from ldm_scaling.training.profile import Profile
from ldm_scaling.training.saver import Saver
from ldm_scaling.training.scalars import STEPS, Scalars
from ldm_scaling.training.state import TrainState
from ldm_scaling.training.task import Task, check_metric
from ldm_scaling.training.watchdog import Watchdog

__all__ = ["DivergedError", "Interrupted", "NonFiniteLossError", "fit"]

log = logging.getLogger(__name__)

_OPEN = f"{TIMED}open/"  # sums of a run that was saved between two logs


def _due(number: int, every: int, last: int) -> bool:
    return every > 0 and (number % every == 0 or number == last)


def _checkpoints(directory: epath.PathLike, config: Train) -> checkpoint.Checkpoints:
    """A run's checkpoints, kept as the config says."""
    return checkpoint.Checkpoints(
        epath.Path(directory) / "checkpoints", config.keep, config.keep_every, config.keep_best,
        config.keep_metric, config.keep_steps,
    )


def fit(
    task: Task, config: Train, make_loader: Callable[[], Any], directory: epath.PathLike,
    mesh: Mesh, seed: int, about: dict[str, Any] | None = None,
    after: checkpoint.Place | None = None,
) -> TrainState:
    """Trains `task` to `config.steps` and returns the final state.

    Starts from the newest checkpoint in `directory` if there is one: parameters, optimiser,
    average and data iterator go on exactly where they were, so a killed run ends with the numbers
    of an unbroken one. With several processes all call it, with one `directory`.

    Besides the task's metrics it records what `meter.Meter` measures, as `time/...`.

    Args:
      task: what is trained.
      config: for how long and how.
      make_loader: returns an endless iterator of host batches with `get_state()`,
        `set_state()` and `close()`; the state is the same in every process. With
        `examples(state)`, it can name the batch of a loss that is not finite.
      directory: holds `checkpoints/`, `averages/`, `events/`, `samples/`, `profile/` and
        `curves.csv`.
      mesh: where it runs.
      seed: of initialisation and training noise.
      about: what the run is, JSON, kept in every checkpoint; a run that goes on is held against
        what it says of the network, see `checkpoint.check_network`.
      after: another run's checkpoint, below `config.steps`, that this one goes on from where it has
        none of its own: parameters, optimiser, average and data.
    Raises:
      DivergedError: where `task.diverges`; the last checkpoint stays.
      NonFiniteLossError: naming the step and a file with the batch's examples; the last good
        checkpoint stays.
      StoreError: checkpoints could not be written for `checkpoint_patience` steps.
      Interrupted: after SIGTERM or a preemption notice, when the step in hand is done and saved;
        where its averages cannot be written, without it.
      UserError: for a batch that does not split over the mesh, a first batch of another size than
        `config.batch_size` (over all processes), a loader that ends before the run, a metric to
        keep the best by that validation does not give, or a checkpoint that does not fit.
    Where no step finishes for `stall_seconds`, or another process is gone, the process ends with
    status 76, see `watchdog`.
    """
    mesh_lib.check_batch(mesh, config.batch_size, f"{task.name}: batch_size")
    if task.ranks:
        check_metric(f"{task.name}: train", config, task.ranks)
    directory = epath.Path(directory)
    root = jax.random.key(seed)
    abstract = step.abstract_state(task.init, config, mesh)
    with contextlib.ExitStack() as stack:
        # Twice: where hosts are lost later, what checkpoints wait for does not come any more.
        stack.enter_context(watchdog.lost_host(task.name))
        checkpoints = stack.enter_context(_checkpoints(directory, config))
        # The lead's word: a shared folder may look different elsewhere for a moment.
        start = int(consensus.everyone(checkpoints.latest() or 0)[0, 0])
        branch = after if start == 0 else None
        start = branch.step if branch else start
        _tell_lost(task.name, config, checkpoints, start)
        dog = stack.enter_context(Watchdog(task.name, config.stall_seconds, start))
        stack.enter_context(watchdog.lost_host(task.name))
        if start == 0:
            state = step.init_state(
                task.init, config, mesh, jax.random.fold_in(root, 0), task.start
            )
        else:
            state, iterator = _restored(checkpoints, start, branch, abstract, about)
        snapshots = stack.enter_context(Snapshots(task.name, directory, config, start, about))
        if start and not branch:  # It may have been deleted, for it was damaged.
            with dog.patient():
                snapshots.save(start, state.averages, lambda: start)
        if start >= config.steps:
            return state
        loader = make_loader()
        if start:
            loader.set_state(iterator)
            log.info("%s goes on from step %d in %s", task.name, start,
                     branch.directory if branch else checkpoints.directory)
        feed = stack.enter_context(
            feed_lib.Feed(loader, task.make_batch, mesh_lib.batch_sharding(mesh))
        )
        interruption = stack.enter_context(Interruption())
        record = _Record(directory, start, config, mesh)
        stack.callback(record.close)
        return _Run(
            task, config, feed, record, root, abstract, state, checkpoints, snapshots, about, dog,
            interruption,
        ).finish()


def _tell_lost(
    name: str, config: Train, checkpoints: checkpoint.Checkpoints, start: int
) -> None:
    passed = {number for number in config.keep_steps if number <= start}
    if lost := sorted(passed - set(checkpoint.steps_of(checkpoints.directory))):
        log.warning("%s: of train.keep_steps %s are not on disk, and the run is at step %d: "
                    "they will not be made", name, lost, start)


def _restored(
    checkpoints: checkpoint.Checkpoints, start: int, branch: checkpoint.Place | None,
    abstract: TrainState, about: dict[str, Any] | None,
) -> tuple[TrainState, dict[str, Any]]:
    """State and iterator of the run's own checkpoint, or of the one that it branches off."""
    where = branch.directory if branch else checkpoints.directory
    if about and checkpoint.NETWORK in about:
        checkpoint.check_network(where, start, about[checkpoint.NETWORK])
    return checkpoint.read(branch, abstract) if branch else checkpoints.restore(abstract, start)


class _Record:
    """What a run writes of itself besides checkpoints: the lead's events, and the meter's scalars.

    Every process has one, and the lead alone writes.
    """

    def __init__(self, directory: epath.Path, start: int, config: Train, mesh: Mesh):
        self.directory, self.start = directory, start
        self.events = Events(directory, start) if hosts.is_lead() else None
        last = self.events.last if self.events is not None else lambda name: None
        self._open = {} if self.events is None else self.events.at(start, _OPEN)
        self.meter = Meter(
            config.batch_size, last(meter.STARTED), last(meter.PRODUCTIVE) or 0.0,
            peak=meter.peak_of(mesh, config),
        )
        if self.events is not None and last(meter.STARTED) is None:
            self.events.note(0, meter.STARTED, self.meter.started)
            with contextlib.suppress(UserError):  # A full disk, which the saver sees to.
                self.events.flush()

    def scalars(self, number: int, group: str, values: dict[str, float]) -> None:
        if self.events is not None:
            self.events.scalars(number, {f"{group}/{k}": v for k, v in values.items()})

    def timings(self, number: int) -> None:
        values = self.meter.values()
        if self.events is not None:
            self.events.scalars(number, values)

    def images(self, number: int, images: dict[str, Any]) -> None:
        for name, image in images.items() if self.events is not None else ():
            self.events.image(number, name, image)

    def add_open(self, scalars: Scalars) -> None:
        """At the first step: adds those since the last log of the run that this one goes on from.
        The lead's word, for all look at averages."""
        names = [STEPS, *sorted(scalars.totals().keys() - {STEPS})]
        values = consensus.everyone(*(self._open.get(name, 0.0) for name in names))[0]
        scalars.add(dict(zip(names, map(float, values))))

    def flush(self, number: int, totals: dict[str, float]) -> None:
        if self.events is not None:
            for name, value in totals.items():
                self.events.note(number, f"{_OPEN}{name}", value)
            # What a run that goes on from here has spent well.
            self.events.note(number, meter.PRODUCTIVE, self.meter.productive)
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _form(batch: Any) -> Hashable:
    """What of a batch a program is compiled for."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


class _Due(NamedTuple):
    """What is done after a step."""

    logs: bool
    validates: bool
    saves: bool
    shows: bool
    keeps: bool  # A snapshot.
    traced: bool  # The profile's last step.
    stops: bool


class _Run:
    """The steps of a run, from the one after `record.start`, and what is done after them."""

    def __init__(
        self, task, config, feed, record, root, abstract, state, checkpoints, snapshots, about, dog,
        interruption,
    ):
        self.task, self.config, self.feed, self.record = task, config, feed, record
        self.state, self.checkpoints, self.snapshots = state, checkpoints, snapshots
        self.about, self.dog, self.interruption = about, dog, interruption
        self.clock, self.last = record.meter, config.steps
        mesh = feed.sharding.mesh
        self.frozen = () if task.frozen is None else (task.frozen,)
        self.train = step.make(
            task.loss, config, mesh, abstract, task.frozen, task.rates, task.project
        )
        # By a program: `device_put` knows no keys on devices of other processes.
        fold_in = jax.jit(jax.random.fold_in, out_shardings=mesh_lib.replicated(mesh))
        self.key = fold_in(root, 1)
        self.validation: dict[int, dict[str, float]] = {}  # of the last step that had one
        self.unshown: set[str] = set()  # why pictures were not
        # Of batches that the step is compiled for: one of each bucket.
        self.forms: set[Hashable] = set()
        self.stops = False
        self.scalars = Scalars(self._refuse)
        self.saver = Saver(
            task.name, checkpoints, config, record.start,
            lambda number: record.flush(number, self.scalars.totals()), self._begin_save,
        )
        self.profile = Profile(record.directory / "profile", config.profile_steps, record.start)

    def finish(self) -> TrainState:
        """Trains to the last step; returns its state."""
        start, name = self.record.start, self.task.name
        with (
            contextlib.closing(self.profile),
            files.progress(self.last, f"train {name}", "step", initial=start) as self.bar,
        ):
            self.clock.lap(meter.OTHER)
            for number in range(start + 1, self.last + 1):
                self._step(number)
                self.stops = self.interruption.due()
                due = self._due(number)
                if any(due):  # Here all processes wait for the step, and decide together.
                    self._read()
                self.clock.lap(meter.STEP)
                self.clock.step()
                self.bar.update()
                if any(due):
                    self._look_after(number, due)
        # Told while the last step was looked at and saved: one process has nobody else to ask.
        if self.interruption.told:
            raise Interrupted(f"{name} stopped by SIGTERM after step {self.last}")
        return self.state

    def _step(self, number: int) -> None:
        """Takes a step, and reads the metrics of the one before."""
        self.profile.before(number)
        self.clock.lap(meter.OTHER)
        before, first = self.feed.state, number == self.record.start + 1
        batch = self._batch(number, first)
        self.clock.lap(meter.DATA)
        if first and self.clock.peak:
            self.clock.flops = meter.flops_of(
                self.task, self.config, self.train, self.state, batch, self.key, *self.frozen
            )
        if compiles := (form := _form(batch)) not in self.forms:
            self.forms.add(form)
            self.dog.compiles(number)
        # Tracing and compiling may move constants, such as a kernel's masks.
        with jax.transfer_guard("allow" if compiles else "disallow"):
            self.state, values = self.train(self.state, batch, self.key, *self.frozen)
        self._read()  # The metrics of the step before: the device never waits for the host.
        self.scalars.push(number, values, before)
        if first and self.record.start:
            self._read()
            self.record.add_open(self.scalars)

    def _batch(self, number: int, first: bool) -> Any:
        """The batch of a step; of a run's first, the size is checked."""
        name, size = self.task.name, self.config.batch_size
        try:
            batch = next(self.feed)
        except StopIteration:
            raise UserError(
                f"{name}: the loader ends before step {number} of {self.last}, and {self._kept()}: "
                "give one that goes round its data, or fewer steps"
            ) from None
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch) if first else ():
            if len(leaf) != size:
                raise UserError(
                    f"{name}: the first batch's {jax.tree_util.keystr(path)} has {len(leaf)} rows "
                    f"over all processes, and batch_size is {size}: make them equal"
                )
        return batch

    def _read(self) -> None:
        number = self.scalars.read()
        if number is not None:
            self.dog.finished(number)

    def _refuse(self, number: int, values: dict[str, float], before: dict[str, Any]) -> None:
        path = self.record.directory / f"nonfinite_{number}.json"
        if hosts.is_lead():
            nonfinite.write(path, number, values, before, self.feed.examples(before))
        raise NonFiniteLossError(
            f"{self.task.name}: {', '.join(nonfinite.names(values))} is not finite at step "
            f"{number}, whose examples are named in {path}; {self._kept()}. Lower learning_rate or "
            "clip_norm, or raise warmup_steps, in a fresh --workdir"
        )

    def _kept(self) -> str:
        """What is left of a run that ends early, in words."""
        with self.dog.patient():
            safe = self.saver.settle()
        return f"the checkpoint of step {safe} is kept in {self.checkpoints.directory}"

    def _due(self, number: int) -> _Due:
        config, last = self.config, self.last
        return _Due(
            logs=_due(number, config.log_every, last),
            validates=_due(number, config.validate_every, last),
            saves=_due(number, config.checkpoint_every, last) or number in config.keep_steps,
            shows=_due(number, config.sample_every, last),
            keeps=config.snapshot_due(number),
            traced=self.profile.ends(number),
            stops=self.stops,
        )

    def _look_after(self, number: int, due: _Due) -> None:
        """What is due after a step whose metrics are read; the same in all processes."""
        if due.traced:
            self.profile.close()
        self._tell(now=False)
        if due.logs:
            self._log(number)
        with self.dog.patient():
            if due.validates:
                scores = self.task.validate(self.state.ema, number)
                check_metric(f"{self.task.name}: train", self.config, scores)
                self.record.scalars(number, "validation", scores)
                self.validation = {number: scores}
            if due.shows:
                self._show(number)
            self.clock.lap(meter.OTHER)
            # Before the checkpoint: a run goes on from where all of its snapshots are there.
            self.snapshots.save(
                number, self.state.averages, self.saver.settle, self._tell, self._ends
            )
            if self.stops or number == self.last or number in self.config.keep_steps:
                self.saver.finish(number, self._tell)
            else:
                self.saver.tend(number, due.saves)
            self.clock.lap(meter.CHECKPOINT)
        if self.stops:
            raise Interrupted(f"{self.task.name} stopped by SIGTERM after step {number}")

    def _tell(self, now: bool = True) -> None:
        troubles = list(filter(None, (self.saver.trouble(), self.snapshots.trouble())))
        told = [f"loss {self.scalars.loss:.4f}", f"data {self.clock.wait():.1%}", *troubles]
        self.bar.set_postfix_str(", ".join(told), refresh=now or bool(troubles))

    def _log(self, number: int) -> None:
        averages = self.scalars.averages()
        self.record.scalars(number, "train", averages)
        self.record.timings(number)
        if why := self.task.diverges(averages):
            raise DivergedError(
                f"{self.task.name} diverges at step {number}: {why}; {self._kept()}"
            )

    def _show(self, number: int) -> None:
        try:
            self.record.images(number, self.task.show(self.state.ema, number))
        except UserError as e:  # Such as pictures that are not finite, early in a run.
            if (why := str(e)) not in self.unshown:
                log.warning("%s: nothing is shown at step %d: %s; training goes on",
                            self.task.name, number, why)
            self.unshown.add(why)

    def _ends(self) -> bool:
        self.stops = self.stops or self.interruption.due()
        return self.stops

    def _begin_save(self, number: int) -> None:
        self.checkpoints.save(
            number, self.state, self.feed.state, self.about, self.validation.get(number)
        )
