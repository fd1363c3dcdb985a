"""parallel/leafwise.py: the arrays of one program, made one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.models import unet
from ldm_scaling.parallel import leafwise
from ldm_scaling.parallel import mesh as mesh_lib

TOY = unet.UNetSpec(
    8, context_dim=16, channel_mults=(1,), attention_levels=(True,), blocks_per_level=1, heads=2,
    groups=4, sample_size=8, context_length=5,
)  # fmt: skip


def test_a_network_s_values():
    """To the last digits, which XLA rounds as it fuses."""
    init, key = functools.partial(unet.init, TOY), jax.random.key(3)
    wanted = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(key)
    found = leafwise.run(init, key)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, one in jax.tree_util.tree_leaves_with_path(wanted):
        other = functools.reduce(lambda tree, k: tree[k.key], path, found)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7, err_msg=str(path))


def test_what_a_leaf_may_need():
    """Constants, another leaf's numbers, a called function, the key itself, nothing at all."""
    table = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    called = jax.jit(lambda x, scale: (x * scale, x + scale))

    def function(key):
        a, b = called(jax.random.normal(key, (2, 3)), 2.0)
        lost = jax.lax.while_loop(lambda x: x < 1e6, lambda x: 2 * x, jnp.sum(b))
        del lost
        return {
            "a": a + table, "b": (b, jnp.zeros((3,), jnp.int32)), "same": a, "key": key,
            "relu": jax.nn.relu(b), "ones": jnp.ones(()),
        }

    key = jax.random.key(0)
    wanted, found = function(key), leafwise.run(function, key)
    assert (found.pop("key") == wanted.pop("key")).all()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


def test_one_program_a_form():
    """Forty arrays of two forms are two programs, and each is what its own key says."""
    def function(key):
        keys = [jax.random.fold_in(key, i) for i in range(40)]
        return [jax.random.normal(k, (3, 5) if i % 2 else (7,)) / (i + 1)
                for i, k in enumerate(keys)]

    key, compiled = jax.random.key(1), []

    def note(event, seconds, **kw):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        found = leafwise.run(function, key)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(compiled) == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, function(key))


def test_functions_of_other_constants_are_other_programs():
    """A loop over a function that holds a table: its text does not tell which."""
    def looped(key, table):
        held = jax.jit(lambda y: (y + table).sum())
        return jax.lax.map(held, jax.random.normal(key, (4, 3)))

    def function(key):
        table = np.arange(3, dtype=np.float32)
        return looped(key, table), looped(key, 100 * table)

    key = jax.random.key(4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5),
                 leafwise.run(function, key), function(key))


def test_laid_out_as_asked():
    """Over eight devices: the shardings are those asked for, the values those of one device."""
    mesh, key = mesh_lib.make(), jax.random.key(2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))

    def function(key):
        return jax.random.truncated_normal(key, -2.0, 2.0, (3, 16)), jnp.ones((5,))

    found = leafwise.run(function, key, (split, mesh_lib.replicated(mesh)))
    assert [a.sharding for a in found] == [split, mesh_lib.replicated(mesh)]
    assert found[0].addressable_shards[0].data.shape == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, found, leafwise.run(function, key))
