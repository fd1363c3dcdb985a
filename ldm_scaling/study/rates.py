"""Members trained at several learning rates, with width transfer and without: which rate is best at
which width (`models.width`). A run is short, and is kept as one record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from ldm_scaling import files
from ldm_scaling.config import Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, zoo
from ldm_scaling.parallel import hosts, placing
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import runs, stages
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.networks import model_hash
from ldm_scaling.study.statistics import optimum
from ldm_scaling.tasks import text_to_image
from ldm_scaling.training import optimizer as optimizer_lib
from ldm_scaling.training import state as state_lib
from ldm_scaling.training import step as step_lib
from ldm_scaling.training.feed import Feed
from ldm_scaling.training.state import TrainState
from ldm_scaling.training.task import Task

log = logging.getLogger(__name__)

FOLDER = "rates"
# Steps between two looks at whether the loss is still finite.
_LOOK = 25


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      member: the network's name.
      transfer: `none` or `mup`, see `config.Train.width_transfer`.
      rate: the learning rate.
      seed: of its first weights, its batches and its noise.
    """

    member: str
    transfer: str
    rate: float
    seed: int

    def study(self, study: Study) -> Study:
        """The study whose training this is."""
        base = study.train.base_member if self.transfer == "mup" else ""
        train = dataclasses.replace(
            study.train, learning_rate=self.rate, width_transfer=self.transfer, base_member=base
        )
        return dataclasses.replace(study, train=train, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
      run: it.
      width: of the network, its `base_channels`.
      steps: that it was trained for.
      loss: of the averaged parameters, on a fixed part of the validation split; None where
        training diverged: the loss was no finite number.
    """

    run: Run
    width: int
    steps: int
    loss: float | None


def of(study: Study, rates: Sequence[float], seeds: int) -> list[Run]:
    """All runs, those of one network together. At the base's width both parametrisations are one:
    it is in both, and trained once, see `results`.

    Raises:
      UserError: for a study without width transfer or with a start, members of one width, or rates
        that are not several.
    """
    train = study.train
    if not study.trains_members or train.width_transfer == "none":
        raise UserError(
            "rates compares width transfer with the standard parametrisation: give a config of "
            "members that are trained, with train.width_transfer=mup and train.base_member, such "
            "as configs/demo_width.py"
        )
    if study.start.workdir:
        raise UserError(
            f"rates trains members from weights that are drawn: leave out start.workdir="
            f"{study.start.workdir!r}"
        )
    widths = {zoo.get(member).spec.base_channels for member in study.members}
    if len(widths) < 2:
        raise UserError(
            f"rates compares widths, and members={study.members} have one: name several"
        )
    if len(set(rates)) < max(optimum.NOISE_FROM, len(rates)):
        told = ", ".join(f"{rate:g}" for rate in rates)
        raise UserError(f"rates {told}: give at least {optimum.NOISE_FROM}, each once")
    return [
        Run(member, transfer, rate, study.seed + seed)
        for member in sorted(study.members, key=lambda m: zoo.get(m).spec.base_channels)
        for transfer in (("none",) if _changes_nothing(study, member) else ("none", "mup"))
        for seed in range(seeds) for rate in sorted(rates)
    ]


def _changes_nothing(study: Study, member: str) -> bool:
    transfer = text_to_image.transfer(zoo.get(member).spec, study.train)
    return transfer is None or transfer.rates == backbone.rates(zoo.get(member).spec)


def path_of(materials: Materials, run: Run) -> epath.Path:
    """Of a run's record: its name tells all that decides the run."""
    key = model_hash(run.study(materials.study), run.member)
    return materials.workdir / FOLDER / f"{key}.json"


def read(path: epath.Path) -> Trained:
    """A record. Raises `UserError` for a file that is none."""
    try:
        body = json.loads(path.read_text())
        return Trained(Run(**body.pop("run")), **body)
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path} is no record of a run ({e}): delete it, and run again") from e


def results(materials: Materials, planned: Sequence[Run]) -> list[Trained]:
    """The records of runs that are done, those of the base's width under both parametrisations."""
    paths = [path_of(materials, run) for run in planned]
    found = [read(path) for path in paths if path.exists()]
    return found + [
        dataclasses.replace(r, run=dataclasses.replace(r.run, transfer="mup"))
        for r in found if _changes_nothing(materials.study, r.run.member)
    ]


