"""A folder of caches that several studies share: nothing of one is in another's way."""

from __future__ import annotations

import dataclasses
import functools
import io
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from ldm_scaling.config import Data, Study
from ldm_scaling.data import shards
from ldm_scaling.data.record import Record
from ldm_scaling.models import autoencoder
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import caches, datasets, encoders, resolve
from ldm_scaling.study.workdir import Workdir

SPEC = autoencoder.AutoencoderSpec(8, (1, 1), 1, 4, 4, mid_attention=False)


@functools.cache
def _encoder():
    return encoders.latent_encoder(SPEC, autoencoder.init(SPEC, jax.random.key(0)))


def _record(i):
    rng = np.random.default_rng(i)
    width, height = (48, 32) if i % 2 else (32, 32)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return Record(f"{i}", out.getvalue(), (f"thing {i}",), f"{i}", width, height)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    records = [_record(i) for i in range(12)]
    return shards.write(
        tmp_path_factory.mktemp("shards") / "a", {"train": records, "validation": records[:2]}
    )


def _caches(prepared, folder, least=2, text="text", embedder="embedder", **values):
    data = dataclasses.replace(
        Data(source=f"shards:{prepared.path}", side=16, flip=True, cache=str(folder)), **values
    )
    most = {"train": data.train_pictures, "validation": data.validation_pictures}
    return caches.Caches(
        folder=epath.Path(folder), shared=True, data=data,
        datasets=(datasets.Collected(prepared, data.side, most),), autoencoder=_encoder,
        text=lambda: types.SimpleNamespace(hash=text),
        embedder=lambda: types.SimpleNamespace(hash=embedder), mesh=mesh_lib.make(),
        step=lambda: 4, least=least,
    )


@pytest.mark.parametrize(
    "values",
    [{"side": 32}, {"latent_dtype": "float16"}, {"train_pictures": 8}],
    ids=lambda v: next(iter(v)),
)
def test_square_latents_of_other_settings_lie_beside_each_other(tmp_path, prepared, values):
    one, two = (_caches(prepared, tmp_path, **v) for v in ({}, values))
    first, second = one.latents(0, "train"), two.latents(0, "train")
    assert first.path != second.path and first.hash != second.hash
    again = _caches(prepared, tmp_path, **values).latents(0, "train")
    assert (again.path, again.hash) == (second.path, second.hash)


@pytest.mark.parametrize(
    "values", [{"side": 32}, {"max_aspect": 4.0}, {"least": 7}], ids=lambda v: next(iter(v))
)
def test_latents_in_other_buckets_lie_beside_each_other(tmp_path, prepared, values):
    """A larger batch closes the bucket of 6 wide pictures, so that other pictures are square."""
    settings = {"max_aspect": 2.0}
    one, two = (_caches(prepared, tmp_path, **{**settings, **v}) for v in ({}, values))
    first, second = one.latent_buckets(0), two.latent_buckets(0)
    assert sum(map(len, first.values())) == sum(map(len, second.values())) == 12
    assert not {c.path for c in first.values()} & {c.path for c in second.values()}


def test_mirrored_latents_lie_beside_the_others(tmp_path, prepared):
    found = _caches(prepared, tmp_path)
    assert len({found.latents(0, "train", m).path for m in (False, True)}) == 2


def test_text_states_are_told_apart_by_both_encoders(tmp_path, prepared, monkeypatch):
    folders = []
    monkeypatch.setattr(
        caches.caching, "cache_text", lambda folder, *unused, **options: folders.append(folder)
    )
    for text, embedder in (("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")):
        _caches(prepared, tmp_path, text=text, embedder=embedder).states(0, "validation")
    # What latents are kept in is not their business.
    _caches(prepared, tmp_path, text="a", embedder="x", latent_dtype="float16").states(
        0, "validation")
    assert len(set(folders)) == 3 and folders[0] == folders[3] == folders[4]


def test_a_folder_is_the_same_from_wherever_a_command_is_given(tmp_path, prepared, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Data(source=f"shards:{prepared.path}", side=16, cache="shared")
    study = resolve.resolved(Study(data=data), Workdir(tmp_path / "run"))
    assert study.data.cache == str(tmp_path / "shared")
