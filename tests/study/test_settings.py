"""Members that were fine-tuned, or taught a subject, in two ways in a workdir are never joined."""

import csv
import dataclasses
import types

import pytest

from ldm_scaling import __version__, cli
from ldm_scaling.config import DreamBooth, FineTune, Study, Train
from ldm_scaling.study import curves, places, publish, records, reported
from ldm_scaling.study.dreambooth_scores import SUBJECT, Scores
from ldm_scaling.study.figures import compute, downstream
from ldm_scaling.study.figures.source import Source
from ldm_scaling.study.networks import tuned_hash
from ldm_scaling.study.paired_scorer import LPIPS
from ldm_scaling.study.records import Identity, Record
from ldm_scaling.study.scorer import FRECHET
from ldm_scaling.study.workdir import Workdir

SIZES = {"c8_s16": 1.0, "c12_s16": 2.0, "c16_s16": 3.0}


def _study(**parts):
    return Study(members=tuple(SIZES), reference="c8_s16", **parts)


def _tuned(rate, *budgets):
    run = Train(steps=budgets[-1], learning_rate=rate, warmup_steps=0, caption_dropout=0.0)
    return _study(finetune=FineTune("super_resolution", budgets=budgets, train=run))


def _taught(**values):
    return _study(dreambooth=DreamBooth(subjects="cups", **values))


def _record(study, member, steps, value, told=True):
    """One of a study's fine-tuning or DreamBooth; as earlier versions wrote it unless `told`."""
    part = study.finetune if study.finetune.task else study.dreambooth
    task, metric = ("super_resolution", LPIPS) if study.finetune.task else ("dreambooth", SUBJECT)
    identity = Identity(
        model=member, model_hash=tuned_hash(study, member, part), train_step=steps,
        sampler="ddim", steps=20, spacing="trailing", guidance=1.0, seed_block=1, num_images=48,
        reference_hash="r", version="1",
    )
    return Record(
        identity, 8, int(100 * SIZES[member]), SIZES[member], SIZES[member], 20, {metric: value},
        {metric: (value - 0.1, value + 0.1)}, {metric: [-0.1, 0.0, 0.1]}, 1.0, "cpu", task=task,
        setting=part.setting if told else "",
    )


def _of(study, value, *steps, told=True):
    return [_record(study, m, n, value, told) for m in SIZES for n in steps]


def _workdir(path, study, found):
    home = Workdir(path)
    home.bind(study)
    for r in found:
        records.write(home / "records", r)
    return home


@pytest.mark.parametrize("more", [(960,), (120, 240)], ids=["apart", "alike"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "of earlier versions"])
def test_one_fine_tuning_is_one_curve(tmp_path, capsys, more, told):
    """Whatever lengths they were measured after: of the last config, and told what is left out."""
    last, other = _tuned(1e-3, 120, 240), _tuned(1e-4, *more)
    some = dataclasses.replace(last, members=("c8_s16",))  # The last command may be of one.
    home = _workdir(tmp_path, some, [*_of(last, 0.4, 120, 240, told=told),
                                     *_of(other, 0.7, *more, told=told)])
    found = places.read([str(home.path)])
    assert {r.setting for r in found.records} == {
        last.finetune.setting, other.finetune.setting if told else ""}
    source = Source(found.records, LPIPS, settings=found.settings)
    (drawn,) = compute.fine_tuning(source).values()
    assert {row["value"] for row in drawn.rows} == {0.4} and len(drawn.rows) == 6
    assert cli.main(["figure", "fig4_super", f"--workdir={home.path}"]) in (None, 0)
    said = " ".join(capsys.readouterr().out.split())
    left = other.finetune.setting if told else "one without a name"
    assert f"{last.finetune.setting} (240 steps of training) is used, and not {left}" in said


@pytest.mark.parametrize("steps, values", [(240, {0.5, 0.4}), (120, {0.4})], ids=["more", "again"])
def test_one_fine_tuning_is_one_setting_whatever_the_last_config(tmp_path, steps, values):
    """Records of the same network tell it for those of earlier versions, and of cells that were
    measured again the new ones are taken."""
    tuned = _tuned(1e-3, 120, 240)
    old = _of(tuned, 0.5, 120, told=False)
    new = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, version=__version__))
           for r in _of(tuned, 0.4, steps)]
    home = _workdir(tmp_path, tuned, [*old, *new])
    home.bind(_study())
    found = places.read([str(home.path)])
    assert {r.setting for r in found.records} == {tuned.finetune.setting}
    assert {r.metrics[LPIPS] for r in found.records} == values


