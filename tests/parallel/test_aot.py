"""Compiling for chips that are not here: messages without a compiler, arithmetic with planted
figures, and, where libtpu is installed, small programs by the TPU's own compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.common import LaunchError
from launch.tpu import GENERATIONS, Slice
from ldm_scaling.errors import MissingPackageError, UserError
from ldm_scaling.parallel import aot, aot_tpu, chips


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install -e '\.\[tpu-plan\]'"):
        aot.topology("v5e:16x16")


@pytest.mark.parametrize(
    "name, near",
    [
        ("v5e-256", "v5e:16x16"), ("v5e:16x17", "v5e:16x16"), ("v7x:4x4x4", "tpu7x:4x4x4"),
        ("V6E:16x16", "v6e:16x16"), ("v5p:4x8", "v5p:4x8x8"),
    ],
)  # fmt: skip
def test_an_unknown_topology_names_the_nearest(monkeypatch, name, near):
    monkeypatch.setattr(aot_tpu, "require", lambda: None)
    with pytest.raises(UserError, match=f"did you mean {near}"):
        aot.topology(name)


def test_roofline_of_planted_work():
    v5e = chips.by_name("v5e")
    work = aot.Work(
        flops=3 * 197e12, bytes=2 * 819e9, optimistic_seconds=0.0, sent=0.5 * 200e9,
        slice_sent=4 * 25e9 / 8,
    )
    assert aot.roofline(work, v5e) == pytest.approx(
        {"compute": 3, "memory": 2, "links": 0.5, "network": 4}
    )
    # Half of the chip, half of everything.
    assert aot.roofline(work, v5e, 2)["compute"] == pytest.approx(6)


@pytest.mark.parametrize(
    "message, needed, available",
    [
        ("... Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5,
         15.75),
        ("required for HLO temporaries (600.00G) exceeds available HBM (31.25G).", 600, 31.25),
    ],
)
def test_how_much_is_missing_is_read_from_the_compilers_words(message, needed, available):
    error = aot.DoesNotFit(message)
    assert (error.needed, error.available) == (needed * 2**30, available * 2**30)


def test_table_of_chips():
    """What the makers print: ratios that tell a slip of a column."""
    for chip in chips.CHIPS:
        # FLOPs per byte of memory traffic: 150 to 600 for all of these.
        assert 100 < chip.bf16_flops / chip.hbm_bandwidth < 700, chip.name
        assert 2 < chip.hbm_bandwidth / chip.link_bandwidth < 40, chip.name
        assert 0.9 < chip.usable_bytes / chip.hbm_bytes <= 1
    assert chips.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert chips.peak_flops("NVIDIA H100 80GB HBM3", "float16") == 989e12
    # Two devices share a chip of 2307 TFLOP/s.
    assert 2 * chips.peak_flops("TPU7x", jnp.bfloat16) == 2307e12
    assert chips.by_kind("NVIDIA H200 NVL").name != chips.by_kind("NVIDIA H200").name
    assert chips.peak_flops("cpu", "bfloat16") is None
    assert chips.peak_flops("TPU v4", "float64") is None


class _Compiled:
    """A program of which the cost model has no time for two operations: -1 s each."""

    def as_text(self):
        return "HloModule f\n\nENTRY %main (x: f32[4]) -> f32[4] {\n}\n"

    def cost_analysis(self):
        return {"flops": 1.0, "bytes accessed": 1.0, "optimal_seconds": 0.25 - 2}

    def memory_analysis(self):
        sizes = {"argument": 7, "output": 5, "alias": 4, "temp": 3, "generated_code": 2}
        names = {f"{name}_size_in_bytes": size for name, size in sizes.items()}
        return type("Stats", (), names)()


def test_operations_without_a_time_are_told_and_taken_for_nothing(monkeypatch):
    monkeypatch.setattr(chips, "by_kind", lambda kind: chips.by_name("v5e"))
    program = aot.read(_Compiled(), Mesh(np.array(jax.devices()), ("d",)))
    assert program.work.optimistic_seconds == pytest.approx(0.25)
    assert program.unpriced == 2
    # What is written over an argument is not held twice.
    assert program.memory.total == 7 + (5 - 4) + 3 + 2


# --- with the TPU's compiler ------------------------------------------------------------------


def _slice(name, num_slices=1):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install -e '.[parity]'")
    devices = aot.topology(name, num_slices)
    return Mesh(np.array(devices), ("d",))


def _shape(mesh, dims, *axes):
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))


def test_every_topology_is_one_that_libtpu_knows():
    _slice("v5e:2x2")
    for name in ("v4:2x2x1", "v5e:16x16", "v5p:4x8x8", "v6e:16x16", "tpu7x:4x4x4"):
        devices = aot.topology(name)
        chip, shared = aot.chip_of(devices)
        sides = np.prod([int(side) for side in name.split(":")[1].split("x")])
        assert len(devices) == sides * shared, name
        assert name.startswith(chip.name)


@pytest.mark.parametrize("name, slices", [
    ("v5e:1x1", 1), ("v5e:2x2", 1), ("v5e:2x4", 1), ("v6e:2x4", 2), ("v5e:4x4", 1), ("v6e:4x8", 1),
    ("v5p:2x2x1", 1), ("v5p:2x4x4", 1), ("v5p:4x4x12", 1), ("v4:4x4x20", 1),
])  # fmt: skip
def test_hosts_are_as_the_launcher_asks_for_them(name, slices):
    """A slice of 8 chips on two axes is one host, as one alone is."""
    tpu = Slice.parse(name)
    devices = list(_slice(name, slices).devices.flat)
    assert len({d.process_index for d in devices}) == tpu.hosts * slices
    chip, shared = aot.chip_of(devices)
    host = aot.one_host(devices)
    assert len(host) == tpu.chips_per_host * shared
    assert len({d.process_index for d in host}) == 1


def test_shapes_are_those_that_the_launcher_takes(monkeypatch):
    monkeypatch.setattr(aot_tpu, "require", lambda: None)

    def taken(check, name, error):
        try:
            check(name)
        except error:
            return False
        return True

    sides = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 256, 384, 388)
    flat = [f"{a}x{b}" for a in sides for b in sides]
    for kind in GENERATIONS:
        for shape in [*flat, *(f"{one}x{c}" for one in flat for c in sides)]:
            name = f"{kind}:{shape}"
            own = taken(aot_tpu.check, name, UserError)
            assert own == taken(Slice.parse, name, LaunchError), name


def test_a_product_of_sharded_weights():
    """x w with w in four parts: 2 n m k FLOPs on each chip's rows, all of w gathered."""
    mesh = _slice("v5e:2x2")
    x, w = _shape(mesh, (4096, 512), "d"), _shape(mesh, (512, 1024), None, "d")
    program = aot.compile(
        jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P("d"))), x, w, mesh=mesh
    )
    assert program.work.flops == pytest.approx(2 * 1024 * 512 * 1024, rel=0.01)
    gathered = program.by_kind()["all-gather"]
    assert gathered["bytes"] == 512 * 1024 * 2
    assert gathered["sent"] == pytest.approx(3 / 4 * gathered["bytes"])
    # Rows of x and a quarter of w, as they are.
    assert program.memory.arguments == pytest.approx((1024 * 512 + 512 * 256) * 2, rel=0.01)
    assert program.work.optimistic_seconds > 0


