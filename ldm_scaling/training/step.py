"""The train step: a pure function of (state, batch, key), jitted once with its shardings named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_scaling.config import Train
from ldm_scaling.parallel import hosts, leafwise, rules
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import averages as averages_lib
from ldm_scaling.training import optimizer as optimizer_lib
from ldm_scaling.training import state as state_lib
from ldm_scaling.training.state import TrainState
from ldm_scaling.training.task import Beside

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def train_step(
    state: TrainState, batch: Any, key: jax.Array, frozen: Any = None, *, loss: Loss,
    config: Train, optimizer: optax.GradientTransformation,
    project: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step.

    Args:
      state: before.
      batch: what the task's `make_batch` gave, leading axis B.
      key: the run's root key; the step folds its own number in.
      frozen: see `task.Task`.
      loss: `loss(params, batch, key) -> (scalar, metrics)`; with `frozen` see `task.Task`.
      config: the run.
      optimizer: optax's.
      project: see `task.Task`.
    Returns:
      The state after, and scalar metrics: `loss`, `grad_norm` and the task's.
    """
    key = jax.random.fold_in(key, state.step)
    if frozen is not None:
        beside = jax.lax.stop_gradient(Beside(frozen, state.ema))
        loss = functools.partial(_with_beside, loss, beside)
    value, metrics, grads = _gradients(loss, state.params, batch, key, config.micro_batches)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if project is not None:
        params = project(params)
    decay = optimizer_lib.ema_decay(config, state.step)
    ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    averages = averages_lib.updated(state.averages, state.rests, params, state.step + 1)
    return TrainState(state.step + 1, params, opt_state, ema, *averages), metrics


def _with_beside(loss: Loss, beside: Beside, params: Any, batch: Any, key: jax.Array):
    return loss(params, batch, key, beside)


def _gradients(loss: Loss, params: Any, batch: Any, key: jax.Array, parts: int):
    """Loss, metrics and gradients, averaged over parts of the batch that follow one another.

    A part takes every so-many-th example, so that each device's part is among its own.
    """
    gradients = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradients(params, batch, key)
        return value, metrics, grads
    batch = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def part(number):
        own = jax.tree.map(lambda x: x[number], batch)
        (value, metrics), grads = gradients(params, own, jax.random.fold_in(key, number))
        return jax.tree.map(lambda x: x / parts, (value, metrics, grads))

    def add(number, total):
        return jax.tree.map(jnp.add, total, part(number))

    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, 0))
    return jax.lax.fori_loop(0, parts, add, nothing)


def abstract_state(init: Callable, config: Train, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a run's state; nothing is allocated."""
    optimizer = optimizer_lib.make(config)
    # By itself: jax keeps what it traced of a function. It takes a second, and studies ask often.
    params = jax.eval_shape(init, jax.random.key(0))
    shapes = jax.eval_shape(
        lambda params: state_lib.create(params, optimizer, config.averages), params
    )
    shardings = rules.shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes, shardings,
    )


def init_state(
    init: Callable, config: Train, mesh: Mesh, key: jax.Array, start: Callable | None = None
) -> TrainState:
    """A run's first state, made where it will live; see `task.Task` for `init` and `start`."""
    optimizer = optimizer_lib.make(config)
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(init, config, mesh))
    options = hosts.run_once_options()
    # What `start` gives may be in use elsewhere; parameters made here become the state's.
    params = leafwise.run(init, key, shardings.params) if start is None else start()
    return jax.jit(
        lambda params: state_lib.create(params, optimizer, config.averages),
        out_shardings=shardings, compiler_options=options, donate_argnums=() if start else (0,),
    )(params)


def make(
    loss: Loss, config: Train, mesh: Mesh, abstract: TrainState, frozen: Any = None,
    rates: Any = None, project: Callable[[Any], Any] | None = None,
) -> Callable:
    """The jitted step `(state, batch, key) -> (state, metrics)`; the state is donated.

    With `frozen`, arrays or shapes with shardings, it is `(state, batch, key, frozen)`. `rates` are
    the optimiser's, see `optimizer.make`; for `project` see `task.Task`.

    Raises:
      UserError: when a part of the batch does not split over the mesh.
    """
    mesh_lib.check_batch(
        mesh, config.batch_size // config.micro_batches, "batch_size / micro_batches"
    )
    optimizer = optimizer_lib.make(config, rates)
    shardings = jax.tree.map(lambda s: s.sharding, abstract)

    def step(state, batch, key, *frozen):
        return train_step(
            state, batch, key, *frozen, loss=loss, config=config, optimizer=optimizer,
            project=project,
        )

    aside = () if frozen is None else (jax.tree.map(lambda a: a.sharding, frozen),)
    return jax.jit(
        step,
        in_shardings=(
            shardings, mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh), *aside
        ),
        out_shardings=(shardings, mesh_lib.replicated(mesh)),
        donate_argnums=0,
    )
