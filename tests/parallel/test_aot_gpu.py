"""Programs compiled for GPUs that are not here: names, figures of planted programs, and what XLA's
own compiler makes of small ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention
from ldm_scaling.parallel import aot, aot_gpu, chips, gpu_program, gpus, hlo
from ldm_scaling.parallel import mesh as mesh_lib


def test_every_gpu_has_its_peaks():
    """FLOP/s are those of the tensor cores: so many a multiprocessor and cycle, about."""
    each_cycle = {(8, 0): 2048, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192}
    for name, gpu in gpus.GPUS.items():
        chip = gpu.chip
        assert chips.by_kind(chip.kinds[0]) is chip and chip.name == name
        peak = gpu.count * gpu.clock * 1e9 * each_cycle[gpu.each.capability]
        assert 0.45 < chip.bf16_flops / peak < 1.02, name
    # Not an L4, a part of an H100, a smaller chip.
    for other in ("L40", "H100 80GB HBM3 MIG 1g.10gb", "GeForce RTX 4090 Laptop GPU"):
        assert chips.by_kind(f"NVIDIA {other}") is None


@pytest.mark.parametrize(
    "name, found",
    [
        ("h100:1", ("h100", 1, 1)), ("H200:8", ("h200", 1, 8)), ("b200:64", ("b200", 8, 8)),
        ("h100", None), ("h100:0", None), ("h100:12", None), ("h100:-8", None), ("v5e:16x16", None),
        ("h100:2048", None),
    ],
)  # fmt: skip
def test_so_many_gpus_of_so_many_hosts(name, found):
    got = gpus.split(name)
    assert (got and (got[0].name, *got[1:])) == found


def test_the_part_that_jax_takes(monkeypatch):
    h100 = chips.by_name("h100")
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert chips.capacity(h100) == 0.75 * h100.usable_bytes
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert chips.capacity(h100) == 0.92 * h100.usable_bytes
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".5")
    assert chips.capacity(h100) == 0.5 * h100.usable_bytes
    assert chips.capacity(chips.by_name("v5e")) == chips.by_name("v5e").usable_bytes
    for wrong in ("92", "0", "most"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=f"MEM_FRACTION={wrong}"):
            chips.capacity(h100)


@pytest.mark.parametrize(
    "name, near",
    [
        ("a100:8", "a100-80gb:8 or a100-40gb:8"), ("rtx-4090:1", "rtx4090:1"),
        ("h100-sxm:8", "h100:8"), ("h200nvl", "h200-nvl:8"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_asked_back(name, near):
    with pytest.raises(UserError, match=f"did you mean {near}\\?"):
        aot.check(name)


def test_slices_are_for_tpus(monkeypatch):
    monkeypatch.setattr(aot, "check", lambda name: None)
    with pytest.raises(UserError, match="h100:16"):
        aot.topology("h100:8", num_slices=2)


def _conv(stride):
    def run(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return run


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (lambda a, b: a @ b, [(64, 128), (128, 32)], 2 * 64 * 128 * 32),
        (lambda a, b: a @ b, [(3, 5, 64, 16), (3, 5, 16, 8)], 15 * 2 * 64 * 16 * 8),
        (_conv(1), [(2, 16, 16, 8), (3, 3, 8, 12)], 2 * 2 * 256 * 9 * 8 * 12),
        (_conv(2), [(2, 16, 16, 8), (3, 3, 8, 12)], 2 * 2 * 64 * 9 * 8 * 12),
        # Forward, and with respect to both operands.
        (jax.grad(lambda x, k: jnp.sum(_conv(2)(x, k) ** 2), (0, 1)),
         [(2, 16, 16, 8), (3, 3, 8, 12)], 3 * 2 * 2 * 64 * 9 * 8 * 12),
    ],
)  # fmt: skip
def test_products_of_kernels(function, shapes, flops):
    """What is read off a compiled program's text is the textbook's count, padding among it."""
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = hlo.parse(jax.jit(function).lower(*given).compile().as_text())
    fused = {n for _, i in module.instructions() if i.opcode == "fusion" for n in hlo.called_by(i)}
    found = sum(
        gpu_program.products(module, name, i) for name, i in module.instructions()
        if name not in fused
    )
    assert found == pytest.approx(flops)


# --- with XLA's compiler for GPUs -------------------------------------------------------------


def _gpus(name):
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="no GPU compiler: pip install -e '.[parity]'"
    )
    return Mesh(np.array(aot.topology(name)), ("d",))


def _shape(mesh, dims, *axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_gpu_is_one_that_the_compiler_takes(name):
    mesh = _gpus(f"{name}:1")
    chip, shared = aot.chip_of(mesh.devices.flat)
    assert (chip.name, shared) == (name, 1)
    x = _shape(mesh, (256, 512))
    program = aot.compile(jax.jit(lambda x: jnp.tanh(x @ x.T)), x, mesh=mesh)
    assert program.work.flops == pytest.approx(2 * 256 * 256 * 512)


def test_a_product_a_convolution_and_attention_with_their_gradients():
    """FLOPs as in textbooks; attention's by cuDNN, two products forward and five backward."""
    mesh = _gpus("h200:1")
    attend = attention.Attention("auto", "gpu", cudnn_width=256)

    def loss(x, kernel, w):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        heads = (y.reshape(2, 256, 64) @ w).reshape(2, 256, 2, 160).swapaxes(1, 2)
        return attend(heads, heads, heads).astype(jnp.float32).sum()

    shapes = [_shape(mesh, dims) for dims in ((2, 16, 16, 32), (3, 3, 32, 64), (64, 320))]
    program = aot.compile(jax.jit(jax.grad(loss, (0, 1, 2))), *shapes, mesh=mesh)
    flops = {kind: row["flops"] for kind, row in program.sorts.items() if row["flops"]}
    assert flops == pytest.approx({
        "convolution": 3 * 2 * 2 * 256 * 9 * 32 * 64, "product": 3 * 2 * 512 * 64 * 320,
        "attention": 7 * 2 * 2 * 2 * 256 * 256 * 160,
    })
    assert program.sorts["attention"]["count"] == 2
    assert program.work.flops == sum(flops.values())
    held = sum(np.prod(shape.shape) * 2 for shape in shapes)
    assert program.memory.arguments == held and program.memory.outputs == pytest.approx(held, 0.01)


