"""Eight CPU devices for the sharding tests, a cache of compiled programs that commands share, and
less of XLA's compiler: small programs are compiled in a third of the time. All must be set before
JAX makes its first array. Garbage is looked for more seldom, which takes a twelfth of the time that
tracing takes. The files that take longest come first, so that no worker is left alone with one at
the end. `--passed=FILE` runs what has not passed yet. What is marked `long` is skipped but with
LDM_SCALING_LONG=1."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
_QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends at a flag unknown to it.
    _QUICK += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

gc.set_threshold(200_000, 20, 100)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

_PASSED: list[str] = []
_LONGEST = (
    "study/test_study.py", "study/test_finetuned.py", "distributed/test_study.py",
    "models/test_zoo.py", "benchmarks/test_gpu.py", "distributed/test_processes.py",
    "study/test_cascaded.py", "test_configs.py", "distributed/test_faults.py",
    "study/test_distilled.py", "study/test_rates.py", "study/test_averages.py",
    "colab/test_notebooks.py", "training/test_step.py", "models/test_width.py",
    "study/test_collections.py", "test_cli.py", "study/test_plots.py",
    "study/figures/test_catalogue.py",
)


def pytest_configure(config):
    # xdist would begin with the files of most tests, which are not those that take longest.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_addoption(parser):
    parser.addoption(
        "--passed", metavar="FILE", type=pathlib.Path,
        help="leaves out the tests that this file names, and adds those that pass",
    )


def _passed_before(config) -> set[str]:
    path = config.getoption("--passed")
    return set(path.read_text().splitlines()) if path and path.exists() else set()


def pytest_collection_modifyitems(config, items):
    before = _passed_before(config)
    again = [item for item in items if item.nodeid in before]
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item.nodeid not in before]
    if not os.environ.get("LDM_SCALING_LONG"):
        skip = pytest.mark.skip(reason="takes minutes: LDM_SCALING_LONG=1 pytest -m long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    order = {name: number for number, name in enumerate(_LONGEST)}
    here = pathlib.Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _PASSED.append(report.nodeid)


def pytest_sessionfinish(session):
    path = session.config.getoption("--passed")
    if path and not hasattr(session.config, "workerinput"):  # Workers report to their controller.
        names = sorted({*_passed_before(session.config), *_PASSED})
        path.write_text("".join(f"{name}\n" for name in names))
