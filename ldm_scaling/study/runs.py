"""What all training runs of a study share: their data loaders, and whether they are done."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from etils import epath

from ldm_scaling.config import Study, Train
from ldm_scaling.data.loading import loader
from ldm_scaling.data.loading.mixture import Mixture
from ldm_scaling.data.loading.source import Source
from ldm_scaling.parallel import processes
from ldm_scaling.training import checkpoint


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
