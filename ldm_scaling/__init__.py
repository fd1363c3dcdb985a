"""A scaling study of latent text-to-image diffusion models, in JAX (after arXiv 2404.01367)."""

__version__ = "0.2.0"