def test_a_fine_tuning_is_led_by_what_it_chooses_by(tmp_path):
    """Alone; beside others its study's measure leads."""
    tuned = _tuned(1e-3, 120)
    grid = dataclasses.replace(tuned.finetune.sweep, choose_by=LPIPS)
    last = dataclasses.replace(tuned, finetune=dataclasses.replace(tuned.finetune, sweep=grid))
    restored = [dataclasses.replace(r, metrics={LPIPS: 0.5, FRECHET: 1.0})
                for r in _of(last, 0.5, 120)]
    home = _workdir(tmp_path, last, restored)
    assert places.read([str(home.path)]).metric == LPIPS
    text = dataclasses.replace(restored[0], task=records.TEXT_TO_IMAGE, setting="")
    assert reported.main_metric(home.path, [*restored, text]) == FRECHET
    assert reported.main_metric(home.path, restored) == LPIPS
    for found, metric in ((restored, LPIPS), ([text], FRECHET)):
        materials = types.SimpleNamespace(study=last)
        assert publish._sweep(materials, found).choose_by == metric


def test_of_ways_that_fit_alike_the_one_of_earlier_records_is_left_out(tmp_path, caplog):
    """Restored pictures of several collections, say, whose scorer's hash is another since."""
    tuned = _tuned(1e-3, 120)
    old = _of(tuned, 0.5, 120, told=False)
    new = [dataclasses.replace(r, identity=dataclasses.replace(r.identity, reference_hash="s"))
           for r in _of(tuned, 0.4, 120)]
    for last in (tuned, _study()):
        home = _workdir(tmp_path, tuned, [*old, *new])
        home.bind(last)
        found = places.read([str(home.path)])
        assert [r.metrics[LPIPS] for r in found.records] == [0.4] * 3
    assert "and version 1, that tell their setting, and 3 are left out" in caplog.text
    # Two of which both tell it fit alike.
    both = [*new, *(dataclasses.replace(r, setting=new[0].setting) for r in old)]
    assert len(reported.last_measured(home.path, both)[0]) == 6


def test_a_sweep_that_an_earlier_version_began_is_one():
    """Records keep their names, so a sweep goes on among those that do not tell their setting."""
    study = _tuned(1e-3, 120)
    old, new = (_record(study, "c8_s16", 120, 0.4, told) for told in (False, True))
    assert old.identity.key == new.identity.key


def test_members_taught_in_two_ways_are_not_joined(tmp_path):
    """Whichever hash is the lower of a size; adapters of one rank are told from other ranks."""
    full = _taught()
    for rank in (1, 2, 3, 4):
        lora = _taught(lora_rank=rank)
        both = [*_of(full, 1.0, 1_000), *_of(lora, 2.0, 1_000)]
        for last, value in ((full, 1.0), (lora, 2.0)):
            settings = (last.dreambooth.setting,)
            (drawn,) = downstream.dreambooth(Source(both, SUBJECT, settings=settings)).values()
            assert {row["value"] for row in drawn.rows} == {value} and len(drawn.rows) == 3
        # As those of two workdirs' last configs: two sizes of each.
        apart = [r for r in both if (r.identity.model == "c8_s16") == ("lora" in r.setting)]
        kept = curves.one_setting(apart, (full.dreambooth.setting, lora.dreambooth.setting))
        assert len({r.setting for r in kept}) == 1 and len(kept) == 2
    home = _workdir(tmp_path, lora, [dataclasses.replace(r, setting="") for r in both])
    found = places.read([str(home.path)])
    (drawn,) = downstream.dreambooth(
        Source(found.records, SUBJECT, settings=found.settings)).values()
    assert {row["value"] for row in drawn.rows} == {2.0}


@pytest.mark.parametrize("hashes", ["ab", "ba"])
def test_of_two_sets_of_subjects_the_one_that_was_scored_last_is_shown(tmp_path, capsys, hashes):
    """Taught in one way; whichever hash is the lower. A line says what is left out."""
    study = _taught()
    sets = {
        name: [dataclasses.replace(r, identity=dataclasses.replace(r.identity, reference_hash=name))
               for r in _of(study, value, 1_000)]
        for name, value in zip(hashes, (1.0, 2.0), strict=True)
    }
    home = _workdir(tmp_path, study, [r for own in sets.values() for r in own])
    taught = types.SimpleNamespace(root=home / study.dreambooth.folder)
    for name, other, value in ((*hashes, 1.0), (*hashes[::-1], 2.0)):
        last = Scores(taught, None)
        last.__dict__["reference_hash"] = name
        last.remember()
        assert cli.main(["figure", "fig6", f"--workdir={home.path}"]) in (None, 0)
        assert f"that of scores_{name}.json is used, and not scores_{other}.json" in (
            capsys.readouterr().out)
        rows = (home / "figures" / "fig6_dreambooth.csv").read_text().splitlines()
        assert {row["value"] for row in csv.DictReader(rows)} == {str(value)}
    one = Source(sets["a"], SUBJECT)
    assert downstream.dreambooth(one) and not downstream.other_lessons(one.records)
