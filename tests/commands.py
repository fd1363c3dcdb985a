"""`ldm-scaling` in the tests' own process: nothing starts, and what was traced and compiled is not
again. On one device, as on a laptop: for the eight of the tests all takes a third longer."""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Iterator
from unittest import mock

import jax

from ldm_scaling import cli
from ldm_scaling.models import spread
from ldm_scaling.parallel import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Within it a mesh of which nothing is said is of one device, as frozen networks' batches are,
    and others are what they are."""
    make, over = mesh_lib.make, spread.over

    def of_one(data=-1, fsdp=1, tensor=1, slices=0, devices=None):
        if devices is None and (data, fsdp, tensor, slices) == (-1, 1, 1, 0):
            devices = jax.devices()[:1]
        return make(data, fsdp, tensor, slices, devices)

    def over_one(devices, batch, **rows):
        return over(jax.devices()[:1] if devices is None else devices, batch, **rows)

    with mock.patch.object(mesh_lib, "make", of_one), mock.patch.object(spread, "over", over_one):
        yield


def run(*words: str) -> tuple[int, str]:
    """The exit status and what was said on stderr, as a user in the root reads it."""
    with (one_device(), contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO()) as said):
        status = cli.main(list(words))
    return status, said.getvalue()
