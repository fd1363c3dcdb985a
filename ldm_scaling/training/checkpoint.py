"""Checkpoints: train state, data iterator and config, through Orbax; restoring is strict."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from ldm_scaling.errors import UserError, first_line, read_error
from ldm_scaling.parallel import hosts, placing, processes, rules
from ldm_scaling.training import consensus
from ldm_scaling.training.state import TrainState

NETWORK = "network"
"""Key of `about` under which a run says what network it trains, see `check_network`."""
RECIPE = "recipe"
"""Key in it of what the network's training has beside others', see `models.backbone.Kind`."""
AVERAGES = "averages"
"""Folder in a checkpoint of the averages that are tracked, beside what every run carries: who does
not track them reads the same checkpoints."""
_RESTS = "averages_rests"
# What a full disk becomes on its way through tensorstore and Orbax's threads.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)
# What a file that is gone, cut short or of something else becomes.
_READ_ERRORS = (ValueError, KeyError, OSError, TypeError)
# Seconds that a save may take. Where one of several processes cannot write its part, the others
# learn of it by waiting so long.
_SAVE_SECONDS = 600


class _Carried(NamedTuple):
    """What of a `TrainState` every run carries: the tree in a checkpoint's `state`."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def _carried(state: TrainState) -> _Carried:
    return _Carried(state.step, state.params, state.opt_state, state.ema)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Asked by `interruption`, with another count: the service takes calls of one kind only.
        return False


