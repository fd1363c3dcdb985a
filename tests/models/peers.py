"""What tests of networks share: a quick compilation, and a peer's random weights."""

import jax
import numpy as np

# Compilation outweighs these small passes; the arithmetic stays the same.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(f, *args):
    return np.asarray(jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args))


def shake(model, seed=0):
    """Random weights, biases and norms: nothing is left at 0 or 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else p + 0.3 * noise)
    return model.eval()
