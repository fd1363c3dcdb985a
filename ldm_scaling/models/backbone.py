"""Every network that denoises, behind one set of functions: what kind it is, its spec says.

Kinds are added by `register`, one's own as the package's, see docs/backbones.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_scaling.errors import UserError
from ldm_scaling.models import attention as attention_lib
from ldm_scaling.models import dit, edm2, functional, mmdit, unet, uvit


class Spec(Protocol):
    """What fixes a network: a frozen dataclass with these.

    Attributes:
      base_channels: its width, in tables and figures.
      in_channels, out_channels: latent channels in and out; those in beyond those out are a
        condition beside what is denoised.
      sample_size: side of the latents that FLOPs are counted at.
      latent_shape: (H, W, C) of the latents that are denoised, at that size.
      downsampling: what sides of latents must be a multiple of.
      heads: attention heads of its layers, one number or several; none are ().
      context_dim, context_length: width of the text tokens, and how many FLOPs are counted at
        where nothing else is said.
      guidance_dim: width of the embedding of a guidance rate that it is told, 0 for none.
    """

    base_channels: int
    in_channels: int
    out_channels: int
    sample_size: int
    latent_shape: tuple[int, int, int]
    downsampling: int
    heads: int | tuple[int, ...]
    context_dim: int
    context_length: int
    guidance_dim: int

    def grown(self, channels: int) -> Spec:
        """The network that sees so many channels of a condition too."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """How networks of one class of specs are made and trained.

    Attributes:
      init, param_shapes, denoise_fn: see `functional.of`.
      gathers: whether its layers multiply through `gather`, see `parallel.gathering`; where they do
        not, the compiler splits what is sharded.
      grow_input, grow_guidance: see `grow_input` and `grow_guidance` below; None of networks that
        do not take a condition or a guidance rate on.
      project: `project(params) -> params`, after every optimiser step; None leaves them.
      rates: `rates(spec)` are, by parameter, what the optimiser's steps are multiplied by; None
        where by 1 alone.
      recipe: `recipe(spec)` is what of this, and of how it begins, is in its training and was not
        in that of earlier versions, in words: hashed with how a network was trained.
    """

    init: Callable
    param_shapes: Callable
    denoise_fn: Callable
    gathers: bool = False
    grow_input: Callable | None = None
    grow_guidance: Callable | None = None
    project: Callable[[Any], Any] | None = None
    rates: Callable[[Any], Any] | None = None
    recipe: Callable[[Any], tuple[str, ...]] = lambda spec: ()


_KINDS: dict[type, Kind] = {}


def register(spec: type, network: type[nn.Module], **how: Any) -> None:
    """Adds a kind of network, made as `network(spec, dtype, remat, attention, gather)` and called
    as `unet.UNet` is.

    Args:
      spec: the class of its specs, see `Spec`.
      network: the module.
      how: `gathers`, `grow_input` and the rest of `Kind`.
    Raises:
      UserError: for a class that has a network.
    """
    if spec in _KINDS:
        raise UserError(f"{spec.__name__} has a network already: give the new one another spec")
    _KINDS[spec] = Kind(*functional.of(network), **how)


def _takes_on(module: Any) -> dict[str, Any]:
    """What all of the package's have."""
    return {"gathers": True, "grow_input": module.grow_input, "grow_guidance": module.grow_guidance}


register(unet.UNetSpec, unet.UNet, recipe=unet.recipe, **_takes_on(unet))
register(dit.DiTSpec, dit.DiT, **_takes_on(dit))
register(uvit.UViTSpec, uvit.UViT, **_takes_on(uvit))
register(mmdit.MMDiTSpec, mmdit.MMDiT, **_takes_on(mmdit))
register(edm2.EDM2Spec, edm2.EDM2, project=edm2.project, rates=edm2.rates,
         recipe=lambda spec: edm2.RECIPE, **_takes_on(edm2))