class Checkpoints:
    """A run's folder of checkpoints, one subfolder a step, complete or absent.

    A save runs in the background and becomes visible by a rename, when all processes have written.
    Use as a context manager: leaving it waits for the last save. With several processes, all call
    `save`, `restore` and `clean` at the same steps.

    Args:
      directory: one for all processes.
      keep: newest checkpoints that are kept; None is all.
      keep_every: those of its multiples are kept for ever; 0 is none.
      keep_best: as many of the lowest `keep_metric` are kept; 0 is none.
      keep_metric: see `save`.
      keep_steps: those of these steps are kept for ever.
      apart: a name of its own of a second folder that a run saves in at the same time: what its
        processes wait for is told apart by it.
    """

    def __init__(
        self, directory: epath.PathLike, keep: int | None = 2, keep_every: int = 0,
        keep_best: int = 0, keep_metric: str = "loss", keep_steps: Sequence[int] = (),
        apart: str | None = None,
    ):
        self.directory = epath.Path(os.path.abspath(directory))
        self._metric = keep_metric
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_steps:
            kept.append(policies.CustomSteps(list(keep_steps)))
        if keep_best:
            kept.append(policies.BestN(
                get_metric_fn=self._value, reverse=True, n=keep_best,
                keep_checkpoints_without_metrics=False,
            ))
        self._best = bool(keep_best)
        self._waiting: threading.Thread | None = None
        self._error: Exception | None = None
        self._abandoned = False
        try:
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(kept),
                    best_fn=self._value if keep_best else None,  # or metrics are not written
                    create=True, cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        barrier_sync_key_prefix=apart),
                ),
            )
        except OSError as e:
            raise UserError(f"cannot use the checkpoint folder {directory}: {e.strerror}") from e

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *unused) -> None:
        if self._abandoned:
            return
        try:
            self._manager.close()
        except _WRITE_ERRORS as e:
            if kind is None:  # Otherwise the first error is the one to tell.
                raise self._unwritten(e) from e

    def _value(self, metrics: dict[str, float]) -> float:
        # Saved by a run that kept its best by another metric, it has none of this one.
        value = float(metrics.get(self._metric, float("nan")))
        return value if value == value else float("inf")  # A NaN is the worst, not unordered.

    def latest(self) -> int | None:
        """The newest step that is there, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, iterator: dict[str, Any],
        about: dict[str, Any] | None = None, metrics: dict[str, float] | None = None,
    ) -> None:
        """Begins to save; a step that is there already is left alone. See `poll`.

        Args:
          step: its name.
          state: of all processes; may be donated once this returns.
          iterator: where all processes together are in the data, the same in each of them, so that
            any number of processes can go on from it.
          about: what the run is, JSON: for people and tools, and for `check_network`.
          metrics: of validation at this step, `keep_metric` among them; with `keep_best`.
        Raises:
          ValueError: the processes' iterators differ.
          UserError: when the folder cannot be written.
        """
        if step in self._manager.all_steps():
            return
        mark = zlib.crc32(json.dumps(iterator, sort_keys=True).encode())
        if len(set(consensus.everyone(mark)[:, 0])) > 1:
            raise ValueError(f"at step {step} processes are at different places in the data")
        trees = {"state": _carried(state)}
        if state.averages:
            trees |= {AVERAGES: state.averages, _RESTS: state.rests}
        self._save(step, trees, {"iterator": iterator}, about, metrics)

    def save_trees(
        self, step: int, trees: Mapping[str, Any], about: dict[str, Any] | None = None
    ) -> None:
        """As `save`, of trees of arrays alone, by the name of each one's folder."""
        if step not in self._manager.all_steps():
            self._save(step, trees, {}, about)

    def _save(
        self, step: int, trees: Mapping[str, Any], beside: Mapping[str, Any],
        about: dict[str, Any] | None, metrics: dict[str, float] | None = None,
    ) -> None:
        beside = beside if about is None else {**beside, "config": about}
        if not processes.several():
            # Orbax shares out what is replicated, and compiles a slice for each array and device.
            trees = {name: placing.one_copy(tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in beside.items()}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(**items), metrics=metrics if self._best else None,
                force=True,
            )
        except _WRITE_ERRORS as e:
            raise self._unwritten(e) from e
        self._waiting = threading.Thread(target=self._await, daemon=True, name="await-save")
        self._waiting.start()

    def _await(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as e:  # Whatever it is, nothing was saved.
            self._error = e

    def poll(self, seconds: float = 0.0) -> tuple[bool, UserError | None]:
        """Whether this process still saves after at most `seconds`, and what went wrong if not."""
        if self._waiting is not None:
            self._waiting.join(seconds)
            if self._waiting.is_alive():
                return True, None
        return False, None if self._error is None else self._unwritten(self._error)

    def clean(self) -> None:
        """Forgets a save that failed and removes what it left: it would fill the store further."""
        self._error = None
        with contextlib.suppress(Exception):  # Orbax tells every thread once.
            self._manager.wait_until_finished()
        with contextlib.suppress(*_WRITE_ERRORS):
            if hosts.is_lead():
                for path in self.directory.iterdir():
                    if ocp.utils.is_tmp_checkpoint(path):
                        path.rmtree()
            self._manager.reload()

    def abandon(self) -> None:
        """Leaving the context waits for nothing from now on: the store may hang."""
        self._abandoned = True

    def _unwritten(self, error: BaseException) -> UserError:
        # After a failure Orbax waits in vain for the other processes, and raises that.
        while isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)) and error.__context__:
            error = error.__context__
        return UserError(
            f"cannot write a checkpoint in {self.directory}: {first_line(error)}; free space or "
            "choose another --workdir, then run the same command again"
        )

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint's state, placed as `abstract` says, and its iterator's state.

        Args:
          abstract: shapes, types and shardings.
          step: which; None is the newest.

        Raises:
          UserError: with a diff when the tree in the file is not `abstract`'s, and with the
            folder's name when the file is damaged. Nothing is ever started afresh silently.
        """
        step = self.latest() if step is None else step
        folder = self.directory / str(step)
        carried = _check_tree(folder, abstract)
        items = {"state": ocp.args.StandardRestore(carried), "iterator": ocp.args.JsonRestore()}
        if abstract.averages:
            _check_averages(folder, abstract)
            items[AVERAGES] = ocp.args.StandardRestore(abstract.averages)
            items[_RESTS] = ocp.args.StandardRestore(abstract.rests)
        with _reading(folder):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        averages = (restored[AVERAGES], restored[_RESTS]) if abstract.averages else ()
        return TrainState(*restored.state, *averages), restored.iterator


def average(
    directory: epath.PathLike, step: int, abstract: TrainState,
    network: Mapping[str, Any] | None = None, part: str = "ema",
) -> Any:
    """The average of parameters alone, of a folder's checkpoint, placed as `abstract.ema` says: a
    quarter of the memory and of the reading. Any process may read by itself: none is waited for.
    As `part`, `params` gives the parameters that were averaged.

    Args:
      directory: of checkpoints.
      step: which.
      abstract: shapes, types and shardings.
      network: that it is of, see `check_network`.
      part: `ema` or `params`.
    Raises:
      UserError: as `Checkpoints.restore` and `check_network`.
    """
    folder = epath.Path(os.path.abspath(directory)) / str(step)
    carried = _check_tree(folder, abstract)
    if network is not None:
        check_network(directory, step, network)
    item = jax.tree.map(lambda _: ocp.PLACEHOLDER, carried)
    return getattr(_read(folder, item._replace(**{part: getattr(carried, part)})), part)


def averages_of(directory: epath.PathLike, step: int) -> list[str]:
    """The lengths whose averages a checkpoint of a run carries, as `TrainState` names them."""
    folder = epath.Path(os.path.abspath(directory)) / str(step)
    return parts_of(folder, AVERAGES) if (folder / AVERAGES).exists() else []


def parts_of(folder: epath.Path, name: str) -> list[str]:
    """The uppermost keys of a tree that `Checkpoints.save_trees` saved, in the folder of a step.
    Raises `UserError` for one that cannot be read."""
    listed = _listed(folder, name)
    return sorted({key.partition("/")[0] for key in listed} if listed else _metadata(folder, name))


def check_parts(folder: epath.Path, name: str, abstract: Any) -> None:
    """Raises `UserError` where not all of `parts_of` are trees like this."""
    _check_shapes(folder, name, dict.fromkeys(parts_of(folder, name), abstract))


def read_part(folder: epath.Path, name: str, part: str, abstract: Any) -> Any:
    """What stands under one of `parts_of`, placed as `abstract` says, and nothing else: see
    `check_parts`. Any process may read by itself. Raises `UserError` for damage."""
    absent = jax.tree.map(lambda _: ocp.PLACEHOLDER, abstract)
    parts = parts_of(folder, name)
    return _read(folder, dict.fromkeys(parts, absent) | {part: abstract}, name)[part]


class Place(NamedTuple):
    """A checkpoint of another run, which is read and left as it is: a folder of them, and which."""

    directory: epath.PathLike
    step: int


def read(place: Place, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """As `Checkpoints.restore`, of another run."""
    folder = epath.Path(os.path.abspath(place.directory)) / str(place.step)
    state = TrainState(*_read(folder, _check_tree(folder, abstract)))
    if abstract.averages:
        _check_averages(folder, abstract)
        state = state._replace(
            averages=_read(folder, abstract.averages, AVERAGES),
            rests=_read(folder, abstract.rests, _RESTS),
        )
    with _reading(folder), _reader(ocp.JsonCheckpointHandler()) as reader:
        return state, reader.restore(folder / "iterator")


def _read(folder: epath.Path, item: Any, name: str = "state") -> Any:
    with _reading(folder), _reader(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            folder / name, args=ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
            ),
        )


def latest(directory: epath.PathLike) -> int | None:
    """The newest complete step in a folder of checkpoints, or None; makes nothing."""
    if not epath.Path(directory).exists():
        return None
    steps = ocp.utils.checkpoint_steps(directory)
    return max(steps, default=None)


def steps_of(directory: epath.PathLike) -> list[int]:
    """All complete steps in a folder of checkpoints, ascending; makes nothing."""
    if not epath.Path(directory).exists():
        return []
    return sorted(ocp.utils.checkpoint_steps(directory))


def config_of(directory: epath.PathLike, step: int) -> dict[str, Any]:
    """What was given as `about` when a step was saved. Raises `UserError` where nothing was."""
    folder = epath.Path(os.path.abspath(directory)) / str(step)
    try:
        with _reader(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(folder / "config")
    except (OSError, ValueError) as e:
        raise UserError(
            f"the checkpoint {folder} holds no config that can be read: {first_line(e)}"
        ) from e


def check_network(directory: epath.PathLike, step: int, network: Mapping[str, Any]) -> None:
    """Holds what a checkpoint says of its network against what it is wanted for: networks of other
    heads, for example, have parameters of the same shapes. One that says nothing passes.

    Args:
      directory: of checkpoints.
      step: which.
      network: as `about` has it under `NETWORK`; what only one of the two tells is not compared,
        but for a `RECIPE`: earlier versions trained without.
    Raises:
      UserError: for a checkpoint of another network, with what differs.
    """
    folder = epath.Path(os.path.abspath(directory)) / str(step)
    if not (folder / "config").exists():
        return
    have = {RECIPE: []} | config_of(directory, step).get(NETWORK, {})
    want = json.loads(json.dumps(network))
    wrong = [
        f"{k} was {have[k]!r} and is {want[k]!r}" for k in want
        if k in have and have[k] != want[k]
    ]
    if len(wrong) == 1 and RECIPE in want and have[RECIPE] != want[RECIPE]:
        raise UserError(
            f"the checkpoint {folder} was trained by another version, without or with other than "
            f"{', '.join(want[RECIPE])}: train it again in another --workdir, or use what it made "
            "with the version that made it"
        )
    if wrong:
        raise UserError(
            f"the checkpoint {folder} is of another network, though its parameters may have the "
            f"same shapes: {'; '.join(wrong)}; give the network back what it was trained with, or "
            "give the changed one another name or another --workdir"
        )


def _reader(handler: Any) -> ocp.Checkpointer:
    """Reads in this process alone: Orbax's own waits for all processes when it has read."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _check_tree(folder: epath.Path, abstract: TrainState) -> _Carried:
    """What of a state lies in a checkpoint's `state`. Raises `UserError` where that does not hold a
    tree like this."""
    carried = _carried(abstract)
    _check_shapes(folder, "state", carried)
    return carried


