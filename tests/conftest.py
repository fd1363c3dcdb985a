"""Eight CPU devices for the sharding tests, a cache of compiled programs that commands share, and
less of XLA's optimiser: small programs are compiled in half the time. All must be set before JAX
makes its first array."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
