"""Checkpoints: train state and data iterator together, through Orbax; restoring is strict."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ldm_scaling.errors import UserError
from ldm_scaling.training.state import TrainState

# What a full disk becomes on its way through tensorstore and Orbax's threads.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """A run's folder of checkpoints, one subfolder a step, complete or absent.

    Use as a context manager: leaving it waits for the last save.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 2):
        self.directory = epath.Path(os.path.abspath(directory))
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True,
                ),
            )
        except OSError as e:
            raise UserError(f"cannot use the checkpoint folder {directory}: {e.strerror}") from e

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *unused) -> None:
        try:
            self._manager.close()
        except _WRITE_ERRORS as e:
            if kind is None:  # Otherwise the first error is the one to tell.
                raise self._unwritten(e) from e

    def latest(self) -> int | None:
        """The newest step that is there, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: dict[str, Any]) -> None:
        """Saves by rename in the background; a step that is there already is left alone.

        Raises:
          UserError: when the folder cannot be written, a full disk included.
        """
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave(iterator)
                ),
            )
        except _WRITE_ERRORS as e:
            raise self._unwritten(e) from e

    def wait(self) -> None:
        """Returns when every save so far is on disk. Raises `UserError` when one is not."""
        try:
            self._manager.wait_until_finished()
        except _WRITE_ERRORS as e:
            raise self._unwritten(e) from e

    def _unwritten(self, error: Exception) -> UserError:
        return UserError(
            f"cannot write a checkpoint in {self.directory}: {_first_line(error)}; free space or "
            "choose another --workdir, then run the same command again"
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint: its state, placed as `abstract` says, and its iterator's state.

        Raises:
          UserError: with a diff when the tree in the file is not `abstract`'s, and with the
            folder's name when the file is damaged. Nothing is ever started afresh silently.
        """
        step = self._manager.latest_step()
        folder = self.directory / str(step)
        remedy = (
            f"delete {folder} to go on from the checkpoint before it (or anew, if there is none), "
            "then run the same command again"
        )
        self._check_tree(folder, abstract, remedy)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), iterator=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError, TypeError) as e:
            raise _damaged(folder, e, remedy) from e
        return restored.state, restored.iterator

    def _check_tree(self, folder: epath.Path, abstract: TrainState, remedy: str) -> None:
        try:
            found = ocp.StandardCheckpointer().metadata(folder / "state").item_metadata.tree
        except (ValueError, KeyError, OSError, TypeError, AttributeError) as e:
            raise _damaged(folder, e, remedy) from e
        have, want = _shapes(found), _shapes(abstract)
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


def latest(directory: epath.PathLike) -> int | None:
    """The newest complete step in a folder of checkpoints, or None; makes nothing."""
    if not epath.Path(directory).exists():
        return None
    steps = ocp.utils.checkpoint_steps(directory)
    return max(steps, default=None)


def _damaged(folder: epath.Path, error: Exception, remedy: str) -> UserError:
    return UserError(f"the checkpoint {folder} is damaged ({_first_line(error)}): {remedy}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _shapes(tree: Any) -> dict[str, tuple]:
    """Path -> shape of every leaf, whatever containers the tree is made of."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path):
            tuple(leaf.shape)
        for path, leaf in flat
    }