def check(spec: Any) -> None:
    """Raises `UserError` for what is no spec of a registered network, saying what it lacks."""
    name = type(spec).__name__
    if not dataclasses.is_dataclass(spec) or not type(spec).__dataclass_params__.frozen:
        raise UserError(f"{name} must be a dataclass with frozen=True: it is hashed and compared")
    if lacks := [field for field in (*Spec.__annotations__, "grown") if not hasattr(spec, field)]:
        raise UserError(f"{name} lacks {', '.join(lacks)}, see ldm_scaling.models.backbone.Spec")
    _kind(spec)


def _kind(spec: Spec) -> Kind:
    if type(spec) not in _KINDS:
        raise UserError(
            f"no network is known for a {type(spec).__name__}: register it by "
            "ldm_scaling.models.backbone.register, in a module of config.plugins"
        )
    return _KINDS[type(spec)]


def init(spec: Spec, key: jax.Array) -> Any:
    """Random float32 parameters (use under `jax.eval_shape` to allocate nothing)."""
    return _kind(spec).init(spec, key)


@functools.cache
def initializer(spec: Spec) -> Callable[[jax.Array], Any]:
    """`init` as a function of the key: one object for each spec, to be traced but once."""
    return functools.partial(init, spec)


def param_shapes(spec: Spec) -> Any:
    """Shapes and types of the parameters."""
    return _kind(spec).param_shapes(spec)


def example_inputs(
    spec: Spec, batch: int = 1, tokens: int | None = None
) -> tuple[jax.Array, ...]:
    """Zeros of the shapes that a forward pass takes: x_BHWC, t_B, ctx_BLD of so many tokens or the
    spec's own; w_B if there is one."""
    return functional.example_inputs(spec, batch, tokens)


def denoise_fn(
    spec: Spec, dtype: Any = jnp.float32, remat: str = "none",
    attention: Callable = attention_lib.plain, gather: Callable | None = None,
) -> Callable:
    """The network as `denoise(params, x_BHWC, t_B, cond) -> F_BHWC`, see `functional.of`."""
    return _kind(spec).denoise_fn(spec, dtype, remat, attention, gather)


def gathers(spec: Spec) -> bool:
    """Whether its layers gather their weights by hand, see `Kind`."""
    return _kind(spec).gathers


def project(spec: Spec) -> Callable[[Any], Any] | None:
    """What parameters are brought back to after every optimiser step, see `Kind`."""
    return _kind(spec).project


def rates(spec: Spec) -> Any:
    """By parameter, what the optimiser's steps are multiplied by, see `Kind`."""
    own = _kind(spec).rates
    return own and own(spec)


def recipe(spec: Spec) -> tuple[str, ...]:
    """What its training has beside other networks', see `Kind`."""
    return _kind(spec).recipe(spec)


def most_tokens(spec: Spec) -> int | None:
    """The most text tokens that a network takes; None of one that takes any number."""
    return spec.context_length if isinstance(spec, uvit.UViTSpec) else None


def heads(spec: Spec) -> set[int]:
    """The numbers of attention heads in its layers."""
    return {spec.heads} if isinstance(spec.heads, int) else set(spec.heads)


def grow_input(spec: Spec, params: Any, channels: int) -> Any:
    """Parameters of `spec` with a first layer that takes so many channels more, by weights of zero:
    the network gives what it gave, see `unet.grow_input`."""
    return _grown(spec, "grow_input")(params, channels)


def grow_guidance(spec: Spec, params: Any, dim: int) -> Any:
    """Parameters of `spec` told a guidance rate too (`guidance_dim=dim`), by weights of zero: the
    network gives what it gave, see `unet.grow_guidance`."""
    return _grown(spec, "grow_guidance")(params, dim)


def _grown(spec: Spec, name: str) -> Callable:
    grow = getattr(_kind(spec), name)
    if grow is None:
        raise UserError(
            f"{type(spec).__name__}'s network takes no new input on: give {name} to "
            "ldm_scaling.models.backbone.register, as ldm_scaling.models.unet has it"
        )
    return grow
