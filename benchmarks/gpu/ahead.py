"""What the ladder runs beside `ldm-scaling`'s commands, and before them.

    python benchmarks/gpu/ahead.py programs [--train | --samplers] [MEMBER ...] --config=FILE
    python benchmarks/gpu/ahead.py data --config=FILE --workdir=W          the pictures
    python benchmarks/gpu/ahead.py latents --config=FILE --workdir=W       the autoencoder's, and it
    python benchmarks/gpu/ahead.py reference --config=FILE --workdir=W     text states, statistics
    python benchmarks/gpu/ahead.py seconds MEMBER ... --config=FILE --to=F.json

`programs` runs each program of a member's training and sweep (or of one of them) once, on zeros and
first weights, so that they are in `JAX_COMPILATION_CACHE_DIR` when data, autoencoder and latents
are; without a member those of the autoencoder and the frozen networks. `latents` and `reference`
need the data alone, and run side by side; `latents` also writes the checkpoint of the autoencoder
that is packed, in which what only its training needs is zero. `seconds` measures a row of sampling
and the decoding of a picture with nothing else on the card: while several members are at work their
records' seconds are of a card that is shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from packing import LIGHT, alone
from reckoning import study_of

from ldm_scaling import files
from ldm_scaling.config import Study, Train
from ldm_scaling.errors import SAVED, Interrupted, UserError
from ldm_scaling.models import autoencoder
from ldm_scaling.parallel import compiled, hosts
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study import caching, encoders, stages, study_checks
from ldm_scaling.study.materials import SHOWN_EXAMPLES, SPLITS, VALIDATION_EXAMPLES, Materials
from ldm_scaling.study.sweep import TIMED_CALLS
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.drawing import Drawer, Frozen, sampling_key
from ldm_scaling.training import checkpoint, step
from ldm_scaling.training.state import TrainState
from ldm_scaling.training.task import Task


class Rehearsal:
    """The study's programs on zeros.

    Args:
      study: the config.
      folder: empty, for what is thrown away.
    """

    def __init__(self, study: Study, folder: Path):
        self.study, self.folder = study, folder
        self.materials = Materials(study, Workdir(folder))
        self.mesh = self.materials.mesh

    @functools.cached_property
    def frozen(self) -> Frozen:
        """With an autoencoder's first weights; captions by the encoder itself."""
        spec = autoencoder_task.spec_of(self.study.autoencoder)
        task = autoencoder_task.make(self.study.autoencoder, self._shown)
        params = self.state(task, self.study.autoencoder.train).ema
        null_ctx_LD = self.materials.networks.states([""])[0]
        return Frozen(spec, params, 1.0, self.materials.latent_shape, null_ctx_LD)

    @property
    def _shown(self) -> np.ndarray:
        side, count = self.study.data.side, self.study.data.validation_pictures
        return np.zeros((min(SHOWN_EXAMPLES, count), side, side, 3), np.uint8)

    def state(self, task: Task, run: Train) -> TrainState:
        """As a run begins with."""
        return step.init_state(task.init, run, self.mesh, jax.random.key(0), task.start)

    def train(self, task: Task, run: Train, state: TrainState, batch: dict[str, Any]) -> TrainState:
        """One step, as `training.loop` takes it, and a validation."""
        abstract = step.abstract_state(task.init, run, self.mesh)
        frozen = () if task.frozen is None else (task.frozen,)
        train = step.make(
            task.loss, run, self.mesh, abstract, task.frozen, task.rates, task.project
        )
        key = jax.jit(
            jax.random.fold_in, out_shardings=mesh_lib.replicated(self.mesh)
        )(jax.random.key(0), 1)
        sharding = mesh_lib.batch_sharding(self.mesh)
        batch = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), task.make_batch(batch)
        )
        state, _ = train(state, batch, key, *frozen)
        task.validate(state.ema, 1)
        return state

    def shared(self) -> None:
        """The autoencoder's, and the frozen networks'."""
        run, side = self.study.autoencoder.train, self.study.data.side
        task = autoencoder_task.make(self.study.autoencoder, self._shown)
        zeros = np.zeros((run.batch_size, side, side, 3), np.uint8)

        caching.cache_text(
            self.folder / "text", [""], self.materials.text_states, self.mesh,
            embedder=self.materials.text_encoder,
        )
        self.train(task, run, self.state(task, run), {"image": zeros})
        self.materials.feature_network.features(
            np.zeros((self.study.sweep.batch_size, side, side, 3), np.uint8))
        encoder = encoders.latent_encoder(
            self.frozen.decoder_spec, self.frozen.decoder_params, compute_dtype=run.compute_dtype)
        caching.cache_latents(
            self.folder / "latents", _Zeros(128, side), encoder, self.mesh, "",
            dtype=self.study.data.latent_dtype,
        )

    @functools.cache  # noqa: B019
    def drawer(self, member: str) -> Drawer:
        """As `Materials.drawer`."""
        train = self.study.train
        return Drawer(
            self.materials.spec(member), self.frozen, self.study.diffusion,
            mesh_lib.rounded(self.study.sweep.batch_size, self.mesh), self.frozen.decoder(),
            self.mesh, train.compute_dtype, train.attention,
        )

    def task(self, member: str) -> Task:
        """A member's."""
        study, shape = self.study, self.frozen.latent_shape
        count = min(VALIDATION_EXAMPLES, study.data.validation_pictures)
        validation = {
            "mean": np.zeros((count, *shape), study.data.latent_dtype),
            "context": np.zeros((count, *self.frozen.null_ctx_LD.shape), np.float16),
            "index": np.arange(count, dtype=np.int32),
        }
        return text_to_image.make(
            member, self.materials.spec(member), study.train, study.diffusion, study.sample,
            self.frozen, self.drawer(member), validation,
        )

    def training(self, name: str) -> None:
        """A member's."""
        task, run = self.task(name), self.study.train
        shapes = text_to_image.batch_shapes(
            run.batch_size, self.frozen.latent_shape, self.frozen.null_ctx_LD.shape,
            self.study.data.latent_dtype, self.mesh,
        )
        zeros = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        self.train(task, run, self.state(task, run), zeros)

    def sampling(self, name: str) -> None:
        """A member's."""
        params = self.state(self.task(name), self.study.train).ema
        drawer, key = self.drawer(name), sampling_key(self.study.seed)
        for guidance in (2.0, 1.0):
            one = self._configuration(drawer, min(self.study.sweep.steps), guidance)
            drawer.pictures(params, [one], self._contexts, key)

    def seconds(self, member: str, params: Any, guidance: float) -> tuple[float, float]:
        """Of a row of one sample, and of decoding one; see `Drawer.seconds`."""
        drawer = self.drawer(member)
        steps = min(self.study.sweep.steps, key=lambda n: abs(n - TIMED_CALLS))
        return drawer.seconds(
            params, self._configuration(drawer, steps, guidance), self._contexts,
            sampling_key(self.study.seed),
        )

    def _configuration(self, drawer: Drawer, steps: int, guidance: float) -> Configuration:
        sweep = self.study.sweep
        table = drawer.table(sweep.samplers[0], steps, sweep.spacing)
        index = np.arange(sweep.batch_size, dtype=np.int32)
        return Configuration(table, guidance, index, index)

    @property
    def _contexts(self) -> np.ndarray:
        shape = (self.study.sweep.batch_size, *self.frozen.null_ctx_LD.shape)
        return np.zeros(shape, np.float16)


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """Black pictures, as a source."""

    count: int
    side: int

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Any, keys: Any = None) -> dict[str, np.ndarray]:
        return {"image": np.zeros((len(indices), self.side, self.side, 3), np.uint8)}


