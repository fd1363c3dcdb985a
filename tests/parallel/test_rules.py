"""Sharding rules cover every parameter of every network, or say which they miss."""

import types

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


def test_rules_of_ones_own_come_first(monkeypatch):
    """And the error says how to write one."""
    monkeypatch.setattr(rules, "_ADDED", [])
    tree = {"a": {"kernel": jnp.zeros((4, 2))}, "mine": [{"w": jnp.zeros((4, 8))}, jnp.zeros(3)]}
    with pytest.raises(UserError, match=r'rules.add\(\(r"/w\$", \(\)\)\) holds it whole'):
        rules.specs(tree)
    for _ in range(2):  # A module may be imported under two names.
        rules.add((r"/mine/0/w$", (None, "fsdp")), (r"/mine/1$", ()))
    assert len(rules._ADDED) == 2
    assert rules.specs(tree) == {
        "a": {"kernel": P("fsdp")}, "mine": [{"w": P(None, "fsdp")}, P()]}
    sharding = rules.shardings(tree, mesh_lib.make(1, 4, 2))["mine"][0]["w"]
    assert sharding.shard_shape((4, 8)) == (4, 2)
    rules.add((r"/a/kernel$", P("tensor")))
    assert rules.specs(tree)["a"]["kernel"] == P("tensor")
    with pytest.raises(UserError, match="axes 'fsdp': give a tuple"):
        rules.add((r"/b$", "fsdp"))
    for wrong in (r"/b$", ("x", "fsdp", None)):
        with pytest.raises(UserError, match="is no pair of a pattern and axes"):
            rules.add(wrong)
    with pytest.raises(UserError, match="axes None: give a tuple"):
        rules.add(("x", None))
    with pytest.raises(UserError, match="'\\(' is no regular expression"):
        rules.add(("(", ()))


def test_rule_with_too_many_axes_is_named():
    with pytest.raises(UserError, match="has 2 axes but /a/kernel"):
        rules.specs({"a": {"kernel": jnp.zeros(3)}}, [("kernel", P(None, "fsdp"))])


def part(shape, mesh, name="conv_out"):
    """The shape that a device holds of a kernel."""
    sharding = rules.shardings({name: {"kernel": jnp.zeros(shape)}}, mesh)[name]["kernel"]
    return sharding.shard_shape(shape)


def test_shards_are_of_the_channels_that_divide():
    mesh = mesh_lib.make(1, 8)
    assert part((3, 3, 16, 4), mesh) == (3, 3, 2, 4)
    assert part((3, 3, 4, 16), mesh) == (3, 3, 4, 2)
    assert part((3, 3, 4, 4), mesh) == (3, 3, 4, 4)
    assert part((6, 24), mesh, "proj") == (6, 3)


def test_shards_over_one_ring_where_all_do_not_divide(monkeypatch):
    monkeypatch.setattr(mesh_lib, "_RING", 2)
    mesh = mesh_lib.make(1, 8)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "fsdp_in": 4, "tensor": 1}
    assert part((3, 3, 16, 4), mesh) == (3, 3, 2, 4)
    assert part((3, 3, 6, 4), mesh) == (3, 3, 3, 4)


def test_tensor_shards_split_what_makes_channels_and_what_sums_them_up():
    mesh = mesh_lib.make(1, 2, 4)
    assert part((3, 3, 8, 16), mesh, "conv1") == (3, 3, 4, 4)
    assert part((3, 3, 8, 16), mesh, "conv2") == (3, 3, 2, 8)
    assert part((8, 16), mesh, "to_q") == (4, 4)
    assert part((8, 16), mesh, "to_out") == (2, 8)
    assert part((8, 16), mesh, "proj_in") == (4, 16)


def test_mesh_sizes():
    def sizes(*args, **kwargs):
        mesh = mesh_lib.make(*args, **kwargs)
        return mesh.shape["data"], mesh_lib.fsdp(mesh), mesh.shape["tensor"]

    assert sizes() == (8, 1, 1)
    assert sizes(2, -1) == (2, 4, 1)
    assert sizes(2, 2, -1) == (2, 2, 2)
    assert sizes(4, 2, slices=2) == (4, 2, 1)
    assert mesh_lib.shards(mesh_lib.make(2, 2, 2)) == 4
    with pytest.raises(UserError, match="data=3, fsdp=1, tensor=1 does not fit 8 devices"):
        mesh_lib.make(3, 1)
    with pytest.raises(UserError, match="makes 2 replicas, which 4 slices do not share evenly"):
        mesh_lib.make(2, 4, slices=4)


@pytest.mark.parametrize("each, told", [(8, "one slice"), (4, "2 slices")])
def test_slices_that_a_pod_does_not_have(each, told):
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // each) for i in range(8)]
    with pytest.raises(UserError, match=f"mesh slices=4, but the devices are in {told}"):
        mesh_lib.make(slices=4, devices=devices)
