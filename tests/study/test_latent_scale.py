"""A workdir keeps the latents' scale, and what a sweep needs: who draws needs neither pictures nor
latents, and what was stopped loses little."""

import types

import numpy as np
import pytest

from ldm_scaling.config import Study
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir


def materials_of(folder, weight, statistics=None):
    """Materials with an autoencoder of one weight; without statistics there are no latents."""
    out = Materials(Study(), Workdir(folder))
    params = {"encoder": {"w": np.full(3, weight, np.float32)}, "decoder": {}}
    parts = {"networks": types.SimpleNamespace(decoder=lambda: params)}
    if statistics is not None:
        parts["caches"] = types.SimpleNamespace(statistics=types.SimpleNamespace(scale=statistics))
    else:
        parts["caches"] = None  # Asking it for anything raises.
    vars(out).update(parts)
    return out


def test_the_scale_is_read_without_latents(tmp_path):
    exact = 1 / 3.7
    assert materials_of(tmp_path, 1.0, exact).latent_scale == exact
    assert materials_of(tmp_path, 1.0).latent_scale == exact


@pytest.mark.parametrize("kept", ["{", "[1]", "3", "", '{"encoder": 1}'])
def test_a_damaged_file_is_made_anew(tmp_path, kept):
    (tmp_path / "latent_scale.json").write_text(kept)
    assert materials_of(tmp_path, 1.0, 0.5).latent_scale == 0.5
    assert materials_of(tmp_path, 1.0).latent_scale == 0.5


def test_a_damaged_scale_is_made_anew(tmp_path):
    assert materials_of(tmp_path, 1.0, 0.5).latent_scale == 0.5
    path = tmp_path / "latent_scale.json"
    path.write_text(path.read_text().replace("0.5", '"0.5"'))
    assert materials_of(tmp_path, 1.0, 0.25).latent_scale == 0.25


def test_another_encoder_has_another_scale(tmp_path):
    assert materials_of(tmp_path, 1.0, 0.5).latent_scale == 0.5
    assert materials_of(tmp_path, 2.0, 0.25).latent_scale == 0.25
    assert materials_of(tmp_path, 2.0).latent_scale == 0.25


def test_what_is_kept_is_made_before_what_is_not(tmp_path):
    """A run that is stopped while it looks at real pictures has its captions' text states."""
    made, found = [], materials_of(tmp_path, 1.0)

    def stopped(*unused):
        raise KeyboardInterrupt

    vars(found).update(
        some=lambda *unused: np.arange(2), count=lambda split: 2, _real_features=stopped,
        _embeddings=lambda split, index_N: made.append(split))
    with pytest.raises(KeyboardInterrupt):
        found._make_reference(None, "", tmp_path, tmp_path)
    assert set(made) == {"train", "validation"}
