"""The sweep's plan: blocks share no prompt, every cell is planned once, and a network is timed once
whenever its records are made."""

import dataclasses
import functools
import json
import logging
import math
import types

import numpy as np
import pytest

from ldm_scaling.config import Data, Study, Sweep
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.models.cost import Cost
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration, split
from ldm_scaling.study import records, row_times, stages, sweep
from ldm_scaling.study import subject as subject_lib
from tests.study import fake_records

STUDY = Study(
    members=("c8", "c16"), reference="c16", data=Data(validation_pictures=100),
    sweep=Sweep(steps=(2, 20, 50), guidance=(1.0, 3.0), num_images=40, batch_size=20),
)


def test_blocks_are_disjoint_and_fixed():
    a, b = (sweep.block_indices(block, 40, 100, seed=0) for block in (0, 1))
    assert len(set(a) | set(b)) == 80
    np.testing.assert_array_equal(a, sweep.block_indices(0, 40, 100, seed=0))
    assert set(a) != set(sweep.block_indices(0, 40, 100, seed=1))


def test_selection_is_the_whole_grid_under_the_step_limits():
    found = subject_lib.selection(subject_lib.of_member(STUDY, "c8"), "r")
    assert len({i.key for i in found}) == len(found) == (3 + 3 + 2) * 2
    assert not [i for i in found if i.sampler == "dpmpp_2m" and i.steps > 20]
    assert {i.seed_block for i in found} == {0}
    planned = subject_lib.planned(subject_lib.of_member(STUDY, "c8"))
    assert len(planned) == len(found) + 8


def test_a_sampler_with_options_has_one_name_and_its_kinds_limit():
    names = ("ddim:final=zero,eta=0.50", "ddim:eta=0", "dpmpp_2m:solver_type=heun")
    study = dataclasses.replace(STUDY, sweep=dataclasses.replace(STUDY.sweep, samplers=names))
    found = subject_lib.selection(subject_lib.of_member(study, "c8"), "r")
    assert {i.sampler for i in found} == {
        "ddim:eta=0.5,final=zero", "ddim", "dpmpp_2m:solver_type=heun"
    }
    assert max(i.steps for i in found if i.sampler.startswith("dpmpp_2m")) == 20
    assert subject_lib.most_steps(study.sweep, "ddim:eta=0.3") == math.inf


def test_work_counts_calls_and_evaluations():
    """Heun calls the network 2N - 1 times; guidance evaluates it twice, but for a network that is
    told its rate."""
    subject = subject_lib.of_member(STUDY, "c8")
    base, told = subject_lib.selection(subject, "r")[0], dataclasses.replace(subject, told=True)
    cost = Cost(params=1, gflops=2.0)
    for sampler, guidance, evaluations in (("ddim", 1.0, 5), ("ddim", 2.0, 10), ("heun", 1.0, 9)):
        identity = dataclasses.replace(base, sampler=sampler, guidance=guidance, steps=5)
        assert subject_lib.work(subject, cost, identity) == (evaluations + 1) * 2.0 * 40
        once = evaluations if guidance == 1 else evaluations / 2
        assert subject_lib.work(told, cost, identity) == (once + 1) * 2.0 * 40


def test_identity_follows_what_decides_numbers():
    def keys(study):
        return {i.key for i in subject_lib.selection(subject_lib.of_member(study, "c8"), "r")}

    assert keys(STUDY) == keys(dataclasses.replace(STUDY, name="other", members=("c8",)))
    longer = dataclasses.replace(STUDY.train, steps=20_000)
    for other in (
        dataclasses.replace(STUDY, seed=1), dataclasses.replace(STUDY, train=longer),
        dataclasses.replace(STUDY, data=dataclasses.replace(STUDY.data, seed=1)),
    ):
        assert not keys(STUDY) & keys(other)
    other = subject_lib.selection(subject_lib.of_member(STUDY, "c8"), "another reference")
    assert not keys(STUDY) & {i.key for i in other}


def test_record_round_trip_and_damage(tmp_path):
    record = fake_records.make()[0]
    records.write(tmp_path, record)
    path = records.path_of(tmp_path, record.identity.key)
    assert records.read_all(tmp_path) == [record]
    text = path.read_text()
    for broken in ("", "[]", text[:-40], text.replace('"steps"', '"stepz"'),
                   text.replace(record.identity.model, "c9")):
        path.write_text(broken)
        with pytest.raises(UserError, match="is damaged.*restore .* or delete .*sweep "):
            records.read(path)


def test_value_that_is_not_finite_is_not_written(tmp_path):
    record = fake_records.make()[0]
    bad = dataclasses.replace(record, metrics={"fd_effnetlite0": float("nan")})
    with pytest.raises(UserError, match="fd_effnetlite0 .* is nan"):
        records.write(tmp_path, bad)
    assert records.read_all(tmp_path) == []


def test_work_is_shared_out_whole_and_evenly():
    """Each piece once; no part has more than another by more than the largest piece."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 7):
        work = rng.exponential(size=20).tolist()
        parts = sweep.shared(work, count)
        assert len(parts) == count and sorted(sum(parts, [])) == list(range(20))
        sums = [sum(work[n] for n in part) for part in parts]
        assert max(sums) - min(sums) <= max(work)
    assert sweep.shared([1.0], 3) == [[0], [], []]


class _Clock:
    """A drawer that is slower each time that it is timed, as on a machine that gets busier."""

    batch_size, program = 4, {}
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind="chip")]))
    split = staticmethod(split)

    def __init__(self, times):
        self.times = times

    def seconds(self, params, configuration, *_):
        self.times.append(configuration.table.calls)
        return float(len(self.times)), 0.5


def _timed(workdir, steps, times, task="text_to_image", kind="chip", sampler="ddim"):
    """Seconds per image of a sampler's configurations, unguided and guided, of a run of its own."""
    drawer = _Clock(times)
    drawer.mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(device_kind=kind)]))
    bench = types.SimpleNamespace(
        spec=zoo.get("c8").spec, drawer=drawer, params=None, directory=workdir / "records",
        seconds={})
    block = types.SimpleNamespace(context_NLD=None, condition_NHWC=None)
    table = functools.partial(
        solvers.make, sampler, schedule_lib.get("sd"), prediction="v", spacing="trailing")
    some = [Configuration(table(steps=n), w, np.arange(4)) for n in steps for w in (1.0, 2.0)]
    subject = dataclasses.replace(subject_lib.of_member(STUDY, "c8"), task=task)
    return sweep._seconds(subject, bench, some, block, None)


