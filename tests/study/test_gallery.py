"""Galleries: the plain sampler's pictures, every one under its own labels, pixel for pixel."""

import dataclasses
import functools
import io
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw

from ldm_scaling import config, pictures
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.sampling.sampler import make_sampler
from ldm_scaling.sampling.solvers import SOLVERS
from ldm_scaling.study import gallery, labels, sheet, stages
from ldm_scaling.study import request as request_lib
from ldm_scaling.study.gallery import Gallery
from ldm_scaling.study.request import Request
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks.drawing import Drawer, Frozen, sampling_key

STUDY = config.parse({
    "members": ["c8", "c16"], "reference": "c16",
    "diffusion": {"prediction": "v"},
    "autoencoder": {"base_channels": 4, "channel_mults": [1, 1, 1], "blocks_per_level": 1,
                    "groups": 2, "mid_attention": False},
    "sample": {"sampler": "ddim", "steps": 2, "spacing": "trailing", "guidance": 3.0,
               "num_images": 8},
    "sweep": {"batch_size": 6, "spacing": "trailing"},
})  # fmt: skip
SPEC = unet.UNetSpec(
    4, context_dim=8, channel_mults=(1,), attention_levels=(True,), blocks_per_level=1, heads=2,
    groups=2, sample_size=8, context_length=3,
)  # fmt: skip


def states(prompts):
    """Text states that differ with the text, (P, L, D)."""
    return np.stack([
        np.random.default_rng(list(text.encode())).normal(size=(3, 8)) for text in prompts
    ]).astype(np.float32)  # fmt: skip


class Stub(types.SimpleNamespace):
    """A namespace to hand around by identity, as `Materials` is."""

    __hash__ = object.__hash__


def random_params(init, seed):
    """Random parameters in the shapes of `init`, none of them at its zero start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(leaf.ndim == 1, 0.25, leaf.shape).astype(np.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A study with random networks in place of trained ones."""
    spec = autoencoder_task.spec_of(STUDY.autoencoder)
    mesh = mesh_lib.make(devices=jax.devices()[:2])
    params = random_params(functools.partial(autoencoder.init, spec), 0)
    frozen = Frozen(spec, params, 1.3, (8, 8, 4), states([""])[0])

    def member_params(member):
        return random_params(functools.partial(unet.init, SPEC), STUDY.members.index(member) + 1)

    return Stub(
        study=STUDY, workdir=Workdir(tmp_path_factory.mktemp("gallery")), mesh=mesh,
        spec=lambda member: SPEC, frozen=frozen, decode=frozen.decoder(),
        states=lambda prompts: states(prompts).astype(np.float16),
        networks=Stub(tokens=4, lengths=lambda texts: [len(text.split()) for text in texts]),
        member_params=member_params,
        drawer_of=lambda spec, run, count: Drawer(
            spec, frozen, STUDY.diffusion, count, frozen.decoder(), mesh, run.compute_dtype,
            run.attention,
        ),
        drawer=functools.cache(lambda member: Drawer(
            SPEC, frozen, STUDY.diffusion, 6, frozen.decoder(), mesh
        )),
    )  # fmt: skip


