"""When a run saves, and what it does while its checkpoint store fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts
from ldm_scaling.training import consensus
from ldm_scaling.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds before another attempt; doubled each time
_UNDER_WAY = 60.0  # seconds that training waits, at most, for the save before
_AT_THE_END = 600.0  # seconds of attempts when there is nothing more to train
_GLANCE = 1.0  # seconds between two looks at whether a run that waits is to end


class StoreError(UserError):
    """Checkpoints could not be written for so long that the run stopped."""


class Saver:
    """Saves in the background; while that fails, tries again at growing intervals.

    Training goes on meanwhile, until as many steps as `checkpoint_patience` are at stake. All
    processes ask at the same steps and do the same: where one fails, all try again.

    Args:
      name: of the run, in messages.
      checkpoints: where to.
      config: the run's.
      start: the step that is on disk, 0 where there is none.
      prepare: writes what must be on disk beside a checkpoint; raises `UserError` where it cannot.
      begin: then begins to save the step that the run is at, in all processes or in none; the same.
      what: is saved, in messages.
    """

    def __init__(
        self, name: str, checkpoints: Checkpoints, config: Train, start: int,
        prepare: Callable[[int], None], begin: Callable[[int], None], what: str = "checkpoint",
    ):
        self._name, self._checkpoints, self._what = name, checkpoints, what
        self._prepare, self._begin = prepare, begin
        self._patience = config.checkpoint_patience or 2 * config.checkpoint_every
        self.safe = start
        self._under_way: int | None = None
        self._error: UserError | None = None  # of this process, in beginning
        self._failures, self._again = 0, 0.0
        self._why, self._waits = "", False

    @property
    def why(self) -> str:
        """What keeps the store from being written, in words."""
        return self._why or "the store does not answer"

    def trouble(self) -> str | None:
        """What to show while the store fails, or None."""
        if not self._failures:
            return None
        told = f"NOT SAVED since step {self.safe}"
        return f"{self._what} {told}; training waits" if self._waits else told

    def tend(self, step: int, due: bool) -> None:
        """Looks after the save under way, and begins one if it is due or was missed.

        Raises:
          StoreError: too many steps are at stake.
        """
        self._look(_UNDER_WAY if due else 0.0)
        if self._failures and self._under_way is None:
            (again,) = consensus.anyone(hosts.is_lead() and time.monotonic() >= self._again)
            due = due or again
        if due and self._under_way is None and self.safe < step:
            self._attempt(step)
            self._look()
        elif due and self._under_way is not None:
            log.warning("%s: the save of step %d is still under way at step %d, which is not saved",
                        self._name, self._under_way, step)
            self._why = self._why or f"the save of step {self._under_way} does not end"
        if step - self.safe >= self._patience:
            self._look(_UNDER_WAY)
            if step - self.safe >= self._patience:
                raise self._stop(step)

    def settle(self) -> int:
        """Waits for the save under way, ten minutes where the store was well, and from then on for
        none.

        Returns the newest step that is on disk.
        """
        self._look(_UNDER_WAY if self._failures or self._why else _AT_THE_END)
        if self._under_way is not None:
            self._checkpoints.abandon()
        return self.safe

    def finish(
        self, step: int, tell: Callable[[], None] = lambda: None,
        ends: Callable[[], bool] = lambda: False,
    ) -> None:
        """Saves a step that cannot be made later, and returns when it is on disk; tries for ten
        minutes.

        Args:
          step: which.
          tell: shows what `trouble` says, which has changed.
          ends: whether to try no more once an attempt has failed; all processes hear the same, and
            ask equally often.
        Raises:
          StoreError: it could not be written.
        """
        began, self._waits, failed = time.monotonic(), True, False
        while True:
            self._look(_AT_THE_END)
            if self.safe >= step:
                self._waits = False
                if failed:
                    tell()
                return
            (over,) = consensus.anyone(
                hosts.is_lead() and time.monotonic() - began >= _AT_THE_END
            )
            if over or self._under_way is not None:
                raise self._stop(step)
            if self._failures:
                failed = True
                tell()
                if self._pause(ends):
                    raise self._stop(step)
            self._attempt(step)

    def _pause(self, ends: Callable[[], bool]) -> bool:
        """Waits for the next attempt, or until the run is to end: whether it is."""
        while not ends():
            (again,) = consensus.anyone(hosts.is_lead() and time.monotonic() >= self._again)
            if again:
                return False
            time.sleep(_GLANCE)
        return True

    def _attempt(self, step: int) -> None:
        self._under_way, self._error = step, self._try(self._prepare, step)
        (failed,) = consensus.anyone(self._error is not None)
        if not failed:
            self._error = self._try(self._begin, step)
        elif self._error is None:
            self._error = UserError("another process could not write")

    @staticmethod
    def _try(act: Callable[[int], None], step: int) -> UserError | None:
        try:
            act(step)
        except UserError as e:
            return e
        return None

    def _look(self, seconds: float = 0.0) -> None:
        """Takes note of how the save under way ended, if it did in all processes."""
        if self._under_way is None:
            return
        running, error = self._checkpoints.poll(seconds)
        error = self._error or error
        running, failed = consensus.anyone(running, error is not None)
        if failed:
            self._why = str(error or "another process could not write")
        if running:
            return
        step, self._under_way = self._under_way, None
        if failed:
            self._checkpoints.clean()
            pause = min(_FIRST_PAUSE * 2 ** min(self._failures, 30), _LONGEST_PAUSE)
            self._failures += 1
            self._again = time.monotonic() + pause
            log.warning(
                "%s: the %s of step %d was not written, attempt %d (%s). Training %s; "
                "next attempt in %g s; the newest %s is of step %d",
                self._name, self._what, step, self._failures, self._why,
                "waits" if self._waits else "goes on", pause, self._what, self.safe,
            )
        else:
            if self._failures:
                log.warning("%s: %ss are written again, at step %d after %d failures",
                            self._name, self._what, step, self._failures)
            self.safe, self._failures, self._why = step, 0, ""

    def _stop(self, step: int) -> StoreError:
        self._checkpoints.abandon()
        return StoreError(
            f"{self._name}: stopped at step {step}: no {self._what} was written since step "
            f"{self.safe} ({self.why}). The same command goes on "
            f"from step {self.safe}"
        )
