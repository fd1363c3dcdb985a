"""Eight CPU devices for the sharding tests; must be set before JAX makes its first array."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