def prepare(what: str, study: Study, workdir: Path) -> None:
    """What all members need, into the study's workdir."""
    place = Workdir(workdir)
    materials = study_checks.check(study, place)
    place.bind(materials.study)
    if what == "data":
        _ = materials.datasets
    elif what == "latents":
        stages.train_autoencoder(materials)
        lighten(materials)
        for split in SPLITS:
            materials.caches.latents(0, split)
        _ = materials.latent_scale
    else:
        stages.prepare(materials)
        _ = materials.scorer


def lighten(materials: Materials) -> None:
    """The trained autoencoder's checkpoint a second time, with its average as its parameters and no
    moments: a quarter of the bytes when it is packed, and read like any other."""
    run, workdir = materials.study.autoencoder.train, materials.workdir
    folder = workdir / "autoencoder" / "checkpoints"
    to = workdir / LIGHT / "autoencoder" / "checkpoints"
    if checkpoint.latest(to) == run.steps:
        return
    spec = autoencoder_task.spec_of(materials.study.autoencoder)
    abstract = step.abstract_state(autoencoder.initializer(spec), run, materials.mesh)
    state, iterator = checkpoint.read(checkpoint.Place(folder, run.steps), abstract)
    zeros = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state.opt_state)
    state = state._replace(params=state.ema, opt_state=zeros)
    with checkpoint.Checkpoints(to, keep=1) as kept:
        kept.save(run.steps, state, iterator, checkpoint.config_of(folder, run.steps))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", choices=("programs", "data", "latents", "reference", "seconds"))
    parser.add_argument("members", nargs="*")
    parser.add_argument("--config", required=True, metavar="FILE[:argument]")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--to", type=Path)
    for part in ("train", "samplers"):
        parser.add_argument(f"--{part}", action="store_true", help="programs: these alone")
    args = parser.parse_intermixed_args(argv)
    if (args.workdir is None) == (args.what in ("data", "latents", "reference")):
        parser.error(f"{args.what} {'needs' if args.workdir is None else 'takes no'} --workdir")
    if args.what == "seconds" and not (args.to and args.members):
        parser.error("seconds needs --to and members")
    hosts.use_cpu_cores()
    compiled.keep()
    try:
        study = study_of(args.config)
        if args.workdir:
            prepare(args.what, study, args.workdir)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = Rehearsal(study, Path(folder))
            if args.what == "programs" and not args.members:
                rehearsal.shared()
            for member in args.members:
                if args.what == "programs":
                    if not args.samplers:
                        rehearsal.training(member)
                    if not args.train:
                        rehearsal.sampling(member)
                    continue
                params = rehearsal.state(rehearsal.task(member), study.train).ema
                (guided, decode), (plain, _) = (
                    rehearsal.seconds(member, params, w) for w in (2.0, 1.0)
                )
                row = {"guided": guided, "plain": plain, "decode": decode,
                       "device": hosts.describe(list(rehearsal.mesh.devices.flat))}
                found = alone(args.to) | {member: row}
                files.write_json(args.to, found)
        return 0
    except Interrupted as e:
        print(e, file=sys.stderr)
        return SAVED
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
