"""Exchanges of known volume, read out of compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_scaling.parallel import collectives, hlo


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))


def on(*axes):
    return NamedSharding(mesh(), P(*axes))


def shape(dims, *axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=on(*axes))


def compiled(run, *args, out=None):
    jitted = jax.jit(run) if out is None else jax.jit(run, out_shardings=out)
    return jitted.lower(*args).compile()


def exchanges(run, *args, out=None):
    return collectives.of(hlo.parse(compiled(run, *args, out=out).as_text()), 8)


def test_an_all_gather_has_the_bytes_of_the_array():
    (one,) = exchanges(lambda x: 2 * x, shape((64, 32), "b"), out=on())
    assert (one.kind, one.times, one.group) == ("all-gather", 1, 4)
    assert one.bytes == 64 * 32 * 4
    assert one.sent == 3 / 4 * one.bytes


@pytest.mark.parametrize(
    "run, kind, group, of_local, sent",
    [
        (lambda x: lax.psum(x, "a"), "all-reduce", 2, 1, 2 * 1 / 2),
        (lambda x: lax.psum(x, ("a", "b")), "all-reduce", 8, 1, 2 * 7 / 8),
        (lambda x: lax.psum_scatter(x, "b", tiled=True), "reduce-scatter", 4, 1, 3 / 4),
        (lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)]), "collective-permute", 2, 1, 1),
        (lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), "all-to-all", 4, 1, 3 / 4),
        (lambda x: lax.all_gather(x, "b", tiled=True), "all-gather", 4, 4, 3),
    ],
)
def test_each_kind_has_its_volume(run, kind, group, of_local, sent):
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=P("b"), out_specs=P("b"), check_vma=False)
    (one,) = exchanges(mapped, shape((64, 32), "b"))
    local = 64 * 32 * 4 / 4
    assert (one.kind, one.times, one.group) == (kind, 1, group)
    assert one.bytes == of_local * local
    assert one.sent == pytest.approx(sent * local)


def test_an_exchange_in_a_loop_counts_as_often_as_it_runs():
    def body(x, _):
        return jnp.tanh(lax.psum(x, "b")), None

    mapped = jax.shard_map(
        lambda x: lax.scan(body, x, None, length=7)[0], mesh=mesh(), in_specs=P("b"),
        out_specs=P("b"), check_vma=False,
    )
    found = exchanges(mapped, shape((64, 32), "b"))
    assert sum(one.times for one in found if one.kind == "all-reduce") == 7


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x",
         [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)  # fmt: skip
def test_all_ways_to_write_groups(text, groups):
    assert collectives.replica_groups(text, 8).tolist() == groups


def test_what_leaves_a_slice():
    """Two slices of four: a sum over all of them sends an eighth of it per device abroad and
    back, for each of a slice's four devices carries a quarter of its half; one within sends none.
    """
    slices = [0, 0, 0, 0, 1, 1, 1, 1]

    def abroad(axes):
        run = jax.shard_map(
            lambda x: lax.psum(x, axes), mesh=mesh(), in_specs=P("b"), out_specs=P("b"),
            check_vma=False,
        )
        module = hlo.parse(compiled(run, shape((64, 32), "b")).as_text())
        (one,) = collectives.of(module, 8, slices)
        return one.slice_sent / one.bytes

    assert abroad("b") == 0
    assert abroad(("a", "b")) == pytest.approx(2 * 1 / 2 / 4)
    assert abroad("a") == pytest.approx(2 * 1 / 2)
