"""What all training runs of a study share: their data loaders, whether they are done, and what
they leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ldm_scaling.config import Study, Train
from ldm_scaling.data.loading import loader
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.models import backbone
from ldm_scaling.parallel import processes
from ldm_scaling.training import checkpoint, step


def loader_of(study: Study, source: Source | Mixture, train: Train) -> Callable:
    """What makes a run's loader: this process's share of the batches."""
    data = study.data
    return functools.partial(
        loader.train_loader, source, train.batch_size, seed=study.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
        workers=data.workers, max_corrupt=data.max_corrupt,
    )


def done(folder: epath.Path, run: Train) -> bool:
    """Whether a run is done; all processes hear the same, whenever they ask."""
    return processes.from_lead(
        "trained", lambda: checkpoint.latest(folder / "checkpoints") == run.steps
    )


def average(
    spec: backbone.Spec, folder: epath.Path, run: Train, mesh: jax.sharding.Mesh, steps: int
) -> Any:
    """The averaged parameters of a network's run after so many steps, laid out for a mesh."""
    abstract = step.abstract_state(backbone.initializer(spec), run, mesh)
    return checkpoint.average(folder / "checkpoints", steps, abstract)
