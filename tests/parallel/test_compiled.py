"""Compiled programs are kept on any path, and a warm start compiles in a fraction."""

import json
import os
import subprocess
import sys

import pytest

_CODE = """
import json, sys, time
import jax, jax.numpy as jnp
from ldm_scaling.parallel import compiled
compiled.keep()

def f(x):  # Much to compile, little to run.
    for i in range(60):
        x = jnp.tanh(x @ x + i) @ jnp.cos(x)
        x = jax.nn.softmax(jnp.sort(x, axis=i % 2), axis=0)
    return x.sum()

low = jax.jit(jax.grad(f)).lower(jnp.eye(16))
began = time.process_time()
program = low.compile()
seconds = time.process_time() - began
value = float(program(jnp.eye(16)).sum())
print(json.dumps([seconds, value, jax.config.jax_compilation_cache_dir]))
"""


def _run(home, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    found = subprocess.run(
        [sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=240, check=True,
        env={**clean, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), **environment},
    )
    # XLA tells of programs that were compiled for a CPU with other features.
    assert "machine" not in found.stderr.lower() and "SIGILL" not in found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_warm_start_compiles_in_a_tenth(tmp_path):
    cold, value, folder = _run(tmp_path)
    warm, again, _ = _run(tmp_path)
    assert folder.startswith(str(tmp_path / "ldm_scaling")) and os.listdir(folder)
    assert warm < 0.1 * cold, (warm, cold)
    assert again == value


@pytest.mark.parametrize("environment, expected", [
    ({"JAX_COMPILATION_CACHE_DIR": "{}/mine"}, "mine"),
    ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
])  # fmt: skip
def test_what_the_environment_says_goes_before(tmp_path, environment, expected):
    _run(tmp_path / "home", **{k: v.format(tmp_path) for k, v in environment.items()})
    assert [p.name for p in tmp_path.iterdir() if any(p.iterdir())] == [expected] * bool(expected)
