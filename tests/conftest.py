"""Eight CPU devices for the sharding tests, and a cache of compiled programs that commands share;
both must be set before JAX makes its first array."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
