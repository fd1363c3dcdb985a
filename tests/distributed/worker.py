"""Processes of one training run, forked from this one, which has imported everything.

Reads a line of JSON for each order and answers with one:

    {"start": {"job": PATH, "address": "127.0.0.1:PORT", "k": 0, "n": 4, "log": PATH}} -> the pid
    {"wait": PID} -> its exit status, minus the signal's number where a signal ended it
    {"poll": PID} -> the same, or null while it runs

A job is a JSON file: `task` (linear, unet), `mesh` (arguments of `mesh.make`), `devices` of each
process, `train` (of `config.Train`), `data` (a cache), `directory`, `out`, `pause` (seconds a
batch), `max_corrupt`, `largest` (bytes that a file may have: a disk that is full), `late` (process
0 makes this file and stays away from the run), `reads` (a converted network, which process 0 reads
by itself in the end, as the last checkpoint). Process 0 writes `out`, the final parameters; the
exit status is as the command line's.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import toy

from ldm_scaling.config import Train
from ldm_scaling.data import cache
from ldm_scaling.data.loading import loader
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing, processes
from ldm_scaling.tasks import drawing
from ldm_scaling.training import checkpoint, loop, step
from ldm_scaling.training.task import Task


def network(mesh: jax.sharding.Mesh) -> Task:
    """A small U-Net on 4x4 latents, spread over a mesh as studies spread theirs."""
    spec = unet.UNetSpec(
        8, 16, (1,), (True,), 1, heads=2, groups=4, sample_size=4, context_length=3
    )
    schedule, denoise = schedule_lib.get("sd"), drawing.denoiser(spec, mesh, "float32")

    def loss(params, batch, key):
        cond = {"context": batch["context"]}
        out = loss_lib.diffusion_loss(denoise, params, batch["x"], cond, key, schedule, "v")
        return jnp.mean(out), {}

    return Task("toy", functools.partial(unet.init, spec), lambda batch: batch, loss)


class Slow:
    """A loader that takes its time, so that a run can be killed between any two of its steps."""

    def __init__(self, of, pause: float):
        self._of, self._pause = of, pause

    def __next__(self):
        time.sleep(self._pause)
        return next(self._of)

    def __getattr__(self, name: str):
        return getattr(self._of, name)


def train(job: dict, address: str, k: int, n: int) -> None:
    """Runs a job as process k of n."""
    jax.config.update("jax_num_cpu_devices", job["devices"])
    if n > 1:
        processes.initialize(f"{address},{k},{n}", start_s=120, heartbeat_s=20)
    if "largest" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], resource.RLIM_INFINITY))
    config = Train(**job["train"])
    source = cache.CacheSource(job["data"])

    def make_loader():
        return Slow(
            loader.train_loader(
                source, config.batch_size, seed=3, process_index=k, process_count=n,
                max_corrupt=job.get("max_corrupt", 0.01),
            ),
            job.get("pause", 0.0),
        )

    if "late" in job:
        processes.barrier("late")
        if k == 0:
            pathlib.Path(job["late"]).touch()
            time.sleep(3600)
    mesh = mesh_lib.make(**job.get("mesh", {}))
    task = network(mesh) if job["task"] == "unet" else toy.task()
    state = loop.fit(task, config, make_loader, job["directory"], mesh, seed=3)
    params, average = placing.fetch((state.params, state.ema))
    if "reads" in job:
        with processes.lead_first("read"):
            if k == 0:
                read_alone(job, task, config, average)
    if k == 0:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        np.savez(job["out"], **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    processes.barrier("done")


def read_alone(job: dict, task: Task, config: Train, average) -> None:
    """What one process reads while the others wait for its word is what is there."""
    from ldm_scaling.models import converted

    mesh = mesh_lib.own(1, jax.local_devices())
    abstract = step.abstract_state(task.init, config, mesh)
    folder = os.path.join(job["directory"], "checkpoints")
    found = checkpoint.average(folder, config.steps, abstract)
    jax.tree.map(np.testing.assert_array_equal, placing.fetch(found), average)
    converted.load(job["reads"])  # It compares the hash of all values.


def _process(order: dict) -> None:
    """What a forked process does; it does not return."""
    with open(order["log"], "ab") as log:
        # Through a pipe: what is told is told on a full disk too.
        told = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    for stream in (1, 2):
        os.dup2(told.stdin.fileno(), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    with open(order["job"]) as file:
        job = json.load(file)
    status, why = 0, ""
    try:
        train(job, order["address"], order["k"], order["n"])
    except UserError as e:
        status, why = 2, f"error: {e}"
    except Interrupted as e:
        status, why = 75, str(e)
    except BaseException:
        status, why = 1, traceback.format_exc()
    print(why, file=sys.stderr, flush=True)
    if status or order["n"] == 1:
        processes.leave(status, why)
    elif jax.distributed.is_initialized():
        jax.distributed.shutdown()
    os._exit(status)


def main() -> None:
    """Obeys orders until there are no more."""
    jax.config.update("jax_platforms", "cpu")
    print("ready", flush=True)
    done: dict[int, int] = {}
    for line in sys.stdin:
        (name, order), = json.loads(line).items()
        if name == "start":
            answer = os.fork()
            if answer == 0:
                _process(order)
        elif order in done:
            answer = done[order]
        else:
            pid, status = os.waitpid(order, 0 if name == "wait" else os.WNOHANG)
            answer = None
            if pid:
                answer = done[order] = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
