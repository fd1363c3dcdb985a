"""Sharding rules cover every parameter of every network, or say which they miss."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import rules


@pytest.mark.parametrize(
    "init, spec",
    [(unet.init, unet.UNetSpec(320)), (autoencoder.init, autoencoder.AutoencoderSpec())],
)
def test_default_rules_cover_and_shard(init, spec):
    shapes = jax.eval_shape(lambda k: init(spec, k), jax.random.key(0))
    shardings = rules.shardings(shapes, mesh_lib.make(1, 8))
    whole = sharded = 0
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        local = sharding.shard_shape(leaf.shape)
        whole += leaf.size
        sharded += jnp.prod(jnp.array(local)).item()
    # Nearly everything is kernels, so a device holds little more than an eighth.
    assert sharded < 1.02 * whole / 8


def test_uncovered_parameter_is_named():
    tree = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"table": jnp.zeros((3, 2))}}
    with pytest.raises(UserError, match=r"no sharding rule covers 1 parameters: /b/table \(3, 2\)"):
        rules.specs(tree)


def test_rule_with_too_many_axes_is_named():
    with pytest.raises(UserError, match="has 2 axes but /a/kernel"):
        rules.specs({"a": {"kernel": jnp.zeros(3)}}, [("kernel", P(None, "fsdp"))])


def test_axis_that_does_not_divide_is_whole():
    tree = {"conv_out": {"kernel": jnp.zeros((3, 3, 16, 4))}}
    sharding = rules.shardings(tree, mesh_lib.make(1, 8))["conv_out"]["kernel"]
    assert sharding.shard_shape((3, 3, 16, 4)) == (3, 3, 16, 4)


def test_mesh_sizes():
    assert dict(mesh_lib.make().shape) == {"data": 8, "fsdp": 1}
    assert dict(mesh_lib.make(2, -1).shape) == {"data": 2, "fsdp": 4}
    with pytest.raises(UserError, match="data=3, fsdp=1 does not fit 8 devices"):
        mesh_lib.make(3, 1)