def test_attention_beside_axes_that_are_split_by_hand():
    """Heads over shards of a layer, examples over the others: cuDNN's kernel forward and backward,
    a quarter of all that it computes on each."""
    _gpus("h100:4")
    mesh = mesh_lib.make(2, 1, 2, devices=aot.topology("h100:4"))
    attend = attention.Attention("auto", "gpu", "tensor", cudnn_width=256)
    batch = P(mesh_lib.BATCH_AXES)

    def loss(q, k, v):
        out = jax.shard_map(
            attend, mesh=mesh, in_specs=(batch, batch, batch), out_specs=batch,
            axis_names=set(mesh_lib.BATCH_AXES), check_vma=False,
        )(q, k, v)
        return out.astype(jnp.float32).sum()

    x = _shape(mesh, (4, 2, 256, 64), mesh_lib.BATCH_AXES, "tensor")
    program = aot.compile(jax.jit(jax.grad(loss, (0, 1, 2))), x, x, x, mesh=mesh)
    assert program.sorts["attention"]["count"] == 2
    assert program.work.flops == pytest.approx(7 * 2 * 4 * 2 * 256 * 256 * 64 / 4)


def test_a_window_larger_than_its_map():
    """Of 3x3 on 2x2, forward and both gradients, XLA computes the taps on the map: 16 of 36."""
    mesh = _gpus("h100:1")

    def loss(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).astype(jnp.float32).sum()

    shapes = _shape(mesh, (8, 2, 2, 64)), _shape(mesh, (3, 3, 64, 64))
    program = aot.compile(jax.jit(jax.grad(lambda *a: loss(*a) ** 2, (0, 1))), *shapes, mesh=mesh)
    assert program.work.flops == pytest.approx(3 * 2 * 8 * 16 * 64 * 64)


