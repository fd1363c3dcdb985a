"""Data sets that TFDS itself wrote: found by folder or name, read by split and feature."""

import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ldm_scaling.data import sources
from ldm_scaling.data.composed import builder
from ldm_scaling.errors import UserError
from tests.data.sources import made

F = tfds.features


class Coco(tfds.core.GeneratorBasedBuilder):
    """The features of TFDS's `coco_captions`."""

    name = "coco_captions"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]
    url_infos = None
    features = {
        "image": F.Image(encoding_format="png"), "image/filename": F.Text(), "image/id": np.int64,
        "captions": F.Sequence({"id": np.int64, "text": F.Text()}),
        "objects": F.Sequence({"bbox": F.BBoxFeature(), "label": F.ClassLabel(num_classes=3)}),
    }  # fmt: skip
    counts = {"train": 11, "val": 4}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=F.FeaturesDict(self.features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.counts}

    def _generate_examples(self, split):
        for i in range(self.counts[split]):
            yield i, self.example(100 * (split == "val") + i)

    def example(self, i):
        captions = [{"id": k, "text": f" {i} über {k}\n"} for k in range(i % 3)]
        return {"image": made.image(i), "image/filename": f"{i}.jpg", "image/id": i,
                "captions": captions, "objects": []}  # fmt: skip


class Div2k(Coco):
    """The features of TFDS's `div2k`: two images and no caption."""

    name = "div2k"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("bicubic_x2", "bicubic_x4")]
    features = {"lr": F.Image(encoding_format="png"), "hr": F.Image(encoding_format="png")}

    def example(self, i):
        return {"hr": made.image(i), "lr": made.image(1000 + i)}


class Shards(Coco):
    """The features of this project's own prepared shards."""

    name = "prepared"
    BUILDER_CONFIGS = []
    features = {
        "key": F.Text(), "image": F.Image(encoding_format="png"), "captions": F.Sequence(F.Text()),
        "group": F.Text(), "width": np.int32, "height": np.int32, "aesthetic": np.float32,
        "watermark": np.float32,
    }  # fmt: skip

    def example(self, i):
        return {"key": f"a/{i} ü", "image": made.image(i), "captions": [f"{i}", "x"], "group": "g",
                "width": 5, "height": 4, "aesthetic": i / 4, "watermark": np.nan}  # fmt: skip


class Words(Coco):
    """No image."""

    name = "words"
    BUILDER_CONFIGS = []
    features = {"text": F.Text()}

    def example(self, i):
        return {"text": "x"}


def write(made_by, root, form="array_record", **config):
    found = made_by(data_dir=str(root), file_format=form, **config)
    found.download_and_prepare(download_config=tfds.download.DownloadConfig(
        try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP,
    ))  # fmt: skip
    return found.data_path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    write(Coco, root, config="2014")
    write(Div2k, root, config="bicubic_x2")
    write(Div2k, root, config="bicubic_x4")
    write(Shards, root)
    write(Words, root)
    return root


def captions(i):
    return tuple(f"{i} über {k}" for k in range(i % 3))


@pytest.mark.parametrize("text, numbers", [
    ("tfds:coco_captions@ROOT", [*range(11), *range(100, 104)]),
    ("tfds:coco_captions/2014:val@ROOT", range(100, 104)),
    ("tfds:coco_captions/2014/1.1.0:train[2:5]+val[-1:]@ROOT", [2, 3, 4, 103]),
    ("arrayrecord:ROOT/coco_captions", [*range(11), *range(100, 104)]),
    ("arrayrecord:ROOT/coco_captions/2014/1.1.0#train", range(11)),
])  # fmt: skip
def test_captions_within_features(root, text, numbers):
    pairs = made.read(text.replace("ROOT", str(root)), part_size=3)
    assert [pair.image for pair in pairs] == [made.image(i) for i in numbers]
    assert [pair.captions for pair in pairs] == [captions(i) for i in numbers]