def test_a_sweep_that_is_widened_keeps_its_networks_times(tmp_path, caplog):
    """Killed and started again under another load, all records are of one measurement."""
    times = []
    assert _timed(tmp_path, (2, 10), times) == [2.5, 4.5, 10.5, 20.5] and times == [10, 10]
    assert _timed(tmp_path, (50,), times) == [50.5, 100.5] and len(times) == 2
    # Another task, and another device, is another program.
    assert _timed(tmp_path, (2,), times, task="consistency") == [6.5, 8.5]
    assert _timed(tmp_path, (2,), times, kind="other") == [10.5, 12.5]
    files = sorted((tmp_path / row_times.FOLDER).iterdir())
    assert len(files) == 6 and not caplog.records
    assert {json.loads(f.read_text())["program"]["device"] for f in files} == {
        "1 x chip", "1 x other"}
    # What is damaged is measured anew, and said.
    for damage in ("", "[]", '{"seconds": {"row": -1, "picture": 0.5}}', '{"seconds": {"row": 1}}'):
        for f in files:
            f.write_text(damage)
        before = len(times)
        with caplog.at_level(logging.WARNING):
            _timed(tmp_path, (2,), times)
        assert len(times) == before + 2
        assert sum("measured anew" in r.getMessage() for r in caplog.records) == 2
        caplog.clear()
    assert _timed(tmp_path, (2,), times) and len(times) == before + 2


def test_rows_of_an_interval_cost_what_they_evaluate(tmp_path):
    """4 of 6 calls are pairs: rows of both kinds are timed, each as if all were so."""
    spec, times = "ddim:guidance_high=4.0,guidance_low=0.3", []
    limited, plain = _timed(tmp_path, (6,), times, sampler=spec)[::-1]
    assert (plain, limited) == (6 * 1.0 + 0.5, 4 * 2.0 + 2 * 1.0 + 0.5) and len(times) == 2
    # They are the times of the programs that all other tables have.
    assert _timed(tmp_path, (6,), times) == [6.5, 12.5] and len(times) == 2


def test_of_processes_that_time_at_once_the_first_counts(tmp_path):
    def late():
        row_times.kept(tmp_path, {"a": 1}, lambda: (1.0, 0.0))
        return 2.0, 0.0

    assert row_times.kept(tmp_path, {"a": 1}, late) == (1.0, 0.0)


def test_records_that_were_counted_on_other_captions_are_counted_anew(tmp_path):
    """Their costs alone, of one network, those of a cascade's first stage too; what fits is not
    written again."""
    record = dataclasses.replace(fake_records.make()[0], gflops=0.5, norm_cost=0.4)
    another = dataclasses.replace(
        record, identity=dataclasses.replace(record.identity, model_hash="another"))
    i = record.identity
    subject = types.SimpleNamespace(model=i.model, hash=i.model_hash, first=None)
    args = (Cost(1, 2.0), Cost(1, 8.0), tmp_path)
    assert subject_lib.recount([record, another], subject, *args) == 1
    (made,) = records.read_all(tmp_path)
    assert made == dataclasses.replace(record, gflops=2.0, norm_cost=0.25)
    assert subject_lib.recount([made], subject, *args) == 0
    subject.first = records.First("c8", "ddim", 2, "trailing", 1.0, 0.1, 0.25, 0.2, 2)
    made = dataclasses.replace(
        made, first=dataclasses.replace(subject.first, gflops=0.3, norm_cost=0.1),
        identity=dataclasses.replace(i, first=subject.first.spelling))
    assert subject_lib.recount([made, record], subject, *args) == 1
    assert dataclasses.replace(made, first=subject.first) in records.read_all(tmp_path)


def test_first_stages_that_were_counted_on_other_captions_are_counted_anew(tmp_path):
    """Also where the second stage takes captions of the study's length."""
    upper = dataclasses.replace(zoo.get("c8").spec, context_length=12)
    first = records.First("c8", "ddim", 2, "trailing", 1.0, 0.1, 0.25, 0.2, 2)
    subject = dataclasses.replace(
        subject_lib.of_member(STUDY, "c8"), task=records.CASCADE, first=first)
    own = types.SimpleNamespace(
        workdir=tmp_path, study=STUDY, spec=lambda member: upper, cost=lambda spec: Cost(1, 2.0),
        networks=types.SimpleNamespace(tokens=12))
    assert zoo.get("c8").spec.context_length != 12
    selects = subject_lib.selection(subject, "r")
    for i in (*selects, *(dataclasses.replace(i, seed_block=1) for i in selects)):
        records.write(tmp_path / "records", dataclasses.replace(
            fake_records.make()[0], identity=i, gflops=2.0, norm_cost=0.25, task=records.CASCADE,
            first=dataclasses.replace(first, gflops=0.5, norm_cost=0.4)))
    stages._measure(own, [subject], "r", None, lambda subject: upper, Cost(1, 8.0))
    assert {r.first for r in records.read_all(tmp_path / "records")} == {first}
