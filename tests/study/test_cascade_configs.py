"""Cascades of configs: which networks fit, how pictures are named, and what a run is given."""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import shlex

import numpy as np
import pytest

from ldm_scaling import config as config_lib
from ldm_scaling.config import Cascade
from ldm_scaling.data.cache import Field
from ldm_scaling.data.cached_pairs import CachedPairs
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import further, grids, stages, study_checks
from ldm_scaling.study.cascaded import Cascaded
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import cascade as cascade_task
from ldm_scaling.tasks.drawing import Frozen

ROOT = pathlib.Path(__file__).parents[2]


def checked(tmp_path, name="demo_cascade", arg="", **cascade):
    """The materials of a config with these keys of its cascade, checked as every command does."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    for key, value in cascade.items():
        part, _, last = key.rpartition("__")
        setattr(getattr(config.cascade, part) if part else config.cascade, last, value)
    return study_checks.check(config_lib.parse(config), Workdir(tmp_path), measured=False)


def test_pictures_are_named_by_all_that_draws_the_first_stage(tmp_path, monkeypatch):
    """A grid that another sampler or spacing drew is not given for this one's."""
    monkeypatch.setattr(Cascaded, "sheet", lambda *_: np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(grids, "grid", lambda m, w, p, v, whose, draw, most: (whose, most))
    settings = ({}, {"first_sampler": "heun"}, {"first_spacing": "leading"},
                {"first_steps": (1, 3)}, {"level": 0.2}, {"first_sampler": "ddim"})
    shown, asked = [], []
    for changed in settings:
        materials = checked(tmp_path, arg="tiny", sample__num_images=3, **changed)
        (cascaded,) = further.of(materials)
        shown.append(further.grid(cascaded))
        asked.append(grids.of(cascaded, ("a red apple",), {}))
    for names in (shown, [whose for whose, _ in asked]):
        assert len(set(names)) == 5 and names[0] == names[-1]  # The last is the first, spelt out.
    assert {most for _, most in asked} == {3}  # Of the cascade's sample.
    # Records know them by other means: their setting is what it was.
    assert {c.setting for c in (Cascade(), Cascade(first_sampler="heun", first_spacing="leading"))
            } == {Cascade().setting}


@pytest.mark.parametrize(("name", "cascade", "message"), [
    ("demo_cascade", {"base": ("sit_w40",)}, "cascade.base='sit_w40': a SiT is"),
    ("t2i_866m", {"base": ("uvit_w32_s16",), "factor": 4, "sweep__num_images": 30_000},
     "data.text_length=77: cascade.base: uvit_w32_s16 has places for 18 text tokens"),
    ("demo", {"base": ("c8",), "sweep__num_images": 128, "sweep__feature_side": 96},
     "c8 takes latents of"),
    ("demo_cascade", {"first_sampler": "codi"}, "cascade.first_sampler='codi': it draws with stud"),
])
def test_base_networks_are_checked_as_members_are(tmp_path, name, cascade, message):
    with pytest.raises(UserError, match=message):
        checked(tmp_path, name, **cascade)
    assert not any(tmp_path.iterdir())


def test_text_states_too_wide_for_a_base_network_are_refused_first(tmp_path, monkeypatch):
    """Before anything is trained, and none of the members is to blame."""
    materials = checked(tmp_path, "t2i_866m", base=("c8_s16",), factor=4, sweep__num_images=30_000)
    wide = dataclasses.replace(materials.text_states, width=1024)
    monkeypatch.setitem(materials.__dict__, "text_states", wide)
    with pytest.raises(UserError, match="1024 wide, cascade.base: c8_s16 takes 384"):
        stages.train(materials)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t2i_866m", "t2i_dit_xl2", "t2i_sit_b2"])
def test_the_papers_sizes_take_the_cascades_of_the_docs(tmp_path, name):
    """The command of docs/cascades.md, with what it says of SiT."""
    said = (ROOT / "docs" / "cascades.md").read_text()
    (command,) = re.findall(r"ldm-scaling study --config=configs/t2i_866m\.py.*?\n\n", said, re.S)
    cascade = {key.replace(".", "__"): ast.literal_eval(value) for key, value in (
        word.removeprefix("--config.cascade.").split("=", 1)
        for word in shlex.split(command.replace("\\\n", " ")) if "--config.cascade" in word)}
    assert cascade["base"] == ("39m_s32", "866m_s32")
    if "sit" in name:
        cascade |= dict.fromkeys(("first_spacing", "sample__spacing", "sweep__spacing"), "trailing")
    (cascaded,) = further.of(checked(tmp_path, name, **cascade))
    assert cascaded.small_shape == (32, 32, 4)
    for base in cascaded.config.base:
        paper = zoo.get(base.removesuffix("_s32")).spec
        assert cascaded.base_spec(base) == dataclasses.replace(paper, sample_size=32)


def test_losses_along_the_way_do_not_change_with_the_level_that_is_drawn_with(tmp_path):
    """A run that goes on with another `level` writes into the same curve."""
    found = {"low_mean": np.random.default_rng(0).normal(size=(3, 8, 8, 4)),
             "mean": np.zeros((3, 16, 16, 4)), "context": np.zeros((3, 18, 384), np.float32),
             "index": np.arange(3, dtype=np.int32)}
    given = []
    for level in (0.0, 0.4):
        materials = checked(tmp_path, arg="tiny", level=level)
        decoder = autoencoder_task.spec_of(materials.study.autoencoder)
        frozen = Frozen(decoder, None, 0.5, (16, 16, 4), np.zeros((18, 384), np.float32))
        materials.__dict__.update(frozen=frozen, decode=None)
        cascaded = Cascaded(materials)
        cascaded.__dict__["validation"] = found
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cascade_task, "make", lambda *parts: given.append(parts[7]))
            cascaded.upper_task("c8_s16")
    np.testing.assert_array_equal(given[0]["seen"], given[1]["seen"])
    assert (given[0]["seen"][..., -1] == 0.25).all() and "low_mean" not in given[0]


def test_second_stages_read_text_states_once():
    """The small pictures' pairs mirror as the large ones' do, and read no states."""
    texts, read = np.arange(5), []

    class Cache:
        path, hash = "cache", "1"

        def __init__(self, **arrays):
            self.arrays = arrays
            self.fields = tuple(Field(k, str(v.dtype), v.shape[1:]) for k, v in arrays.items())

        def __len__(self):
            return len(next(iter(self.arrays.values())))

        def batch(self, index):
            read.append(tuple(self.arrays))
            return {name: array[index] for name, array in self.arrays.items()}

    plain, mirrored = (Cache(mean=x, logvar=x) for x in (np.arange(3.0), -np.arange(3.0)))
    whole, light = (
        CachedPairs(plain, Cache(context=texts), np.array([0, 2, 3, 5]), mirrored,
                    np.zeros(5, bool), told=told) for told in (True, False)
    )
    keys = np.arange(64, dtype=np.uint64) * 2**55
    index = np.arange(64) % 3
    both = whole.batch(index, keys)
    read.clear()
    found = light.batch(index, keys)
    assert ("context",) not in read and both.keys() - found.keys() == {"context"}
    for name in found:
        np.testing.assert_array_equal(found[name], both[name])
    assert (found["mean"] < 0).any() and (found["mean"] > 0).any() and light.hash == whole.hash