def train(materials: Materials, planned: Sequence[Run]) -> None:
    """Every run that has no record yet; first what all need, an autoencoder and its latents."""
    missing = [run for run in planned if not path_of(materials, run).exists()]
    if not missing:
        return
    stages.prepare(materials)
    stages.train_autoencoder(materials)
    stages.cache_latents(materials)
    steps = materials.study.train.steps
    with files.progress(len(planned) * steps, "rates", "step") as bar:
        bar.update((len(planned) - len(missing)) * steps)
        steppers: dict[str, _Stepper] = {}
        for run in missing:
            if run.member not in steppers:  # One at a time: what it compiled takes memory.
                steppers = {run.member: _Stepper(materials, run.member)}
            step = steppers[run.member]
            bar.set_postfix_str(f"{run.member} {run.transfer} {run.rate:.3g}")
            done = step.trained(run, bar.update)
            log.info("%s", done)
            files.write_json(path_of(materials, run), dataclasses.asdict(done))


class _Stepper:
    """A network's training at any rate, in both parametrisations: `loop.fit`'s numbers to rounding,
    without its checkpoints.

    All that differs is an argument of the compiled step: the rate, whose own is 1, multiplies
    Adam's steps and weight decay; a parameter's own rate Adam's steps alone.

    Args:
      materials: of the study.
      member: the network's name.
    """

    def __init__(self, materials: Materials, member: str):
        m = self.materials = materials
        self.mesh, self.spec = m.mesh, m.spec(member)
        plain = Run(member, "none", 1.0, 0).study(m.study).train
        plain = dataclasses.replace(plain, averages=(), averages_every=0)  # None is kept.
        self.config: Train = plain
        self.task: Task = text_to_image.make(
            member, self.spec, plain, m.study.diffusion, m.study.sample, m.frozen,
            m.drawer(member), m.validation,
        )
        abstract = step_lib.abstract_state(self.task.init, plain, self.mesh)
        shardings = jax.tree.map(lambda s: s.sharding, abstract)
        everywhere = mesh_lib.replicated(self.mesh)
        self._ones = jax.tree.map(lambda _: np.float32(1), abstract.params)

        def begin(key: jax.Array, draws: Any) -> TrainState:
            params = jax.tree.map(lambda p, times: p * times, self.task.init(key), draws)
            return state_lib.create(params, optimizer_lib.make(plain))

        def step(
            state: TrainState, batch: Any, key: jax.Array, frozen: Any, rate: jax.Array, rates: Any
        ):
            own = optimizer_lib.make(plain, rates)

            def update(grads, opt_state, params):
                updates, opt_state = own.update(grads, opt_state, params)
                return jax.tree.map(lambda u: rate * u, updates), opt_state

            return step_lib.train_step(
                state, batch, key, frozen, loss=self.task.loss, config=plain,
                optimizer=optax.GradientTransformation(own.init, update),
                project=self.task.project,
            )

        self.begin = jax.jit(
            begin, out_shardings=shardings, compiler_options=hosts.run_once_options()
        )
        self.step = jax.jit(
            step, donate_argnums=0, out_shardings=(shardings, everywhere),
            in_shardings=(
                shardings, mesh_lib.batch_sharding(self.mesh), *[everywhere] * 4
            ),
        )

    def _factors(self, run: Run) -> tuple[Any, Any]:
        """By parameter, what multiplies its first values and Adam's steps."""
        found = text_to_image.transfer(self.spec, run.study(self.materials.study).train)
        both = (found.draws, found.rates) if found else (None, backbone.rates(self.spec))
        return tuple(
            self._ones if tree is None else jax.tree.map(np.float32, tree) for tree in both
        )

    def trained(self, run: Run, tell: Callable[[int], Any]) -> Trained:
        """Trains to the end, or until the loss is not finite.

        Args:
          run: of this network.
          tell: told of steps that are behind.
        """
        study, root = run.study(self.materials.study), jax.random.key(run.seed)
        draws, rates = self._factors(run)
        state = self.begin(jax.random.fold_in(root, 0), draws)
        key, rate = jax.random.fold_in(root, 1), np.float32(run.rate)
        rates = placing.replicate(self.mesh, rates)
        steps, finite = self.config.steps, True
        with self._feed(study) as feed:
            for number in range(1, steps + 1):
                state, values = self.step(state, next(feed), key, self.task.frozen, rate, rates)
                if number % _LOOK == 0 or number == steps:
                    finite = math.isfinite(float(values["loss"]))
                    tell(steps - number + (number % _LOOK or _LOOK) if not finite else
                         number % _LOOK or _LOOK)
                if not finite:
                    break
        loss = self.task.validate(state.ema, steps)["loss"] if finite else math.nan
        return Trained(run, self.spec.base_channels, steps, loss if math.isfinite(loss) else None)

    @contextlib.contextmanager
    def _feed(self, study: Study) -> Iterator[Feed]:
        loader = runs.loader_of(study, self._source, study.train)()
        with Feed(loader, self.task.make_batch, mesh_lib.batch_sharding(self.mesh)) as feed:
            yield feed

    @functools.cached_property
    def _source(self) -> Any:
        return self.materials.caches.training()
