"""From any collection of images with captions to a prepared data set.

Two readings of each part: one finds out the facts of every pair (`facts`), one writes the shards of
what is kept (`preparation`). What is kept is decided in between, over the whole collection
(`decide`). One machine does it here, by processes; `beam` has the same steps for many.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from etils import epath

from ldm_scaling import files, machine
from ldm_scaling.data import shards
from ldm_scaling.data.collection import SCORES, Collection
from ldm_scaling.data.preparing import report as prepare_report
from ldm_scaling.data.preparing.decide import decide
from ldm_scaling.data.preparing.duplicates import Duplicates
from ldm_scaling.data.preparing.filters import Filters
from ldm_scaling.data.preparing.options import Options
from ldm_scaling.data.preparing.preparation import Preparation, begin, check_outside
from ldm_scaling.errors import UserError

__all__ = ["Duplicates", "Filters", "Options", "check_outside", "run"]

_LOCK = ".lock"
_AHEAD = 4  # parts for each process that wait or are under way


def run(
    collection: Collection,
    destination: epath.PathLike,
    options: Options | None = None,
    runner: str | None = None,
    pipeline_options: Sequence[str] = (),
) -> shards.Shards:
    """Prepares a collection, goes on with it, or finds it prepared already.

    Args:
      collection: what to prepare.
      destination: the folder to make; with `runner`, one that all workers see under this path.
      options: how.
      runner: name of an Apache Beam runner; None is this machine without Beam.
      pipeline_options: of Beam, as on its command line.

    Raises:
      UserError: what the user can mend: files that cannot be read or written or that changed, a
        destination that holds something else or that another preparation is at work in, nothing
        left to keep.
      MissingPackageError: pyarrow, ImageHash or Apache Beam is not installed.
    """
    job, finished = begin(collection, destination, options or Options())
    if not finished:
        with lock(job):
            if not job.finished:  # by another, in between
                _run(job, runner, pipeline_options)
    prepared = shards.open(job.path)
    _tidy(job, prepared)
    return prepared


def lock(job: Preparation) -> IO[str]:
    """Holds the destination for this process while the returned file is open.

    Raises `UserError` when another preparation holds it, or the folder cannot be written.
    """
    where = os.fspath(job.path)
    try:
        job.path.mkdir(parents=True, exist_ok=True)
        return files.lock(
            job.path / _LOCK,
            f"another preparation is at work in {where}: wait for it, or choose another folder",
        )
    except OSError as e:
        raise UserError(f"cannot write into {where}: {e.strerror or e}") from e


def _run(job: Preparation, runner: str | None, pipeline_options: Sequence[str]) -> None:
    seconds: dict[str, float] = {}
    if runner is None:
        done = _run_here(job, seconds)
    else:
        from ldm_scaling.data.preparing import beam

        done = {}
        with _timed(seconds, "beam"):
            beam.run(job, runner, pipeline_options)
    report = prepare_report.gather(job)
    if not report["kept"]["train"]:
        raise UserError(_nothing(job, report))
    report["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    report["per_second"] = {name: round(done[name] / seconds[name], 1) for name in done}
    prepare_report.write(job, report)
    job.finish()  # the last: a folder with a manifest has all


def _run_here(job: Preparation, seconds: dict[str, float]) -> dict[str, int]:
    """Does all steps; returns how many pairs this run examined and wrote."""
    done = {}
    with _workers(job) as pool:
        with _timed(seconds, "scan"):
            done["scan"] = _each_part(job, pool, _scan, [() for _ in job.parts], "examining")
        job.check_broken(range(len(job.parts)))
        job.check_source()
        with _timed(seconds, "decide"):
            decide(job)
        named = job.shard_files([job.counts(i) for i in range(len(job.parts))])
        with _timed(seconds, "write"):
            arguments = [(names,) for names in named]
            done["write"] = _each_part(job, pool, _write, arguments, "writing")
    return done


def _scan(job: Preparation, i: int, threads: int) -> int:
    return job.scan(i, threads)


def _write(job: Preparation, i: int, threads: int, named: dict[str, str]) -> int:
    return job.write(i, named, threads)


def _how_many(job: Preparation) -> tuple[int, int]:
    """Processes, and threads in each."""
    workers = job.options.workers or machine.cores()
    processes = min(workers, len(job.parts))
    return processes, math.ceil(workers / processes)


@contextlib.contextmanager
def _workers(job: Preparation) -> Iterator[concurrent.futures.ProcessPoolExecutor | None]:
    """Processes for the parts, or None where one is enough."""
    processes, _ = _how_many(job)
    if processes == 1:
        yield None
        return
    # Not by fork: JAX's threads may hold locks that a forked process would wait for.
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _begin_worker, (job,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _each_part(
    job: Preparation,
    pool: concurrent.futures.ProcessPoolExecutor | None,
    work: Callable[..., int],
    arguments: Sequence[tuple[Any, ...]],
    desc: str,
) -> int:
    """Does `work` for every part; returns how many pairs it was done for anew."""
    processes, threads = _how_many(job)
    total = 0
    with files.progress(len(job.parts), desc, "part") as bar:
        if pool is None:
            results = (work(job, i, threads, *more) for i, more in enumerate(arguments))
        else:
            tasks = (
                (work, _share(job, i), i, threads, *more) for i, more in enumerate(arguments)
            )
            results = _results(pool, tasks, processes)
        for count in results:
            total += count
            bar.set_postfix_str(f"{total} pairs", refresh=False)
            bar.update()
    return total


def _share(job: Preparation, i: int) -> Collection | None:
    """As much of the collection as part i needs, where it would be listed in each process."""
    share = getattr(job.collection, "share", None)
    return share(job.parts[i]) if share else None


def _results(
    pool: concurrent.futures.ProcessPoolExecutor, tasks: Iterator[tuple[Any, ...]], processes: int
) -> Iterator[int]:
    """What tasks give, as they are done; few of them are made ahead."""
    waiting: set[concurrent.futures.Future] = set()
    try:
        for task in tasks:
            waiting.add(pool.submit(_in_worker, *task))
            if len(waiting) >= _AHEAD * processes:
                first = concurrent.futures.FIRST_COMPLETED
                done, waiting = concurrent.futures.wait(waiting, return_when=first)
                yield from (future.result() for future in done)
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
            f"a worker process was killed, most likely for want of memory: run `ldm-scaling "
            f"prepare` with fewer than --workers={processes}; it goes on where it was"
        ) from e


_job: list[Preparation] = []  # a worker's; sent to it once, as a collection may have many parts


def _in_worker(work: Callable[..., int], share: Collection | None, *arguments: Any) -> int:
    job = _job[0] if share is None else dataclasses.replace(_job[0], collection=share)
    return work(job, *arguments)


def _begin_worker(job: Preparation) -> None:
    """Has a worker end with the process that started it, and at Ctrl-C without a word."""

    _job.append(job)

    def wait() -> None:  # a worker whose parent was killed would wait for work for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # its files are whole or not there


def _nothing(job: Preparation, report: dict[str, Any]) -> str:
    if report["kept"]["validation"]:
        return (
            f"all {report['kept']['validation']} pairs that are kept are in the validation split: "
            "lower data.prepare.validation_share or take another data.seed, and remove "
            f"{os.fspath(job.path)}"
        )
    reasons = {name: entry["count"] for name, entry in report["dropped"].items()}
    shown = ", ".join(f"{count} {name}" for name, count in reasons.items())
    why = f" ({shown})" if shown else ""
    remedy = "loosen the filters"
    scores = [score for score in SCORES if f"no {score} score" in reasons]
    if scores:
        keys = " and ".join(f"data.prepare.{score}_column" for score in scores)
        remedy = f"name the column of the scores by {keys}, or loosen the filters"
    if "no caption" in reasons:  # they come after what is broken, or of another size
        remedy = "keep them without by data.prepare.captions=False, or loosen the filters"
    return (
        f"none of the {report['read']} pairs in {job.collection.name} is kept{why}: {remedy}, and "
        f"remove {os.fspath(job.path)}"
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def _tidy(job: Preparation, prepared: shards.Shards) -> None:
    """Removes what only an unfinished preparation needs, and what killed ones left."""
    splits = prepared.manifest["splits"].values()
    ours = {shard["file"] for split in splits for shard in split["shards"]}
    written = job.path.glob(f"{prepared.name}-*.array_record-*")
    stale = [file for file in written if file.name not in ours]  # its parts were others then
    left = [*job.path.glob(".tmp-*"), *stale, job.path / _LOCK]
    for path in left:
        if path.exists():  # A finished folder may be mounted to be read alone.
            path.unlink(missing_ok=True)
    if job.work.exists():
        job.work.rmtree(missing_ok=True)
