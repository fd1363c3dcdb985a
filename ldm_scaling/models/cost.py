"""What a network costs: its parameters, and the FLOPs of one denoising step. Allocates nothing."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention, backbone

COUNTED = pathlib.Path(__file__).with_name("counted.json")
"""Costs of the zoo's networks, which take a second or two each to count; see `counted`."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a network.

    Attributes:
      params: number of parameters.
      gflops: 1e9 FLOPs of one forward pass, see `gflops`.
    """

    params: int
    gflops: float


def gflops(spec: backbone.Spec, tokens: int | None = None) -> float:
    """1e9 FLOPs of one forward pass as XLA counts them, before any optimisation.

    Batch 1, float32, at `spec.sample_size` and so many text tokens, `spec.context_length` if not
    given; a multiply-add is 2 FLOPs, taps on a convolution's padding are left out, additions and
    products of single elements are counted and exponentials are not; guidance does not double it.
    The paper's Table 1 counts so. Attention is counted in its textbook form, so that a faster one
    does not change the cost. What is done to weights in every call is counted too, though a batch
    shares it: EDM2's unit norms are 0.4% of edm2_xs and 6.8% of edm2_c14 to edm2_c44.
    """
    return of(spec, tokens).gflops


@functools.cache
def of(spec: backbone.Spec, tokens: int | None = None) -> Cost:
    """Both figures, see `gflops`: of the zoo's networks as `COUNTED` has them, of others, and at
    other numbers of text tokens, counted now, in a second or two, and kept for the life of the
    process. Raises as `count`."""
    known = kept(COUNTED, spec, tokens)
    return count(spec, tokens) if known is None else Cost(known["params"], known["gflops"])


def key(spec: backbone.Spec) -> str:
    """What a network is found by in `COUNTED`: a hash of all that fixes it."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def kept(
    path: pathlib.Path, spec: backbone.Spec, tokens: int | None = None
) -> dict[str, Any] | None:
    """What a file of `counted.write` has of a network; None where it is not in it, or at another
    number of text tokens."""
    return _read(path).get(key(spec)) if tokens in (None, spec.context_length) else None


@functools.cache
def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def count(spec: backbone.Spec, tokens: int | None = None) -> Cost:
    """Both figures, counted; see `gflops`.

    Raises:
      UserError: for more text tokens than the network has places for, and as `counted`.
    """
    params = backbone.param_shapes(spec)
    inputs = jax.eval_shape(functools.partial(backbone.example_inputs, spec, tokens=tokens))
    denoise = backbone.denoise_fn(spec, attention=attention.textbook)

    def forward(params, x_BHWC, t_B, ctx_BLD, *w_B):
        told = {"guidance": w_B[0]} if w_B else {}
        return denoise(params, x_BHWC, t_B, {"context": ctx_BLD} | told)

    return Cost(
        params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        gflops=counted(forward, params, *inputs),
    )


def counted(run: Callable, *shapes: Any) -> float:
    """1e9 FLOPs that XLA counts of `run` on arrays of these shapes, before any optimisation.

    Raises:
      UserError: where JAX may not use the CPU: other platforms' plug-ins do not count.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as e:
        raise UserError(
            f"FLOPs are counted on the CPU, which JAX_PLATFORMS={jax.config.jax_platforms} leaves "
            f"out: set JAX_PLATFORMS={jax.config.jax_platforms},cpu"
        ) from e
    with jax.default_device(cpu):
        return jax.jit(run).lower(*shapes).cost_analysis()["flops"] / 1e9