def test_iterations_and_kernels_are_counted():
    mesh = _slice("v5e:2x2")
    x, w = _shape(mesh, (4096, 512), "d"), _shape(mesh, (512, 512))

    def run(x, w):
        return jax.lax.fori_loop(0, 6, lambda i, x: jnp.tanh(x @ w), x)

    program = aot.compile(jax.jit(run), x, w, mesh=mesh)
    assert program.loop_factors[0] == pytest.approx(6)
    assert program.work.flops == pytest.approx(6 * 2 * 1024 * 512 * 512, rel=0.02)
    assert program.counted[0] < program.work.flops / 5


def test_a_program_that_is_known_is_not_compiled_again(monkeypatch):
    """Wherever it stands in the code; another one is, and the same for other chips."""
    mesh = _slice("v5e:2x2")
    x = _shape(mesh, (8, 128), "d")
    program = aot.compile(jax.jit(lambda x: x + 1), x, mesh=mesh)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *unused, **more: 1 / 0)
    known = {program.lowered: program}
    assert aot.compile(jax.jit(lambda x: x + 1), x, mesh=mesh, known=known) is program
    with pytest.raises(aot.DoesNotFit):
        misfit = {program.lowered: aot.DoesNotFit("", 2.0)}
        aot.compile(jax.jit(lambda x: x + 1), x, mesh=mesh, known=misfit)
    other = _slice("v6e:2x2")
    for run, x, where in (
        (lambda x: x + 2, x, mesh), (lambda x: x + 1, _shape(other, (8, 128), "d"), other),
    ):
        with pytest.raises(ZeroDivisionError):
            aot.compile(jax.jit(run), x, mesh=where, known=known)


def test_two_slices_exchange_over_the_network():
    mesh = _slice("v5e:2x2", 2)
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"), out_specs=P()
    )
    program = aot.compile(jax.jit(total), _shape(mesh, (8, 4096, 512), "d"), mesh=mesh)
    # Summed within each slice first; each of its four devices then sends a quarter.
    assert program.work.slice_sent == 2 * 1 / 2 * 4096 * 512 * 2 / 4
    assert program.by_kind()["all-reduce, slices"]["count"] == 1
    assert "network" in aot.roofline(program.work, chips.by_name("v5e"))


def test_what_does_not_fit_says_how_much_it_needs():
    mesh = _slice("v5e:2x2")
    big = _shape(mesh, (4 * 2**12, 2**20), "d")  # 8 GiB on each chip
    with pytest.raises(aot.DoesNotFit) as caught:
        aot.compile(jax.jit(lambda *xs: [jnp.sin(x) for x in xs]), big, big, big, mesh=mesh)
    assert caught.value.needed > 24 * 2**30
    assert caught.value.available == chips.by_name("v5e").usable_bytes