def test_the_default_folder(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    with pytest.raises(UserError, match="no feature of captions: .*captions=False; there are "):
        sources.collection("tfds:div2k/bicubic_x4:val").parts()
    pairs = made.read("tfds:div2k/bicubic_x4:val", captions=False)
    assert [pair.image for pair in pairs] == [made.image(i) for i in range(100, 104)]
    assert not any(pair.captions for pair in pairs)


def test_prepared_shards_keep_their_keys(root):
    pairs = made.read(f"arrayrecord:{root}/prepared#train")
    assert [pair.key for pair in pairs] == [f"a/{i} ü" for i in range(11)]
    assert {pair.group for pair in pairs} == {"g"}
    assert [pair.scores for pair in pairs] == [{"aesthetic": i / 4} for i in range(11)]
    assert pairs[3].captions == ("3", "x")


def test_our_own_builder(tmp_path):
    spec = builder.ComposedSpec(side=16, train=20, validation=5)
    prepared = builder.prepare(tmp_path, spec)
    pairs = made.read(f"tfds:openmoji_composed:validation@{tmp_path}", part_size=2)
    source = prepared.builder.as_data_source(
        "validation", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert [(p.image, p.captions, p.group) for p in pairs] == [
        (r["image"], (r["caption"].decode(),), r["concept"].decode()) for r in source
    ]


@pytest.mark.parametrize("text, words", [
    ("tfds:div2k@ROOT", "2 configs, name one: div2k/bicubic_x2, div2k/bicubic_x4"),
    ("tfds:coco_captions:dev@ROOT", "no split 'dev' in .*it has train, val"),
    ("tfds:coco_captions:train[@ROOT", "no split"),
    ("tfds:flickr30k/x@ROOT", "tfds build flickr30k/x --file_format=array_record"),
    ("arrayrecord:ROOT", "5 data sets, name one: coco_captions"),
    ("arrayrecord:ROOT/words", "no feature of images: there are text"),
])  # fmt: skip
def test_what_is_not_there(root, text, words):
    with pytest.raises(UserError, match=words):
        sources.collection(text.replace("ROOT", str(root))).parts()


def test_another_format(root, tmp_path):
    """As a set that was made without array_record says of itself."""
    copy = shutil.copytree(root / "prepared/1.1.0", tmp_path / "x/1.1.0")
    info = (copy / "dataset_info.json").read_text()
    (copy / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is tfrecord: convert"):
        made.read(f"arrayrecord:{copy}")


@pytest.mark.parametrize("change, words", [
    (lambda d: next(d.glob("*train*")).unlink(), "is not there.*11 records"),
    (lambda d: next(d.glob("*train*")).write_bytes(b""), "array_record-00000-of-00001"),
    (lambda d: shutil.copy(next(d.glob("*val*")), next(d.glob("*train*"))), "holds 4 records"),
    (lambda d: (d / "dataset_info.json").write_text("{"), "cannot read the data set in"),
    (lambda d: (d / "dataset_info.json").write_bytes(b"\xff"), "cannot read the data set in"),
    (lambda d: (d / "features.json").write_text("[]"), "cannot read the data set in"),
    (lambda d: (d / "features.json").unlink(), "cannot read the data set in"),
])  # fmt: skip
def test_a_damaged_set(root, tmp_path, change, words):
    copy = shutil.copytree(root / "prepared/1.1.0", tmp_path / "x/1.1.0")
    change(copy)
    with pytest.raises(UserError, match=words) as e:
        collection = sources.collection(f"arrayrecord:{copy}#train")
        [pair for part in collection.parts() for pair in collection.read(part)]
    assert "\n" not in str(e.value)


def test_a_damaged_record_is_one_pairs_error(root, tmp_path):
    copy = shutil.copytree(root / "prepared/1.1.0", tmp_path / "x/1.1.0")
    text = f"arrayrecord:{copy}#train"
    whole = made.read(text)
    path = next(copy.glob("*train*"))
    content = bytearray(path.read_bytes())
    at = content.find(made.image(5)) + 30
    content[at] ^= 255
    path.write_bytes(content)
    pairs = made.read(text)
    assert len(pairs) == len(whole)
    wrong = [i for i, pair in enumerate(pairs) if pair.error]
    assert 5 in wrong and [p for p in pairs if not p.error] == [
        p for i, p in enumerate(whole) if i not in wrong
    ]
    assert all(str(path) in pairs[i].error for i in wrong)


def test_the_list_of_files_does_not_travel(root):
    collection = sources.collection(f"tfds:coco_captions@{root}")
    before = len(pickle.dumps(collection))
    collection.parts()
    assert len(pickle.dumps(collection)) == before