def _check_averages(folder: epath.Path, abstract: TrainState) -> None:
    """Raises `UserError` where a checkpoint does not hold averages of these lengths."""
    want = sorted(abstract.averages)
    have = averages_of(folder.parent, int(folder.name))
    if have != want:
        raise UserError(
            f"the checkpoint {folder} holds {'averages of ' + ', '.join(have) if have else 'none'} "
            f"of train.averages={tuple(map(float, want))}: these are of all steps of a run, and "
            f"cannot begin later: give --config.train.averages='({''.join(f'{n},' for n in have)})'"
            f"{'' if have else ' --config.train.averages_every=0'}, or train anew in another "
            "--workdir"
        )
    _check_shapes(folder, AVERAGES, abstract.averages)
    _check_shapes(folder, _RESTS, abstract.rests)


def _metadata(folder: epath.Path, name: str) -> Any:
    try:
        return ocp.StandardCheckpointer().metadata(folder / name).item_metadata.tree
    except (*_READ_ERRORS, AttributeError) as e:
        raise _damaged(folder, e) from e


def _check_shapes(folder: epath.Path, name: str, tree: Any) -> None:
    """Raises `UserError` where a tree in a checkpoint has other leaves or shapes than this one."""
    want = _shapes(tree)
    if _listed(folder, name) == want:
        return
    have = _shapes(_metadata(folder, name))
    wrong = [f"+{k} {have[k]}" for k in sorted(have.keys() - want.keys())]
    wrong += [f"-{k} {want[k]}" for k in sorted(want.keys() - have.keys())]
    wrong += [
        f"{k} is {have[k]}, should be {want[k]}"
        for k in sorted(have.keys() & want.keys()) if have[k] != want[k]
    ]
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if wrong[6:] else "")
        raise UserError(
            f"the checkpoint {folder} is not of this network (+ surplus, - missing): {shown}; "
            "use the config it was trained with or another --workdir"
        )


