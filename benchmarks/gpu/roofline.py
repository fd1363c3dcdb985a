"""The least time of a U-Net's forward pass on a chip: products, exponentials, bytes.

Layers follow one another, and within one products, exponentials and traffic may all hide behind
the slowest of the three; so the bound is the sum over layers of the largest. A layer is a product
(convolution, linear layer) that reads its operands and writes its result once, or an attention as a
whole, whose logits never leave the chip. Norms, activations and sums are taken for free, as if all
were part of a product next to them. Nothing runs faster; how near one can come is not said.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from bench import Ceilings
from jax.extend import core

from ldm_scaling.models import attention, unet


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer does.

    Attributes:
      kind: `convolution`, `linear` or `attention`.
      flops: of its products, taps on padding among them.
      exponentials: of its softmax.
      bytes: read and written, in 16 bits.
    """

    kind: str
    flops: float
    exponentials: float
    bytes: float

    def seconds(self, chip: Ceilings) -> float:
        """At least."""
        return max(
            self.flops / chip.flops, self.exponentials / chip.exponentials,
            self.bytes / chip.bandwidth,
        )


def layers(spec: unet.UNetSpec, batch: int) -> list[Layer]:
    """All layers of a forward pass, in the order in which they are traced."""
    network = unet.UNet(spec, attention=attention.textbook)
    inputs = jax.eval_shape(functools.partial(unet.example_inputs, spec, batch))
    params = unet.param_shapes(spec)
    traced = jax.make_jaxpr(lambda p, *x: network.apply({"params": p}, *x))(params, *inputs)
    found: list[Layer] = []
    pending: list[Layer] = []
    _walk(traced.jaxpr, found, pending)
    return found


def seconds(spec: unet.UNetSpec, batch: int, chip: Ceilings) -> dict[str, float]:
    """The bound of a forward pass, and what each means alone would need."""
    all_of = layers(spec, batch)
    return {
        "bound": sum(layer.seconds(chip) for layer in all_of),
        "products": sum(layer.flops for layer in all_of) / chip.flops,
        "exponentials": sum(layer.exponentials for layer in all_of) / chip.exponentials,
        "bytes": sum(layer.bytes for layer in all_of) / chip.bandwidth,
    }


def _size(v: Any) -> float:
    return float(math.prod(v.aval.shape))


def _walk(jaxpr: Any, found: list[Layer], pending: list[Layer]) -> None:
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
        inner = [v for v in inner if isinstance(v, core.Jaxpr)]
        for one in inner:
            _walk(one, found, pending)
        if inner:
            continue
        name = eqn.primitive.name
        sizes = [_size(v) for v in (*eqn.invars, *eqn.outvars)]
        if name == "conv_general_dilated":
            kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
            outputs = eqn.params["dimension_numbers"].rhs_spec[0]
            flops = 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / kernel.shape[outputs]
            found.append(Layer("convolution", flops, 0.0, 2 * sum(sizes)))
        elif name == "dot_general":
            (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            flops = 2.0 * sizes[2] * math.prod(left[d] for d in contracted)
            if not batched:
                found.append(Layer("linear", flops, 0.0, 2 * sum(sizes)))
            elif not pending:  # Queries by keys: as many exponentials as results.
                pending.append(Layer("attention", flops, sizes[2], 2 * sum(sizes[:2])))
            else:  # Weights by values.
                first = pending.pop()
                found.append(Layer(
                    "attention", first.flops + flops, first.exponentials,
                    first.bytes + 2 * sum(sizes[1:]),
                ))
