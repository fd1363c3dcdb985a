"""Width transfer: a network's first weights and learning rates such that a rate that is best at one
width is best at others (muP, Yang & Hu et al. 2022, Tensor Programs V, arXiv 2203.03466).

Of the forms that its section B has for one and the same training, this is the one of its Table 3,
without multipliers in the network: a trained network is then an ordinary one, to samplers,
checkpoints and whatever is made of it. Under Adam, against a base width at which nothing changes:

    kernel        fan-in grows   fan-out grows   variance drawn with   learning rate
    input-like    no             either          1                     1
    hidden        yes            yes             base / width          base / width
    output        yes            no              (base / width)^2      base / width

All else (biases, gains of norms, positions) is drawn and trained as at the base; DiT's offsets of
shifts, scales and gates, which it draws with variance 1 / width, are input-like. Logits of
attention are divided by a head's width rather than by its root: as that is q k / root W times a
constant, the constant goes into what makes q and its rates, a head's width at the base giving what
it gave.

EDM2 has a rule of its own, `edm2.rates`: its kernels are kept at unit norm, so that nothing is
drawn otherwise, and take steps by their fan-in at any width. Against a base hidden and output
kernels then have the rates above, and all else root (base / width).

Which dimensions grow is seen by comparing the shapes of a network and of one twice as wide, as the
authors' package `mup` does. What is drawn as zeros stays so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.linen.linear import default_kernel_init

from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, dit, edm2, tokens, uvit
from ldm_scaling.models.dit import DiTSpec
from ldm_scaling.models.edm2 import EDM2Spec
from ldm_scaling.models.mmdit import MMDiTSpec
from ldm_scaling.models.unet import UNetSpec
from ldm_scaling.models.uvit import UViTSpec

# 1 / variance of what is drawn, but for a factor: so much of the fan-in, so much of the fan-out. Of
# a variance that no shape changes, neither. By what draws a kernel, or by the layer that is one.
_DRAWN: dict[Callable, tuple[float, float]] = {
    dit.Offsets: (0.0, 1.0),
    default_kernel_init: (1.0, 0.0),
    uvit.TORCH: (1.0, 0.0),
    uvit.TORCH_PATCHES: (1.0, 0.0),
    tokens.XAVIER: (0.5, 0.5),
    tokens.XAVIER_IN: (0.5, 0.5),
    tokens.XAVIER_PATCHES: (0.5, 0.5),
    dit.XAVIER_PAIR: (0.5, 0.5),
    tokens.SMALL: (0.0, 0.0),
    tokens.ZEROS: (0.0, 0.0),
}
_KINDS = {
    UNetSpec: "U-Net", DiTSpec: "DiT", UViTSpec: "U-ViT", MMDiTSpec: "MM-DiT", EDM2Spec: "EDM2",
}
# Fields in which a network and its base may differ: sizes, and what is at the input.
_FREE = (
    "base_channels", "head_width", "heads", "groups", "depth", "in_channels", "sample_size",
    "context_length", "guidance_dim", "conv_out", "zero_init",
)
_QUERIES = "to_q"


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
    """What width transfer changes in a network's training.

    Attributes:
      draws: by parameter, what its first values are multiplied by.
      rates: by parameter, what the optimiser's steps are multiplied by; None where by 1 alone.
    """

    draws: Any
    rates: Any

    def drawn(self, params: Any) -> Any:
        """Parameters as they begin, of those that `backbone.init` draws."""
        return jax.tree.map(lambda p, times: p if times == 1 else p * times, params, self.draws)


@functools.cache
def mup(spec: backbone.Spec, base: backbone.Spec) -> Transfer:
    """The parametrisation of a network against a base of its kind, at which it is the one without
    width transfer to the bit.

    Raises:
      UserError: for kinds of networks that it is not made for, and for a base that differs in more
        than its sizes.
    """
    _check(spec, base)
    if isinstance(spec, EDM2Spec):
        rates = edm2.rates(spec, base)
        return Transfer(jax.tree.map(lambda _: 1.0, rates), rates)
    shapes, wider = (backbone.param_shapes(s) for s in (spec, _widened(spec)))
    inits = _inits(spec)
    part = (base.base_channels - spec.base_channels) / spec.base_channels
    narrower = _head_width(spec, base) ** -0.5

    def factors(path: tuple, own: Any, wide: Any) -> tuple[float, float]:
        apart = narrower if len(path) > 1 and path[-2].key == _QUERIES else 1.0
        name = "/".join(k.key for k in path)
        if path[-1].key != "kernel" and name not in inits:
            return apart, apart
        (fan_in, out), (wide_in, wide_out) = (
            (math.prod(s.shape[:-1]), s.shape[-1]) for s in (own, wide)
        )
        # Dimensions are a + b width: two widths tell what they are at the base.
        base_in, base_out = fan_in + (wide_in - fan_in) * part, out + (wide_out - out) * part
        per_in, per_out = _DRAWN[inits[name]]
        more = (per_in * fan_in + per_out * out) / (per_in * base_in + per_out * base_out) \
            if per_in + per_out else 1.0
        rate = base_in / fan_in
        variance = rate if wide_out != out else rate**2
        return _exact(math.sqrt(variance * more) * apart), _exact(rate * apart)

    both = jax.tree_util.tree_map_with_path(factors, shapes, wider)
    draws, rates = (
        jax.tree.map(lambda pair, k=k: pair[k], both, is_leaf=lambda x: isinstance(x, tuple))
        for k in range(2)
    )
    return Transfer(draws, rates if set(jax.tree.leaves(rates)) != {1.0} else None)


def _check(spec: backbone.Spec, base: backbone.Spec) -> None:
    if type(spec) not in _KINDS:
        raise UserError(
            f"train.width_transfer='mup' is for {', '.join(_KINDS.values())}, not for "
            f"{type(spec).__name__.removesuffix('Spec')}; give 'none'"
        )
    if type(base) is not type(spec):
        raise UserError(
            f"train.base_member is a {_KINDS.get(type(base), type(base).__name__)}, and a member "
            f"is a {_KINDS[type(spec)]}: give a base of its kind"
        )
    for field in dataclasses.fields(spec):
        have, want = getattr(spec, field.name), getattr(base, field.name)
        if field.name not in _FREE and have != want:
            raise UserError(
                f"train.base_member has {field.name}={want!r}, and a member {have!r}: widths are "
                "compared of networks that are alike else; give another base"
            )


def _widened(spec: backbone.Spec) -> backbone.Spec:
    """The network of twice the width."""
    if isinstance(spec, MMDiTSpec):  # Its depth would grow with its heads.
        return dataclasses.replace(spec, head_width=2 * spec.head_width)
    return dataclasses.replace(spec, base_channels=2 * spec.base_channels)


def _head_width(spec: backbone.Spec, base: backbone.Spec) -> float:
    """A head's width over that at the base, the same in all layers."""
    def widths(s: backbone.Spec) -> tuple[float, ...]:
        heads = s.heads if isinstance(s.heads, tuple) else (s.heads,)
        return tuple(s.base_channels / n for n in heads)

    own, its = widths(spec), widths(base)
    wide = max(len(own), len(its))
    ratios = {
        a / b for a, b in zip(own * (wide // len(own)), its * (wide // len(its)), strict=True)
    }
    if len(ratios) > 1:
        raise UserError(
            f"train.base_member has heads={base.heads}, and a member {spec.heads}: a head's width "
            "must grow alike at all levels; give another base"
        )
    (ratio,) = ratios
    if ratio != 1 and isinstance(spec, MMDiTSpec):
        raise UserError(
            f"train.base_member has head_width={base.head_width}, and a member {spec.head_width}: "
            "MM-DiT normalises what its heads compare, so width transfer is for one head_width"
        )
    return ratio


def _inits(spec: backbone.Spec) -> dict[str, Callable]:
    """What draws each kernel, and whatever else is drawn by its width, by the parameter's path."""
    found: dict[str, Callable] = {}

    def see(call: Callable, args: tuple, kw: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Dense | nn.Conv):
            found["/".join([*layer.path, "kernel"])] = layer.kernel_init
        elif isinstance(layer, dit.Offsets):
            found["/".join([*layer.path, "bias"])] = dit.Offsets
        return call(*args, **kw)

    # Under jit a block that is like another would not be seen.
    with nn.intercept_methods(see), jax.disable_jit():
        jax.eval_shape(lambda: backbone.init(spec, jax.random.key(0)))
    return found


def _exact(factor: float) -> float:
    """1 for what rounding has kept from it."""
    return 1.0 if abs(factor - 1) < 1e-9 else factor