def test_a_turn_of_a_loop_without_what_is_before_it():
    mesh = _gpus("h100:1")
    x, w = _shape(mesh, (8, 4096)), _shape(mesh, (4096, 4096), dtype=jnp.float32)

    def run(x, w, n):
        w = w.astype(jnp.bfloat16)
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w), x)

    program = aot.compile(jax.jit(run), x, w, _shape(mesh, (), dtype=jnp.int32), mesh=mesh)
    assert program.unknown_loops == 1
    assert program.work.flops == 2 * 8 * 4096 * 4096
    assert program.work.bytes < 1.1 * 2 * 4096 * 4096  # w in bfloat16, read once


def test_of_a_table_the_rows_that_are_taken():
    mesh = _gpus("h100:1")
    table, rows = _shape(mesh, (2**16, 512)), _shape(mesh, (32,), dtype=jnp.int32)
    program = aot.compile(jax.jit(lambda t, r: t[r] * 2), table, rows, mesh=mesh)
    assert program.work.bytes < 10 * 32 * 512 * 2


def test_iterations_and_bytes_are_counted():
    mesh = _gpus("a100-80gb:1")
    x, w = _shape(mesh, (4096, 512)), _shape(mesh, (512, 512))

    def run(x, w):
        return jax.lax.fori_loop(0, 6, lambda i, x: x @ w, x)

    program = aot.compile(jax.jit(run), x, w, mesh=mesh)
    assert program.sorts["product"]["count"] == 6 and program.unknown_loops == 0
    assert program.work.flops == pytest.approx(6 * 2 * 4096 * 512 * 512)
    assert program.sorts["product"]["bytes"] == 6 * (2 * 4096 * 512 + 512 * 512) * 2
    # Each run by what it needs longest: its FLOPs, 440 for each byte of it.
    assert program.sorts["product"]["seconds"] == pytest.approx(
        6 * 2 * 4096 * 512 * 512 / chips.by_name("a100-80gb").bf16_flops
    )


def test_two_hosts_exchange_over_the_network():
    mesh = _gpus("h100:16")
    assert {d.process_index for d in mesh.devices.flat} == {0, 1}
    assert len(aot.one_host(mesh.devices.flat)) == 8
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"), out_specs=P()
    )
    x = _shape(mesh, (16, 1024, 512), "d", dtype=jnp.float32)
    program = aot.compile(jax.jit(total), x, mesh=mesh)
    (exchange,) = program.by_kind()
    assert exchange.startswith("all-reduce")
    # Each host sends its half of a sum and takes the other's, an eighth of it by each GPU.
    assert program.work.slice_sent == 2 * 1 / 2 * 1024 * 512 * 4 / 8
    roof = aot.roofline(program.work, chips.by_name("h100"))
    assert roof["network"] > 0 and roof["links"] > 0


def test_what_does_not_fit_says_how_much_it_needs():
    mesh = _gpus("l4:1")
    big = _shape(mesh, (2**12, 2**20))  # 8 GiB
    with pytest.raises(aot.DoesNotFit) as caught:
        aot.compile(jax.jit(lambda *xs: [jnp.sin(x) for x in xs]), big, big, mesh=mesh)
    assert caught.value.needed == pytest.approx(32 * 2**30)
    assert caught.value.available == chips.capacity(chips.by_name("l4"))


def test_products_without_tiles_are_compiled_without_triton():
    """As those of a resize, for which a card would be tried; since jax 0.12 XLA has their tiles."""
    mesh = _gpus("h100:1")
    x = _shape(mesh, (16, 16, 16, 3), dtype=jnp.float32)
    grown = jax.jit(lambda x: jax.image.resize(x, (16, 64, 64, 3), "cubic", antialias=False))
    program = aot.compile(grown, x, mesh=mesh)
    own = {"xla_gpu_enable_triton_gemm": False}
    assert program.options == ({} if jax.__version_info__ >= (0, 12) else own)
    assert program.work.flops >= 2 * 16 * 3 * 16 * 64 * (16 + 64)
    plain = aot.compile(jax.jit(lambda x: x + 1), x, mesh=mesh)
    assert plain.options == {}


def test_jax_is_left_as_it_was():
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mesh = _gpus("h100:1")
    before = fused.check_compute_capability
    with pytest.raises(RuntimeError), aot_gpu.as_on(mesh.devices.flat[0]):
        assert fused.check_compute_capability("9.0")
        assert not fused.check_compute_capability("10.0")
        raise RuntimeError
    assert fused.check_compute_capability is before
