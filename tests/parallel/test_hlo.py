"""Loops of known length and kernels, read out of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ldm_scaling.parallel import hlo


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
