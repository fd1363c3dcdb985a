"""From any collection of images with captions to a prepared data set.

Two readings of each part: one finds out the facts of every pair (`facts`), one writes the shards of
what is kept (`preparation`). What is kept is decided in between, over the whole collection
(`decide`). One machine does it here, by processes; `beam` has the same steps for many.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from ldm_scaling import files
from ldm_scaling.data import shards
from ldm_scaling.data.collection import Collection
from ldm_scaling.data.preparing import report as prepare_report
from ldm_scaling.data.preparing.decide import decide
from ldm_scaling.data.preparing.duplicates import Duplicates
from ldm_scaling.data.preparing.filters import Filters
from ldm_scaling.data.preparing.preparation import Options, Preparation, begin
from ldm_scaling.errors import UserError

__all__ = ["Duplicates", "Filters", "Options", "run"]


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
        destination that holds something else, nothing left to keep.
      MissingPackageError: pyarrow, ImageHash or Apache Beam is not installed.
    """
    job, finished = begin(collection, destination, options or Options())
    if finished:
        _tidy(job)
        return shards.open(job.path)
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
    prepared = job.finish()  # the last: a folder with a manifest has all
    _tidy(job)
    return prepared


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
    workers = job.options.workers or os.cpu_count() or 1
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
    _, threads = _how_many(job)
    total = 0
    with files.progress(len(job.parts), desc, "part") as bar:
        if pool is None:
            results = (work(job, i, threads, *more) for i, more in enumerate(arguments))
        else:
            results = _results(
                [pool.submit(_in_worker, work, i, threads, *m) for i, m in enumerate(arguments)]
            )
        for count in results:
            total += count
            bar.set_postfix_str(f"{total} pairs", refresh=False)
            bar.update()
    return total


def _results(futures: list[concurrent.futures.Future]) -> Iterator[int]:
    try:
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as e:
        raise UserError(
            "a worker process was killed, most likely for want of memory: run again with fewer "
            "workers; it goes on where it was"
        ) from e


_job: list[Preparation] = []  # a worker's; sent to it once, as a collection may have many parts


def _in_worker(work: Callable[..., int], *arguments: Any) -> int:
    return work(_job[0], *arguments)


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
            f"lower validation_share or take another seed, and remove {os.fspath(job.path)}"
        )
    reasons = {name: entry["count"] for name, entry in report["dropped"].items()}
    shown = ", ".join(f"{count} {name}" for name, count in reasons.items())
    why = f" ({shown})" if shown else ""
    remedy = "loosen the filters"
    if "no caption" in reasons:  # they come after what is broken, or of another size
        remedy = "say captions=False to keep pairs without captions, or loosen the filters"
    return (
        f"none of the {report['read']} pairs in {job.collection.name} is kept{why}: {remedy}, and "
        f"remove {os.fspath(job.path)}"
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start


def _tidy(job: Preparation) -> None:
    """Removes what only an unfinished preparation needs, and what killed ones left."""
    for left in job.path.glob(".tmp-*"):
        left.unlink(missing_ok=True)
    job.work.rmtree(missing_ok=True)
