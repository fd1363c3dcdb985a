"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen kernel W is used as W + A B; alpha is r.

A and B of rank r are all that is trained. They form a tree of their own, laid out as the network's:
beside `NAME/kernel` stand `NAME/down/kernel` (A) and `NAME/up/kernel` (B), so that rules for
sharding and weight decay know them as kernels. The network sees merged kernels and knows of none of
this: any network, any layer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from ldm_scaling import files
from ldm_scaling.errors import UserError

# Of the network that denoises, as peft and diffusers have it: all projections of its attention; of
# MM-DiT's streams each has its own.
NETWORK_TARGETS = (r"(attn[12]|(image|text)_(in|out))/to_(q|k|v|out)$",)
# Of a BERT or CLIP's text tower: the same.
TEXT_TARGETS = (r"/(query|key|value|out)$",)
_ENDS = {"down": "lora_A", "up": "lora_B"}


def layers(params: Any, targets: Sequence[str]) -> list[str]:
    """Names of the layers with a kernel that a pattern is found in, such as
    `down_0_attn_0/block/attn1/to_q`, sorted.

    Raises:
      UserError: for a pattern that is none, or that no layer matches.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    names = sorted(n.removesuffix("/kernel") for n in flat if n.endswith("/kernel"))
    found: set[str] = set()
    for pattern in targets:
        try:
            own = {name for name in names if re.search(pattern, name)}
        except re.error as e:
            raise UserError(f"LoRA target {pattern!r} is no regular expression: {e}") from e
        if not own:
            raise UserError(
                f"LoRA target {pattern!r} matches none of the {len(names)} layers, which are "
                f"called {', '.join(names[:2])}, ..., {names[-1]}"
            )
        found |= own
    return sorted(found)


def init(
    params: Any, rank: int, key: jax.Array, targets: Sequence[str] = NETWORK_TARGETS
) -> Any:
    """Adapters that change nothing yet: A normal with a deviation of 1 / rank, B zero.

    Args:
      params: of the network; shapes will do.
      rank: r.
      key: of A; each layer's own is folded from it.
      targets: regular expressions that find the layers, see `layers`.
    Returns:
      {layer: {"down": {"kernel": (..., in, r)}, "up": {"kernel": (..., r, out)}}}, nested as
      `params`, float32. Of a convolution A has its size, B is pointwise.
    Raises:
      UserError: as `layers`, and for a rank below 1 or above a kernel's own.
    """
    flat, out = traverse_util.flatten_dict(params, sep="/"), {}
    for number, name in enumerate(layers(params, targets)):
        *size, wide, high = flat[f"{name}/kernel"].shape
        if not 1 <= rank <= min(wide, high):
            raise UserError(
                f"LoRA rank {rank}: give 1 to {min(wide, high)}, the rank of {name}, whose kernel "
                f"is {wide} x {high}, or leave that layer out of the targets"
            )
        own = jax.random.fold_in(key, number)
        out[f"{name}/down/kernel"] = jax.random.normal(own, (*size, wide, rank)) / rank
        out[f"{name}/up/kernel"] = jnp.zeros((*[1] * len(size), rank, high))
    return traverse_util.unflatten_dict(out, sep="/")


def merge(params: Any, adapters: Any) -> Any:
    """The network's parameters with adapters in their kernels: W + A B.

    Args:
      params: of the network.
      adapters: of some of its layers, see `init`.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, down in traverse_util.flatten_dict(adapters, sep="/").items():
        if name.endswith("/down/kernel"):
            layer = name.removesuffix("/down/kernel")
            up = _at(adapters, f"{layer}/up/kernel")
            # Two layers one after the other, the second pointwise, are one of their product.
            product = jnp.matmul(down, up.reshape(down.shape[-1], -1), precision="highest")
            kernel = flat[f"{layer}/kernel"]
            flat[f"{layer}/kernel"] = kernel + product.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _at(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree


# --- files ------------------------------------------------------------------------------------


def _unet_name(name: str, levels: int | None) -> str:
    """diffusers' name of a U-Net's layer. Its one GEGLU layer is two here, `[in]` and `[gate]`, see
    `_join_gates`. Another network's, of no levels, is ours."""
    if levels is None:
        return "denoiser." + name.replace("/", ".")
    name = re.sub(r"^up_(\d+)_", lambda m: f"up_blocks/{levels - 1 - int(m[1])}/", name)
    for ours, theirs in (
        (r"^down_(\d+)_", r"down_blocks/\1/"), (r"^mid_attn", "mid_block/attentions/0"),
        (r"^mid_res_", "mid_block/resnets/"), (r"/res_(\d+)", r"/resnets/\1"),
        (r"/attn_(\d+)", r"/attentions/\1"), (r"/block/", "/transformer_blocks/0/"),
        (r"/(down|up)sample$", r"/\1samplers/0/conv"), (r"/to_out$", "/to_out/0"),
        (r"/ff_(in|gate)$", r"/ff/net/0/proj[\1]"), (r"/ff_out$", "/ff/net/2"),
        (r"^time_embedding_", "time_embedding/linear_"),
    ):
        name = re.sub(ours, theirs, name)
    return "unet." + name.replace("/", ".")


_TEXT_NAMES = (
    (r"^block_(\d+)/(query|key|value|out)$", r"text_model.encoder.layers.\1.self_attn.\2"),
    (r"^block_(\d+)/", r"text_model.encoder.layers.\1."),
    (r"self_attn\.query", "self_attn.q_proj"), (r"self_attn\.key", "self_attn.k_proj"),
    (r"self_attn\.value", "self_attn.v_proj"), (r"self_attn\.out", "self_attn.out_proj"),
    (r"\.up$", ".mlp.fc1"), (r"\.down$", ".mlp.fc2"),
    (r"^layer_(\d+)/(query|key|value)$", r"encoder.layer.\1.attention.self.\2"),
    (r"^layer_(\d+)/out$", r"encoder.layer.\1.attention.output.dense"),
    (r"^layer_(\d+)/up$", r"encoder.layer.\1.intermediate.dense"),
    (r"^layer_(\d+)/down$", r"encoder.layer.\1.output.dense"),
)


def _text_name(name: str) -> str:
    """transformers' name of a layer of CLIP's text tower or of a BERT."""
    for ours, theirs in _TEXT_NAMES:
        name = re.sub(ours, theirs, name)
    return "text_encoder." + name.replace("/", ".")


def _join_gates(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adapters of GEGLU's two layers as one of diffusers' layer, exactly: of one A with the Bs one
    below the other; of two of twice the rank, each B on its own part of A. Of one of the two there
    is no layer there, and it keeps its name, which diffusers does not read."""
    out = dict(tensors)
    for name in tensors:
        stem = name.removesuffix("[in].lora_A.weight")
        parts = [f"{stem}[{half}].{end}.weight" for end in ("lora_A", "lora_B")
                 for half in ("in", "gate")]
        if stem == name or parts[1] not in tensors:
            continue
        a, a_gate, b, b_gate = (out.pop(part) for part in parts)
        if not np.array_equal(a, a_gate):
            a = np.concatenate([a, a_gate])
            b, b_gate = (np.pad(b, [(0, 0), (0, b_gate.shape[1])]),
                         np.pad(b_gate, [(0, 0), (b.shape[1], 0)]))
        out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = a, np.concatenate([b, b_gate])
    return out


def _one_rank(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All layers of a network with as many rows of A and columns of B as the widest, by zeros,
    which change no product. Where ranks differ and no alpha is told, diffusers 0.39 takes one
    layer's rank for the alpha of all, so that the others' products get a factor."""
    axes = {name: int(name.endswith(".lora_B.weight")) for name in tensors}
    ranks: dict[str, int] = {}
    for name, axis in axes.items():
        network = name.partition(".")[0]
        ranks[network] = max(ranks.get(network, 0), tensors[name].shape[axis])
    out = {}
    for name, axis in axes.items():
        pad = [(0, 0)] * tensors[name].ndim
        pad[axis] = (0, ranks[name.partition(".")[0]] - tensors[name].shape[axis])
        out[name] = np.pad(tensors[name], pad)
    return out


def tensors(adapters: dict[str, Any], levels: int | None) -> dict[str, np.ndarray]:
    """Adapters as peft and diffusers keep them: A (r, in) and B (out, r) of each layer, under its
    name there, with `.lora_A.weight` and `.lora_B.weight`. All layers of a network have one rank
    (zeros fill the lower ones up), so that readers need not know alpha.

    Args:
      adapters: "unet" and, where it is trained, "text", to the tree of `init`.
      levels: of the U-Net, which diffusers counts the other way on the way up; None of another
        network, whose layers keep our names, after `denoiser`.
    """
    out = {}
    for network, tree in adapters.items():
        for name, value in traverse_util.flatten_dict(tree, sep="/").items():
            layer, end = name.removesuffix("/kernel").rsplit("/", 1)
            called = _unet_name(layer, levels) if network == "unet" else _text_name(layer)
            value = np.asarray(value, np.float32)
            # Ours are (..., in, out), torch's (out, in, ...).
            value = np.moveaxis(value, (-1, -2), (0, 1))
            out[f"{called}.{_ENDS[end]}.weight"] = np.ascontiguousarray(value)
    return _one_rank(_join_gates(out))


def save(
    path: str | os.PathLike[str], adapters: dict[str, Any], levels: int | None
) -> None:
    """Writes `tensors` as safetensors, by rename: of a U-Net a file for diffusers'
    `load_lora_weights`."""
    data = safetensors.numpy.save(tensors(adapters, levels), {"format": "pt"})
    files.atomic_write_bytes(path, data)