def _listed(folder: epath.Path, name: str) -> dict[str, tuple] | None:
    """`_shapes` as the file beside a checkpoint's arrays lists them, or None where it cannot be
    read. Of arrays that were saved in parts it tells a part's: the arrays themselves know, but to
    open them all takes longer than to read a small network."""
    try:
        listed = json.loads((folder / name / "_METADATA").read_text())["tree_metadata"].values()
        return {
            "/".join(key["key"] for key in leaf["key_metadata"]):
                tuple(leaf["value_metadata"]["write_shape"])
            for leaf in listed if leaf["value_metadata"]["value_type"] != "None"
        }
    except (*_READ_ERRORS, AttributeError):
        return None


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    """Raises `UserError` for what is wrong with a checkpoint that is read inside the context."""
    try:
        yield
    except Exception as e:
        if not isinstance(cause := read_error(e), _READ_ERRORS):
            raise
        raise _damaged(folder, cause) from e


def _damaged(folder: epath.Path, error: Exception) -> UserError:
    remedy = (
        f"delete {folder} to go on from the checkpoint before it (or anew, if there is none), "
        "then run the same command again"
    )
    if folder.parent.name == AVERAGES:
        remedy = f"delete {folder}, and averages are made of the snapshots that are left"
        if latest(folder.parent.parent / "checkpoints") == int(folder.name):
            remedy = (f"delete {folder}, then run  ldm-scaling train  with the same --config and "
                      "--workdir, which writes it again from the checkpoint")
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return UserError(
            f"the checkpoint {folder} cannot be read ({first_line(error)}): where the store is at "
            f"fault, run the same command again; where the file is damaged, {remedy}"
        )
    return UserError(f"the checkpoint {folder} is damaged ({first_line(error)}): {remedy}")


def _shapes(tree: Any) -> dict[str, tuple]:
    """Path -> shape of every leaf, whatever containers the tree is made of."""
    return {
        rules.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
