"""Compiled programs are kept on any path, and a warm start compiles nothing anew."""

import json
import os
import subprocess
import sys

import jax
import pytest

from ldm_scaling.cli import program
from ldm_scaling.parallel import processes

_CODE = """
import json
import jax, jax.numpy as jnp
from ldm_scaling.parallel import compiled
compiled.keep()

def f(x):  # Much to compile, little to run.
    for i in range(60):
        x = jnp.tanh(x @ x + i) @ jnp.cos(x)
        x = jax.nn.softmax(jnp.sort(x, axis=i % 2), axis=0)
    return x.sum()

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
value = float(jax.jit(jax.grad(f))(jnp.eye(16)).sum())
hits, misses = (found.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses"))
print(json.dumps([hits, misses, value, jax.config.jax_compilation_cache_dir]))
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


def test_warm_start_compiles_nothing_anew(tmp_path):
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    hits, misses, value, folder = _run(tmp_path, **keep)
    assert folder.startswith(str(tmp_path / "ldm_scaling")) and os.listdir(folder)
    assert misses >= 1 and hits == 0
    kept, anew, again, _ = _run(tmp_path, **keep)
    assert (kept, anew) == (misses, 0)
    assert again == value


@pytest.mark.parametrize("environment, expected", [
    ({"JAX_COMPILATION_CACHE_DIR": "{}/mine"}, "mine"),
    ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
])  # fmt: skip
def test_what_the_environment_says_goes_before(tmp_path, environment, expected):
    _run(tmp_path / "home", **{k: v.format(tmp_path) for k, v in environment.items()})
    assert [p.name for p in tmp_path.iterdir() if any(p.iterdir())] == [expected] * bool(expected)


@pytest.mark.parametrize("flags, below", [
    (["--distributed=127.0.0.1:9,0,2"], "work/compiled"),
    ([], "home/ldm_scaling/compiled"),
])  # fmt: skip
def test_several_processes_keep_programs_where_all_see_them(tmp_path, monkeypatch, flags, below):
    # jax writes in process 0 alone: what the others have at home stays empty.
    class Kept(BaseException):
        pass

    def joined(*unused):
        raise Kept

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(processes, "initialize", joined)
    monkeypatch.setattr("ldm_scaling.study.workdir.Workdir", joined)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        with pytest.raises(Kept):
            program.main(["train", f"--workdir={tmp_path / 'work'}", *flags])
        kept = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert kept.startswith(f"{tmp_path / below}{os.sep}")