def test_pictures_are_the_plain_samplers(materials):
    wanted = request_lib.of(
        STUDY, ["a red apple", "two dogs"], sampler=["ddpm", "dpmpp_2m"], steps=[2, 3],
        guidance=[2, 4.0], seeds=[0, 7], member=["c16", "c8"],
    )  # fmt: skip
    context_PLD = gallery.text_states(materials, wanted.prompt)
    drawer = gallery._drawer(materials, 6, "c8")  # The members' networks are alike.
    drawn = gallery.draw(materials, wanted, context_PLD, lambda member: drawer)
    assert drawn.images.shape == (2, 2, 2, 2, 2, 2, 32, 32, 3)

    frozen, key = materials.frozen, sampling_key(STUDY.seed)
    plain = make_sampler(unet.denoise_fn(SPEC, np.float32), frozen.latent_shape)
    null = {"context": frozen.null_ctx_LD[None]}
    places = list(itertools.product(range(2), range(2)))
    context = {"context": states([wanted.prompt[p] for p, _ in places]).astype(np.float16)}
    context = {"context": context["context"].astype(np.float32)}
    index_B = np.array([wanted.seeds[p][s] for p, s in places])
    tables = wanted.tables(STUDY)
    for m, a, n, w in itertools.product(range(2), repeat=4):
        table = tables[wanted.sampler[a], wanted.steps[n]].padded(4)
        rate_B = np.full(4, wanted.guidance[w], np.float32)
        params = materials.member_params(wanted.member[m])
        images = drawer.decode(plain(params, table, rate_B, context, null, key, index_B), str)
        assert images.std() > 5
        for image, (p, s) in zip(images, places):
            got = drawn.images[m, p, a, n, w, s].astype(int)
            assert np.abs(got - image).max() <= 1
    assert len({image.tobytes() for image in drawn.images.reshape(-1, 32, 32, 3)}) == 64


