"""Several processes: what is wrong with how they are started is one line; alone nothing waits."""

import os
import subprocess
import sys
import time

import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import processes
from tests.distributed import driving


@pytest.mark.parametrize("where, parts", [
    ("", ["write auto, or HOST:PORT,K,N"]),
    ("host", ["--distributed=host", "HOST:PORT,K,N"]),
    ("host:1234", ["HOST:PORT,K,N"]),
    ("host:1234,0", ["HOST:PORT,K,N"]),
    ("host:1234,-1,2", ["HOST:PORT,K,N"]),
    ("host:port,0,2", ["HOST:PORT,K,N"]),
    ("host:0,0,2", ["0 is no port"]),
    ("host:70000,0,2", ["70000 is no port"]),
    ("host:1234,2,2", ["process 2 of 2", "from 0 to 1"]),
    ("host:1234,0,0", ["process 0 of 0"]),
])  # fmt: skip
def test_malformed_value(where, parts):
    with pytest.raises(UserError) as e:
        processes.initialize(where)
    for part in parts:
        assert part in str(e.value)


def _python(code):
    """Runs code in a process of its own: the first to use a device."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "KUBERNETES"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
        env={**clean, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
    )


def test_auto_that_finds_nothing_says_what_it_knows_and_what_to_give():
    found = _python(
        "from ldm_scaling.parallel import processes\nprocesses.initialize('auto')"
    ).stderr.splitlines()[-1]
    for part in ("UserError", "TPU", "GKE", "Slurm", "--distributed=HOST:PORT,K,N"):
        assert part in found


@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_do_not_come_are_told_of_in_time(number):
    """Without process 0 there is no one to ask, and process 0 waits for the others."""
    where = f"127.0.0.1:{1 if number else driving.free_port()},{number},2"
    code = (
        "import os\nfrom ldm_scaling.errors import ApartError\n"
        "from ldm_scaling.parallel import processes\n"
        f"try: processes.initialize({where!r}, start_s=2)\n"
        "except ApartError as e: print(e, flush=True)\n"
        "os._exit(76)"
    )
    began = time.monotonic()
    found = _python(code)
    assert time.monotonic() - began < 120 and found.returncode == 76
    for part in ("2 processes at 127.0.0.1:", "did not all come together within 2 s", "start all"):
        assert part in found.stdout, found.stderr[-2000:]


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("busy, alone", [(4, 60), (60, 1)], ids=["looks later", "never looks"])
def test_one_that_fails_ends_those_that_are_busy_with_its_status(failed, busy, alone):
    """Whichever fails: jax would abort the others, after the lead at once, else after long."""
    code = f"""
import sys, time
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import processes
processes._HEARING_S, processes._ALONE_S = 2.5, {alone}
processes._LISTEN_S = 1.0 + 0.7 * int(sys.argv[1].split(",")[1])  # the lead comes first
processes.initialize(sys.argv[1], start_s=120)
processes.barrier("start")
if processes._state().process_id == {failed}:
    processes.leave(2, "the disk is full")
time.sleep({busy})
try: processes.barrier("end")
except UserError as e: print(e, file=sys.stderr); processes.leave(2, str(e))
"""
    address = f"127.0.0.1:{driving.free_port()}"
    began = time.monotonic()
    running = [
        subprocess.Popen([sys.executable, "-c", code, f"{address},{k},2"], text=True,
                         stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        for k in range(2)
    ]
    told = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], told
    assert f"another process stopped: process {failed}: the disk is full" in told[1 - failed]
    assert time.monotonic() - began < 55


def test_alone_nothing_waits():
    assert not processes.several()
    assert processes.from_lead("x", lambda: (1, "a")) == (1, "a")
    with processes.lead_first("x"):
        pass
    processes.barrier("x")
    processes.leave(2, "why")
