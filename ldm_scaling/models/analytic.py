"""FLOPs of a U-Net by hand: the products of its layers, from the spec alone, in no time.

Beside XLA's count (`models.cost`) it tells what that one adds and leaves out: it counts sums and
products of single elements too, and leaves out taps on a convolution's padding.
"""

from __future__ import annotations

from ldm_scaling.models.unet import UNetSpec


def gflops(spec: UNetSpec) -> float:
    """1e9 FLOPs of one forward pass of one sample, guidance not doubled.

    Convolutions (taps on padding among them), linear layers and attention's two products, 2 FLOPs
    per multiply-add; norms, activations, softmax and sums are left out.
    """
    return 2e-9 * _products(spec)


def _conv(size: int, wide_in: int, wide_out: int, side: int) -> int:
    return size * size * wide_in * wide_out * side * side


def _res(wide_in: int, wide_out: int, emb: int, side: int) -> int:
    shortcut = _conv(1, wide_in, wide_out, side) if wide_in != wide_out else 0
    return (
        _conv(3, wide_in, wide_out, side) + emb * wide_out + _conv(3, wide_out, wide_out, side)
        + shortcut
    )


def _transformer(spec: UNetSpec, width: int, side: int) -> int:
    tokens, texts = side * side, spec.context_length
    around = 2 * tokens * width**2
    own = 4 * tokens * width**2 + 2 * tokens**2 * width
    cross = 2 * width * (tokens * width + texts * spec.context_dim + tokens * texts)
    # Two products up to four times the width (GEGLU), one down.
    mlp = 12 * tokens * width**2
    return around + own + cross + mlp


def _products(spec: UNetSpec) -> int:
    """Multiply-adds."""
    c, last = spec.base_channels, len(spec.channel_mults) - 1
    emb = 4 * c
    widths = [c * mult for mult in spec.channel_mults]
    sides = [spec.sample_size >> i for i in range(last + 1)]
    total = spec.guidance_dim * c + c * emb + emb * emb + _conv(3, spec.in_channels, c, sides[0])
    width, skips = c, [c]
    for i, (side, attention) in enumerate(zip(sides, spec.attention_levels, strict=True)):
        for _ in range(spec.blocks_per_level):
            total += _res(width, widths[i], emb, side)
            width = widths[i]
            total += _transformer(spec, width, side) if attention else 0
            skips.append(width)
        if i != last:
            total += _conv(3, width, width, sides[i + 1])
            skips.append(width)
    total += 2 * _res(width, width, emb, sides[-1]) + _transformer(spec, width, sides[-1])
    for i in reversed(range(last + 1)):
        for _ in range(spec.blocks_per_level + 1):
            total += _res(width + skips.pop(), widths[i], emb, sides[i])
            width = widths[i]
            total += _transformer(spec, width, sides[i]) if spec.attention_levels[i] else 0
        if i:
            total += _conv(3, width, width, sides[i - 1])
    return total + _conv(3, width, spec.out_channels, sides[0])
