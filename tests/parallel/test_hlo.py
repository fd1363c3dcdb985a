"""Loops of known length and kernels, read out of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_scaling.parallel import aot, hlo


def _conv(x, w, stride=1, dilation=1, end=1):
    return lax.conv_general_dilated(
        x, w, (stride, stride), [(1, end), (1, end)], lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize(
    "body, left, right",
    [
        (lambda x, w: x @ w, (64, 48), (48, 48)),
        (lambda x, w: _conv(x, w), (2, 12, 12, 8), (3, 3, 8, 8)),
        (lambda x, w: _conv(_conv(x, w, stride=2), w, dilation=2, end=2),
         (2, 12, 12, 8), (3, 3, 8, 8)),
    ],
)  # fmt: skip
def test_loop_factor_makes_a_loop_of_its_unrolled_form(body, left, right):
    """XLA counts a loop's body once: times the factor, it is what it counts without a loop."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (left, right))

    def looped(x, w):
        return lax.fori_loop(0, 5, lambda i, x: body(x, w), x)

    def unrolled(x, w):
        for _ in range(5):
            x = body(x, w)
        return x

    loop, flat = (jax.jit(run).lower(x, w).compile() for run in (looped, unrolled))
    module = hlo.parse(loop.as_text())
    flops, moved = hlo.loop_factors(module)
    assert flops == pytest.approx(5)
    assert 1 < moved <= 5
    once, whole = (c.cost_analysis()["flops"] for c in (loop, flat))
    assert once * flops == pytest.approx(whole, rel=0.02)
    assert module.unknown_loops == 0
    assert hlo.loop_factors(hlo.parse(flat.as_text())) == (1, 1)


def _scan(x_LN, w_N):
    """A stack goes in, a stack comes out."""
    def step(h_N, x_N):
        h_N = jnp.tanh(h_N * w_N + x_N)
        return h_N, h_N * x_N

    return lax.scan(step, jnp.zeros_like(w_N), x_LN)


def _scan_gradient(x_LN, w_N):
    return jax.grad(lambda x, w: jnp.sum(_scan(x, w)[1] ** 2), (0, 1))(x_LN, w_N)


@pytest.mark.parametrize("where", ["here", "tpu"])
@pytest.mark.parametrize("run, needed", [(_scan, 5), (_scan_gradient, 17)])
def test_stacks_that_a_loop_goes_through_move_once(run, needed, where):
    """Bytes grow as the loop's length, not as its square, and are at least the rows that it needs,
    at most four times those, for what is not fused goes through memory.

    Forward, each iteration has x, h, w in and h, y out. For the gradient a row of h is kept; y
    gives its gradient; then that, x, h, w, two sums come in, x's gradient and both sums go out.
    """
    sharding = None
    if where == "tpu":
        pytest.importorskip("libtpu", reason="no TPU compiler: pip install -e '.[parity]'")
        devices = aot.topology("v5e:2x2")
        sharding = NamedSharding(Mesh(np.array(devices), ("d",)), PartitionSpec())
    n, moved = 1 << 17, []
    for length in (256, 1024):
        args = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in ((length, n), (n,))
        ]
        compiled = jax.jit(run).lower(*args).compile()
        module = hlo.parse(compiled.as_text())
        assert module.unknown_loops == 0
        moved.append(hlo.loop_factors(module)[1] * compiled.cost_analysis()["bytes accessed"])
        assert 1 <= moved[-1] / (needed * length * n * 4) < 4
    assert moved[1] / moved[0] == pytest.approx(4, rel=0.02)


def test_a_fusion_reads_and_writes_the_slices_that_it_takes():
    """Of a stack that it slices and one that it writes into in place, slices; of one whose old
    contents it needs or that it begins itself, all."""
    text = """HloModule jit_f

%fused (p0: f32[64,8], p1: f32[64,8], p2: s32[], p3: f32[64,8]) -> (f32[64,8], f32[64,8], f32[64,8]) {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = f32[64,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %p3 = f32[64,8]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %one = f32[1,8]{1,0} dynamic-slice(%p0, %p2, %zero), dynamic_slice_sizes={1,8}
  %into = f32[64,8]{1,0} dynamic-update-slice(%p1, %one, %p2, %zero)
  %negated = f32[64,8]{1,0} negate(%p3)
  %new = f32[64,8]{1,0} dynamic-update-slice(%negated, %one, %p2, %zero)
  ROOT %out = (f32[64,8]{1,0}, f32[64,8]{1,0}, f32[64,8]{1,0}) tuple(%into, %new, %negated)
}

ENTRY %main (a: f32[64,8], b: f32[64,8], c: s32[], d: f32[64,8]) -> (f32[64,8], f32[64,8], f32[64,8]) {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %c = s32[] parameter(2)
  %d = f32[64,8]{1,0} parameter(3)
  ROOT %fusion = (f32[64,8]{1,0}, f32[64,8]{1,0}, f32[64,8]{1,0}) fusion(%a, %b, %c, %d), kind=kLoop, calls=%fused
}
"""  # noqa: E501
    module = hlo.parse(text)
    whole, one = 64 * 8 * 4, 8 * 4
    read = one + 0 + 4 + whole
    written = one + whole + whole
    assert hlo.moved_by(module, "main", module.computations["main"]["fusion"]) == read + written


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    run = jax.jit(lambda n, x: lax.fori_loop(0, n, lambda i, x: x @ x, x))
    text = run.lower(
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    ).compile().as_text()
    module = hlo.parse(text)
    assert hlo.loop_factors(module)[0] == 1
    assert module.unknown_loops == 1


def test_kernels_and_their_shapes_are_found_in_attributes_with_line_breaks():
    text = """HloModule jit_f

ENTRY %main (q: bf16[2,128,64]) -> bf16[2,128,64] {
  %q = bf16[2,128,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %kernel.7 = (bf16[2,128,64]{2,1,0}, /*index=1*/f32[2,128]{1,0}) custom-call(%q, /*index=1*/%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a": "{\\"b\\": 1}"
}}, metadata={op_name="f"}
}
"""  # noqa: E501
    (call,) = hlo.custom_calls(hlo.parse(text))
    assert (call.name, call.times) == ("kernel", 1)
    assert call.operands == (("bf16", (2, 128, 64)),) * 2
    assert call.results == (("bf16", (2, 128, 64)), ("f32", (2, 128)))