def solid(side=32, prompts=("a red apple",), **values):
    """A gallery whose every picture has one colour of its own."""
    defaults = {"member": ("c8",), "sampler": ("ddim",), "steps": (12,), "guidance": (5.0,)}
    seeds = values.pop("seeds", (0,))
    wanted = Request(
        **(defaults | values), prompt=prompts, seeds=(tuple(seeds),) * len(prompts),
        spacing="trailing",
    )  # fmt: skip
    count = np.prod(wanted.shape)
    number = np.arange(count)
    colours = np.stack([200 - number % 128, 40 + number // 128, 255 - number % 7], axis=-1)
    colours = colours.reshape(*wanted.shape, 1, 1, 3)
    images = np.broadcast_to(colours, (*wanted.shape, side, side, 3))
    calls = {key: key[1] for key in itertools.product(wanted.sampler, wanted.steps)}
    return Gallery(wanted, images.astype(np.uint8), calls)


def boxes(drawn):
    """Where each picture lies in the grid, {(m, p, a, n, w, s): (left, top, zoom)}."""
    page, side, out = np.asarray(drawn.picture()), drawn.images.shape[-2], {}
    for place in np.ndindex(drawn.request.shape):
        ys, xs = np.nonzero((page == drawn.images[place][0, 0]).all(-1))
        size = xs.max() + 1 - xs.min()
        assert size == ys.max() + 1 - ys.min() and size % side == 0 and len(xs) == size**2
        out[place] = int(xs.min()), int(ys.min()), int(size // side)
    edge = np.ones(page.shape[:2], bool)
    edge[10:-10, 10:-10] = False
    assert (page[edge] == 255).all()  # Nothing runs out of the picture.
    return out


def assert_axis(found, axis, coordinate):
    """Along the axis the pictures go to the right (0) or down (1), by nothing else."""
    for place, box in found.items():
        following = (*place[:axis], place[axis] + 1, *place[axis + 1 :])
        if following in found:
            assert found[following][coordinate] > box[coordinate]
            assert found[following][1 - coordinate] == box[1 - coordinate]


M, P, A, N, W, S = range(6)
RIGHT, DOWN = 0, 1
LONG = "a very long prompt, with an-endless-word" + "-and-more" * 30 + " and the rest of it" * 20


@pytest.mark.parametrize("values, axes", [
    ({"seeds": range(8)}, {S: RIGHT}),
    ({"prompts": ("a", "b", LONG), "seeds": range(4)}, {P: DOWN, S: RIGHT}),
    ({"steps": (4, 8, 12), "guidance": (1.0, 3.0, 5.0, 7.5)}, {N: DOWN, W: RIGHT}),
    ({"sampler": ("ddim", "dpmpp_2m_sde"), "steps": (4, 8, 12), "seeds": (3, 9)},
     {A: DOWN, N: RIGHT, S: RIGHT}),
    ({"member": ("c8", "c16"), "seeds": range(4)}, {M: DOWN, S: RIGHT}),
    ({"member": ("c8", "c16"), "sampler": ("ddim", "ddpm:final=abar_0"), "steps": (4, 50),
      "guidance": (1.0, 2.0), "prompts": (LONG,)}, {M: DOWN, A: DOWN, N: DOWN, W: RIGHT}),
    ({"sampler": ("ddim", "dpmpp_3m_sde:eta=0.5", "euler_ancestral")}, {A: RIGHT}),
    ({"side": 512, "guidance": (1.0, 3.0), "steps": (4, 8)}, {N: DOWN, W: RIGHT}),
], ids=lambda value: "-".join(map(str, value)) if 0 in value else None)  # fmt: skip
def test_every_picture_stands_at_its_labels(values, axes):
    drawn = solid(**values)
    found = boxes(drawn)
    for axis, coordinate in axes.items():
        assert_axis(found, axis, coordinate)
    side = drawn.images.shape[-2]
    assert all(1 <= zoom and 64 <= zoom * side <= 512 for *_, zoom in found.values())
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("values", [
    {"seeds": range(40)},
    {"prompts": tuple(f"{LONG} {i}" for i in range(16))},
    {"guidance": tuple(map(float, range(1, 9))), "steps": (4, 8), "seeds": range(9)},
])  # fmt: skip
def test_what_is_long_is_broken_into_rows(values):
    drawn = solid(**values)
    found = boxes(drawn)
    assert len(set(found.values())) == len(found)
    assert drawn.picture().width < 2000


@pytest.mark.parametrize("side", [32, 96, 512])
def test_pictures_keep_every_pixel(side):
    drawn = solid(side, steps=(4, 8), guidance=(1.0, 3.0))
    found = boxes(drawn)
    noise = np.random.default_rng(0).integers(0, 256, drawn.images.shape, np.uint8)
    page = np.asarray(dataclasses.replace(drawn, images=noise).picture())
    for place, (x, y, zoom) in found.items():
        part = page[y : y + zoom * side, x : x + zoom * side]
        np.testing.assert_array_equal(part, noise[place].repeat(zoom, 0).repeat(zoom, 1))
        assert zoom == 1 or side == 32


def test_title_says_what_is_fixed_and_what_it_costs():
    about = solid(steps=(4, 8), guidance=(1.0, 3.0), seeds=(0, 1, 2))._sheet().about
    assert about == ("c8 · DDIM · trailing spacing · in each cell the seeds 0 to 2 · "
                     "4 to 8 network calls a picture")  # fmt: skip
    own = solid()
    own = dataclasses.replace(own, request=dataclasses.replace(own.request, spacing=""))
    assert " · its own spacing · " in own._sheet().about
    page = solid(prompts=("a", "b"), sampler=("ddim:eta=0.5",), seeds=(3,))._sheet()
    assert page.title == "2 prompts" and "DDIM with eta 0.5 · 12 steps · guidance 5" in page.about
    assert set(labels.SAMPLERS) >= set(SOLVERS)


def test_signs_are_drawn_by_a_font_that_has_them_or_by_number(tmp_path, monkeypatch):
    own = (sheet._own(True), sheet._own(False))
    sheet._file.cache_clear()
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    font, text = sheet._Font(40, True), "a \u732b and \U0001f34e, \u03b1"
    assert font.spelt(text) == "a [U+732B] and [U+1F34E], \u03b1"

    build, pen, path = FontBuilder(1000), TTGlyphPen(None), str(tmp_path / "square.ttf")
    corners = ((0, 0), (0, 1000), (1000, 1000), (1000, 0))
    pen.moveTo(corners[0])
    for corner in corners[1:]:
        pen.lineTo(corner)
    pen.closePath()
    build.setupGlyphOrder([".notdef", "square"])
    build.setupCharacterMap({0x732B: "square"})
    build.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    build.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    build.setupHorizontalHeader(ascent=1000, descent=0)
    build.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    build.setupOS2()
    build.setupPost()
    build.save(path)
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    fonts = [types.SimpleNamespace(fname=str(f), name="Square") for f in (broken, path)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    sheet._file.cache_clear()
    try:
        assert font.spelt(text) == "a \u732b and [U+1F34E], \u03b1"
        before, after = font.getlength("a "), font.getlength(" b")
        assert font.getlength("a \u732b b") == before + 40 + after
        canvas = Image.new("RGB", (200, 80), "white")
        font.draw(ImageDraw.Draw(canvas), 10, 10, "a \u732b b", "black")
        left = 10 + round(before)
        assert not np.asarray(canvas)[16:46, left + 1 : left + 38].any()  # A black square.
        assert {sheet._file(sign, True) for sign in "ab"} == {own[0]}
    finally:
        sheet._file.cache_clear()


def test_select_and_png():
    drawn = solid(steps=(4, 8), guidance=(1.0, 3.0), seeds=(5, 6, 7))
    part = drawn.select(steps=8, seed=[7, 5])
    assert part.axes == drawn.axes | {"steps": (8,), "seed": (7, 5)}
    np.testing.assert_array_equal(part.images, drawn.images[:, :, :, 1:, :, [2, 0]])
    with Image.open(io.BytesIO(part._repr_png_())) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(part.picture()))
    part = drawn.select(steps=np.int64(4), guidance=jnp.ones(1), seed=np.array(6))
    assert part.axes == drawn.axes | {"steps": (4,), "guidance": (1.0,), "seed": (6,)}
    assert drawn.select(sampler="ddim:eta=0.0").axes == drawn.axes
    with pytest.raises(UserError, match="no sampler is 'ddpm'; there are ddim"):
        drawn.select(sampler="ddpm:final=zero")
    with pytest.raises(UserError, match="no steps is 12; there are 4, 8"):
        drawn.select(steps=12)
    with pytest.raises(UserError, match="no axis is called 'step'; there are member"):
        drawn.select(step=8)


def test_what_is_not_given_comes_from_the_config():
    wanted = request_lib.of(STUDY, "a red apple")
    assert wanted == Request(
        ("c8", "c16"), ("a red apple",), ("ddim",), (2,), (3.0,), (tuple(range(8)),), "trailing"
    )  # fmt: skip
    # num_images is what a grid holds of each network.
    assert request_lib.of(STUDY, ["a", "b"], steps=[2, 3]).shape[-1] == 2
    assert request_lib.of(STUDY, "a", steps=range(1, 20)).shape[-1] == 1
    assert request_lib.of(STUDY, "a", seeds=4).seeds == ((4,),)
    for seeds in (np.arange(2), jnp.arange(2), list(jnp.arange(2)), np.int32([0, 1])):
        assert request_lib.of(STUDY, "a", seeds=seeds).seeds == ((0, 1),)
    assert request_lib.of(STUDY, "a", steps=np.array(3), seeds=0).steps == (3,)
    assert request_lib.of(STUDY, "a", sampler="ddim:eta=0").sampler == ("ddim",)


def test_a_request_says_where_its_samples_begin_in_signal(caplog):
    solvers._say_start.cache_clear()
    request_lib.of(STUDY, "a", steps=1)
    assert not caplog.records
    request_lib.of(STUDY, "a", steps=[1, 4], spacing="leading")
    (record,) = caplog.records
    assert "ddim-leading-ddim-abar_0-1 begins at t=1" in record.getMessage()


def test_a_files_name_is_no_longer_than_file_systems_take():
    many = request_lib.of(
        STUDY, ["\u732b" * 40, "b"], sampler=["ddim", "ddpm", "dpmpp_2m"], guidance=range(2, 9),
        steps=[4, 6, 10, 20, 50, 100], seeds=0,
    )
    assert len(many.name.encode()) <= 200 and many.name.isprintable()
    other = dataclasses.replace(many, seeds=((1,), (1,)))
    assert other.name != many.name and other.name.encode()[:180] == many.name.encode()[:180]
    assert "_w3_seeds-0_c8+c16_" in request_lib.of(STUDY, "a", guidance=3, seeds=0).name


@pytest.mark.parametrize("values, message", [
    ({"steps": [4, 0]}, "sampler ddim, 0 steps.*1 or more"),
    ({"steps": 2000}, "2000 steps"),
    ({"steps": 4.5}, "steps: 4.5 should be a whole number"),
    ({"steps": [4, 8, 4]}, "steps: 4 is given twice"),
    ({"sampler": ["ddim", "dimm"]}, "'dimm'.*did you mean 'ddim'"),
    ({"sampler": ["ddim", "ddim:eta=0.0"]}, "sampler: 'ddim' is given twice"),
    ({"sampler": "ddim:eta=2"}, "sampler ddim:eta=2, 2 steps.*eta"),
    ({"spacing": "trialing"}, "sampler ddim, 2 steps, trialing.*trailing"),
    ({"spacing": "timesteps:999,500,9"}, "2 steps, timesteps:999,500,9"),
    ({"guidance": float("nan")}, "guidance: nan: give a finite number"),
    ({"guidance": "5"}, "guidance: '5' should be a number"),
    ({"seeds": -1}, "seeds: -1: give whole numbers from 0"),
    ({"seeds": []}, "seeds: give at least one"),
    ({"seeds": range(5000)}, "5000 pictures.*ldm-scaling sweep"),
    ({"member": "c9"}, "member: 'c9' .*choose from c8, c16"),
    ({"sampler": "lcm", "steps": 4}, "--sampler=lcm draws with students .*, and c8 is none"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_computed(values, message):
    nothing = types.SimpleNamespace(study=STUDY)  # What is computed would be asked of it.
    with pytest.raises(UserError, match=message):
        stages.sample(nothing, ["a red apple"], **values)


def test_a_notebook_draws_by_no_sampler_of_students(tmp_path):
    Workdir(tmp_path).bind(STUDY)
    with pytest.raises(UserError, match="--sampler=codi:offset=2 draws with students"):
        gallery.sample(tmp_path, "a", sampler=["ddim", "codi:offset=2"], spacing="leading")


def test_lanes_are_as_many_as_stay_busy(materials):
    def lanes(*of, guidance=3.0, devices=2, most=64):
        tables = request_lib.of(STUDY, "a", steps=sorted({steps for steps, _ in of})).tables(STUDY)
        some = [
            Configuration(tables["ddim", steps], guidance, np.arange(samples))
            for steps, samples in of
        ]
        return gallery.lanes(some, devices, most)

    assert lanes((10, 8)) == 8
    assert lanes((10, 9)) == 12
    assert lanes((10, 13)) == 16
    assert lanes((10, 9), most=10) == 10
    assert lanes((10, 100)) == 64
    assert lanes((4, 8), (50, 7)) == 8  # 7 of 50 rows, and 8 of 4 in less than one lane more
    assert lanes((10, 3), devices=8) == 8
    assert {lanes((10, n), devices=6) for n in range(7, 13)} == {12}
    each = [lanes((10, n), devices=1) for n in range(1, 26)]
    assert sorted({*each}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert all(n <= many < 1.42 * n for n, many in enumerate(each, 1))


def test_another_number_of_pictures_is_no_other_program(materials):
    wanted = request_lib.of(STUDY, ["a red apple"], seeds=range(6), member="c8")
    context_PLD = gallery.text_states(materials, wanted.prompt)
    gallery._drawer.cache_clear()
    six, five = (
        gallery.draw(materials, dataclasses.replace(wanted, seeds=(seeds,)), context_PLD)
        for seeds in (range(6), (2, 0, 3, 5, 4))
    )
    assert gallery._drawer.cache_info().misses == 1
    np.testing.assert_array_equal(six.select(seed=[2, 0, 3, 5, 4]).images, five.images)


def test_a_stage_draws_what_is_not_there_yet(materials, monkeypatch):
    drawn = []

    def draw(materials, request, context_PLD, drawer=None):
        drawn.append((request, context_PLD))
        return solid(prompts=request.prompt)

    monkeypatch.setattr(gallery, "require_trained", lambda materials, members: None)
    monkeypatch.setattr(gallery, "draw", draw)
    (path,) = stages.sample(materials, ["a red apple"], steps=[2, 3], seeds=[0, 1], member="c8")
    assert path.startswith(str(materials.workdir / "samples" / "a-red-apple_ddim_2-3steps_trail"))
    assert pictures.load_png(path).std() > 0
    before = open(path, "rb").read()
    assert stages.sample(
        materials, ["a red apple"], steps=(2, 3), seeds=range(2), member=["c8"], guidance=3
    ) == [path]
    assert len(drawn) == 1 and open(path, "rb").read() == before
    others = [
        stages.sample(materials, ["a red apple"], steps=[2, 3], seeds=[0, 1])[0],
        stages.sample(materials, ["a red apple"], steps=[2, 3], seeds=[0, 2], member="c8")[0],
        stages.sample(materials, ["A red apple"], steps=[2, 3], seeds=[0, 1], member="c8")[0],
    ]
    assert len({path, *others}) == 4 == len(drawn)


def test_without_prompts_validation_captions_are_drawn_with_their_own_noise(
    materials, monkeypatch
):
    block = types.SimpleNamespace(
        index_N=np.arange(20, dtype=np.int32) * 3, context_NLD=np.arange(20),
        captions=tuple(f"caption {i // 2}" for i in range(20)),
    )  # fmt: skip
    drawn = []

    def draw(materials, request, context_PLD, drawer=None):
        drawn.append((request, context_PLD))
        return solid(prompts=request.prompt)

    monkeypatch.setattr(gallery, "require_trained", lambda materials, members: None)
    monkeypatch.setattr(gallery, "draw", draw)
    monkeypatch.setattr(materials, "prompts", lambda number: block, raising=False)
    (path,) = stages.sample(materials)
    request, context = drawn[-1]
    assert request.prompt == block.captions[:8] and list(context) == list(range(8))
    assert request.seeds == tuple((3 * i,) for i in range(8))
    assert "validation" in path
    stages.sample(materials, steps=3, seeds=[1, 2])
    assert drawn[-1][0].seeds == ((1, 2),) * 8


def test_a_notebook_keeps_compiled_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        with pytest.raises(UserError, match="study.json is not there"):
            gallery.sample(tmp_path / "none", "a")
        kept = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert kept.startswith(str(tmp_path / "ldm_scaling/compiled"))


def test_a_prompt_that_is_cut_is_said(materials, capsys, caplog):
    caplog.set_level("INFO")
    gallery.text_states(materials, ["a red apple", "a very red apple", "a very red apple pie"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "ldm-scaling: prompt 'a very red apple pie' has 5 tokens, and its end is not seen: "
        "data.text_length is 4")  # fmt: skip
    assert line.endswith(caplog.messages[-1])  # The log has it too.


def test_small_networks_stay_loaded_and_large_ones_do_not(monkeypatch):
    """A notebook that compares sizes asks for all of them again and again."""
    loaded = []

    def member_params(member):
        loaded.append(member)
        return {"w": np.zeros(4, np.float32)}

    materials = Stub(member_params=member_params)
    monkeypatch.setattr(gallery, "_kept", {})
    for most, expected in ((32, ["a", "b"]), (31, ["a", "b"] * 3), (1, ["a", "b"] * 3)):
        gallery._kept.clear()
        loaded.clear()
        monkeypatch.setattr(gallery, "_KEPT_BYTES", most)
        for member in ("a", "b") * 3:
            gallery._params(materials, member)
        assert loaded == expected
    gallery._params(materials, "b")  # The last one stays, whatever its size.
    assert loaded == ["a", "b"] * 3
