"""What caching latents and text states would cost, and what it saves each member of the family.

FLOPs are XLA's count, as in `models.cost`; nothing is allocated. A training step is the count of
the loss and its gradient, the optimiser's few operations a parameter left out: 2.9 to 3.0 times a
forward pass for the paper's members, 2.4 to 2.8 times for those of 8 to 32 channels, where what
needs no gradient (the picture, the timestep) weighs more.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ldm_scaling import terminal
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import (
    attention,
    autoencoder,
    backbone,
    clip,
    clip_text,
    cost,
    t5,
    text_encoder,
    zoo,
)

TextSpec = clip.TextSpec | t5.T5Spec | text_encoder.BertSpec
# The encoders that states of captions are commonly taken from, by the names that configs use.
TEXTS: dict[str, TextSpec] = {
    "minilm": text_encoder.BertSpec(),
    "clip_l": clip.PUBLISHED["ViT-L/14"].text,
    "clip_h": clip.PUBLISHED["ViT-H/14"].text,
    "t5_large": t5.T5Spec(width=1024, layers=24, heads=16, head_width=64, hidden=2816),
    "t5_xxl": t5.T5Spec(width=4096, layers=24, heads=64, head_width=64, hidden=10240),
}
_BYTES = {"float16": 2, "float32": 4}
COUNTED = pathlib.Path(__file__).with_name("counted.json")
"""FLOPs of training the zoo's networks, which take seconds each to count; see `counted`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A data set and the encoders that it goes through; the defaults are Stable Diffusion 2's.

    Attributes:
      images: of the data set.
      captions: of all images together; each is encoded, one an image is drawn an epoch.
      side: of the images in pixels.
      autoencoder, text: the encoders.
      length: tokens of a caption.
      mirrored: whether the mirrored images are encoded too.
      examples_per_second: of training, for the rate of reading.

    Raises:
      UserError: for numbers that are not positive, or a side that the autoencoder does not halve.
    """

    images: int
    captions: int
    side: int = 512
    autoencoder: autoencoder.AutoencoderSpec = autoencoder.AutoencoderSpec()
    text: TextSpec = TEXTS["clip_h"]
    length: int = 77
    mirrored: bool = False
    examples_per_second: float = 1000.0

    def __post_init__(self):
        for name in ("images", "captions", "side", "length", "examples_per_second"):
            if not getattr(self, name) > 0:
                raise UserError(f"caching: {name}={getattr(self, name)!r} must be above 0")
        if self.captions < self.images:
            raise UserError(
                f"caching: {self.captions} captions are fewer than the {self.images} images: each "
                "image needs one"
            )
        if self.side % self.autoencoder.downsampling:
            raise UserError(
                f"caching: side={self.side} is not a multiple of the autoencoder's downsampling "
                f"{self.autoencoder.downsampling}"
            )
        positions = getattr(self.text, "positions", self.length)
        if self.length > positions:
            raise UserError(f"caching: length={self.length}, but the text encoder takes "
                            f"{positions} tokens")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        side = self.side // self.autoencoder.downsampling
        return (side, side, self.autoencoder.latent_channels)

    def latent_bytes(self, dtype: str) -> int:
        """Of the mean and log variance of an image, and of its mirror image where that is kept."""
        return 2 * (1 + self.mirrored) * math.prod(self.latent_shape) * _BYTES[dtype]

    def text_bytes(self, dtype: str) -> int:
        """Of the states of a caption."""
        return self.length * self.text.width * _BYTES[dtype]

    def total_bytes(self, dtype: str) -> int:
        """Of the caches, uncompressed."""
        return self.images * self.latent_bytes(dtype) + self.captions * self.text_bytes(dtype)

    def read_bytes_per_second(self, dtype: str) -> float:
        """That training reads: latents of one image and states of one caption an example."""
        latent = self.latent_bytes(dtype) // (1 + self.mirrored)
        return self.examples_per_second * (latent + self.text_bytes(dtype))


@dataclasses.dataclass(frozen=True)
class Row:
    """What caching means for one member. FLOPs in units of 1e9.

    Attributes:
      name: of the member.
      image_gflops, text_gflops: of the frozen encoders, for an image and a caption.
      train_gflops: of the member's loss and gradient, an example.
      frozen_share: share of the frozen encoders in a training step without caches.
      speedup: FLOPs of a step without caches over those of one with.
      pass_gflops: of encoding the data set once: every image, its mirror image if kept, and
        every caption.
      saved_gflops_per_epoch: what an epoch without caches spends on the encoders.
      break_even_epochs: after which encoding once has cost less.
      pass_in_epochs: how many epochs of training from caches encoding once costs.
      latent_bytes_float16, latent_bytes_float32, text_bytes_float16, text_bytes_float32: an image,
        a caption.
      total_bytes_float16, total_bytes_float32: of the data set.
      read_bytes_per_second_float16, read_bytes_per_second_float32: at the plan's rate.
    """

    name: str
    image_gflops: float
    text_gflops: float
    train_gflops: float
    frozen_share: float
    speedup: float
    pass_gflops: float
    saved_gflops_per_epoch: float
    break_even_epochs: float
    pass_in_epochs: float
    latent_bytes_float16: int
    latent_bytes_float32: int
    text_bytes_float16: int
    text_bytes_float32: int
    total_bytes_float16: int
    total_bytes_float32: int
    read_bytes_per_second_float16: float
    read_bytes_per_second_float32: float


def rows(plan: Plan, members: Sequence[str]) -> list[Row]:
    """One a member; `dataclasses.asdict` makes JSON of it. A member on latents or captions of
    another size than the zoo's takes some seconds.

    Raises:
      UserError: for a member that is unknown or does not take such latents or states, or where JAX
        may not use the CPU.
    """
    return [_row(plan, name) for name in members]


def _row(plan: Plan, name: str) -> Row:
    spec = zoo.get(name).spec
    height, _, channels = plan.latent_shape
    if spec.in_channels != channels:
        raise UserError(
            f"member {name} takes latents of {spec.in_channels} channels, the autoencoder makes "
            f"{channels}"
        )
    if plan.text.width > spec.context_dim:
        raise UserError(
            f"member {name} takes text states up to {spec.context_dim} wide, the encoder's are "
            f"{plan.text.width}: choose a member with a wider context, or another text encoder"
        )
    spec = dataclasses.replace(spec, sample_size=height, context_length=plan.length)
    image, text = image_gflops(plan.autoencoder, plan.side), text_gflops(plan.text, plan.length)
    train = train_gflops(spec)
    once = plan.images * (1 + plan.mirrored) * image + plan.captions * text
    saved = plan.images * (image + text)
    sizes = {
        f"{kind}_{dtype}": getattr(plan, kind)(dtype)
        for kind in ("latent_bytes", "text_bytes", "total_bytes", "read_bytes_per_second")
        for dtype in _BYTES
    }
    return Row(
        name=name, image_gflops=image, text_gflops=text, train_gflops=train,
        frozen_share=(image + text) / (image + text + train),
        speedup=(image + text + train) / train,
        pass_gflops=once, saved_gflops_per_epoch=saved, break_even_epochs=once / saved,
        pass_in_epochs=once / (plan.images * train), **sizes,
    )


# --- FLOPs ------------------------------------------------------------------------------------


@functools.cache
def image_gflops(spec: autoencoder.AutoencoderSpec, side: int) -> float:
    """1e9 FLOPs of encoding one image of side x side pixels."""
    params = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return cost.counted(lambda p, x: autoencoder.encode(spec, p, x), params, image)


@functools.cache
def decode_gflops(
    spec: autoencoder.AutoencoderSpec, latent_shape: tuple[int, int, int]
) -> float:
    """1e9 FLOPs of making one picture of latents (h, w, C)."""
    params = jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))
    latents = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
    return cost.counted(lambda p, z: autoencoder.decode(spec, p, z), params, latents)


@functools.cache
def text_gflops(spec: TextSpec, length: int) -> float:
    """1e9 FLOPs of the states of one caption of `length` tokens, padding among them."""
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    if isinstance(spec, clip.TextSpec):
        network, inputs = clip_text.TextTower(spec), (ids,)
    elif isinstance(spec, t5.T5Spec):
        network, inputs = t5.T5Encoder(spec), (ids, mask)
    else:
        network, inputs = text_encoder.Bert(spec), (ids, mask)
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)

    def states(variables, *inputs):
        out = network.apply(variables, *inputs)
        return out["last"] if isinstance(out, dict) else out

    return cost.counted(states, variables, *inputs)


@functools.cache
def train_gflops(spec: backbone.Spec, tokens: int | None = None) -> float:
    """1e9 FLOPs of the loss and its gradient for one example, without the optimiser; of so many
    text tokens, the spec's own if not given. Of the zoo's networks as `COUNTED` has them, of others
    counted now and kept for the life of the process."""
    known = cost.kept(COUNTED, spec, tokens)
    return count_train(spec, tokens) if known is None else known["train_gflops"]


def count_train(spec: backbone.Spec, tokens: int | None = None) -> float:
    """The same, counted."""
    denoise = backbone.denoise_fn(spec, attention=attention.textbook)
    schedule = schedule_lib.get("sd")

    def loss(params, x_BHWC, ctx_BLD, key):
        cond = {"context": ctx_BLD}
        return jnp.mean(
            loss_lib.diffusion_loss(denoise, params, x_BHWC, cond, key, schedule, "epsilon")
        )

    params = backbone.param_shapes(spec)
    x_BHWC, _, ctx_BLD = jax.eval_shape(
        functools.partial(backbone.example_inputs, spec, tokens=tokens))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return cost.counted(jax.value_and_grad(loss), params, x_BHWC, ctx_BLD, key)


# --- text -------------------------------------------------------------------------------------


def text(plan: Plan, found: Sequence[Row]) -> str:
    """The plan and its rows for a terminal; no line is longer than 100 characters."""
    table = terminal.table("name", "train GFLOPs", "encoders", "share", "speed-up",
                           "one pass, epochs")
    for row in found:
        table.add_row(
            row.name, _short(row.train_gflops), _short(row.image_gflops + row.text_gflops),
            f"{row.frozen_share:.1%}", f"{row.speedup:.2f}x", _short(row.pass_in_epochs),
        )
    console = terminal.console()
    for line in _head(plan, found):
        console.print(line)
    console.print(table)
    console.print(
        "share: of the frozen encoders in the FLOPs of a step without caches; one pass: encoding "
        "everything\nonce, in epochs of training from the caches."
    )
    return terminal.text(console)


def _head(plan: Plan, found: Sequence[Row]) -> list[str]:
    h, w, c = plan.latent_shape
    each = "mean and log variance" + (", mirrored too" if plan.mirrored else "")
    lines = [
        f"{plan.images:,} images of {plan.side}x{plan.side}, {plan.captions:,} captions",
        f"  latents {h}x{w}x{c}, {each}: {_pair(plan.latent_bytes)} an image",
        f"  text states {plan.length}x{plan.text.width}: {_pair(plan.text_bytes)} a caption",
        f"  all: {_pair(plan.total_bytes)}",
        f"  read at {plan.examples_per_second:,.0f} examples/s: "
        f"{_pair(plan.read_bytes_per_second, '/s')}",
    ]
    if found:
        row = found[0]
        lines.append(
            f"  encoding once: {_short(row.pass_gflops / 1e6)} PFLOPs; paid back after "
            f"{row.break_even_epochs:.2f} epochs"
        )
    return lines


def _pair(sized: Callable[[str], float], unit: str = "") -> str:
    return ", ".join(f"{_size(sized(dtype))}{unit} in {dtype}" for dtype in _BYTES)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
