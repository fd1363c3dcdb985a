"""The plan of a job: remedies in order by a compiler that is told what fits, keys that launchers
read, a family that goes on where it was; and one network by the TPU's own compiler."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ldm_scaling import cli, config, recipes
from ldm_scaling.config import DreamBooth
from ldm_scaling.errors import UserError
from ldm_scaling.models import attention
from ldm_scaling.parallel import aot, aot_tpu, chips, collectives, hlo
from ldm_scaling.study import plan, plan_family, plan_parts, plan_remedies, plan_show
from ldm_scaling.study.plan import Target

ROOT = Path(__file__).parents[2]
KEYS = {
    "member", "topology", "num_slices", "kind", "batch", "fits", "hbm_gb", "hbm_capacity_gb",
    "seconds_per_step_bound", "days_bound", "mesh", "remedies", "compile_seconds", "versions",
}  # fmt: skip
TARGET = Target("v5e:2x4")


@pytest.fixture
def devices(monkeypatch):
    """Eight CPU devices that pass for v5e chips."""
    monkeypatch.setattr(chips, "by_kind", lambda kind: chips.by_name("v5e"))
    return jax.devices()[:8]


def _study(**train):
    study = config.parse(recipes.text_to_image("39m", "local"))
    mesh = dataclasses.replace(study.mesh, data=8, fsdp=1)
    train = dataclasses.replace(study.train, **{"batch_size": 64, **train})
    return dataclasses.replace(study, mesh=mesh, train=train)


def _program(seconds=0.5, flops=1e9, total=8e9):
    size = int(total / 4)
    return aot.Program(
        memory=aot.Memory(size, size, size, size),
        work=aot.Work(flops, 1e9, seconds, 2e9, 0.0),
        counted=(flops, 1e9, seconds), unpriced=0, loop_factors=(1.0, 1.0), unknown_loops=0,
        collectives=(collectives.Collective("all-gather", 3, 4e9, 8, 3.5e9, 0.0),),
        kernels=(("splash_mha_fwd", 2, 1e6, 1e5),), uncounted=(), lower_seconds=1.0,
        compile_seconds=2.0,
    )  # fmt: skip


class FakeCompiler:
    """Says that nothing fits until it has been asked so many times."""

    def __init__(self, fits_at):
        self.fits_at, self.parts = fits_at, []

    def __call__(self, part):
        self.parts.append(part)
        if len(self.parts) < self.fits_at:
            raise aot.DoesNotFit("Used 20.50G of 15.75G hbm", lowered=f"program {len(self.parts)}")
        return dataclasses.replace(_program(), lowered="that fits")


def _make(study, devices, fits_at, kind="train"):
    compiler = FakeCompiler(fits_at)
    return plan.make(study, "c8", TARGET, kind, devices, compiler), compiler


def test_remedies_are_tried_in_order_and_the_one_that_helps_is_told(devices, monkeypatch):
    study = _study(attention="plain")
    part = plan_parts.build(study, "c8", devices, "train")
    # Traced once: what is tried, not what it makes of the program, is looked at.
    monkeypatch.setattr(plan_parts, "build", lambda *args: part)
    body, compiler = _make(study, devices, fits_at=99)
    names = [row["remedy"] for row in body["tried"]]
    assert names == [
        None, "attention kernel", "remat policy", "fsdp axis", "gradient accumulation",
        "gradient accumulation", "gradient accumulation", "optimiser dtype",
    ]  # fmt: skip
    assert not body["fits"] and body["remedies"] == [] and body["seconds_per_step_bound"] is None
    assert body["hbm_gb"] == pytest.approx(20.5 * 2**30 / 1e9)
    assert len(compiler.parts) == 8

    for fits_at, flags in (
        (2, ["--config.train.attention=splash"]),
        (3, ["--config.train.attention=splash", "--config.train.remat=block"]),
        (6, ["--config.train.attention=splash", "--config.train.remat=block",
             "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.mesh.tensor=1",
             "--config.train.micro_batches=4"]),
    ):  # fmt: skip
        body, compiler = _make(study, devices, fits_at)
        assert body["fits"] and body["remedies"] == flags
        assert body["tried"][-1]["fits"] and body["tried"][-1]["seconds_per_step_bound"] == 0.5
        text = plan_show.text([body])
        assert body["tried"][-1]["remedy"] in text and flags[-1] in text


@pytest.mark.parametrize("kind", ["train", "sample"])
def test_of_programs_that_a_plan_names_it_tells_what_was_compiled(kind, devices):
    """The same plan comes of it without a compiler; but by the same reader alone."""
    sizes = (("all-gather", 3, 1e9 / 7), ("all-gather", 7, 5.1), ("all-reduce", 1, 0.3))
    program = dataclasses.replace(
        _program(), lowered="that fits", memory=aot.Memory(123457, 10001, 7, 3**15),
        work=aot.Work(1e9 / 3, 1e9 / 7, 0.3, *(
            sum(part * times * size for _, times, size in sizes) for part in (0.6, 0.1))),
        collectives=tuple(
            collectives.Collective(name, times, size, 8, 0.7 * size, 0.1 * size)
            for name, times, size in sizes),
        kernels=(("splash_mha_fwd", 2, 1e6 / 3, 0.1), ("splash_mha_fwd", 1, 0.7, 1e5 / 3)),
    )

    def make(*came):
        came = iter(came)

        def compile(part):
            if isinstance(found := next(came), Exception):
                raise found
            return found

        body = plan.make(_study(), "c8", TARGET, kind, devices, compile)
        return body, [*map(body["roofline_seconds"].pop, ("links", "network"))]

    too_large = aot.DoesNotFit("Used 20.50G of 15.75G hbm", lowered="too large")
    first, sent = make(too_large, program)
    read = json.loads(json.dumps(first))
    assert [*(known := plan.known(read, TARGET))] == ["too large", "that fits"]
    again, sent_again = make(*known.values())
    assert sent_again == pytest.approx(sent, rel=1e-14)  # Sums come in another order.
    assert again == first and again["program"] == "that fits"
    assert plan.known(read | {"reader": "another"}, TARGET) == {} == plan.known(None, TARGET)
    del read["reader"]  # As plans of earlier versions.
    assert plan.known(read, TARGET) == {}


def test_what_is_done_already_is_no_remedy(devices):
    study = _study(remat="block", moment_dtype="bfloat16", micro_batches=8)
    study = dataclasses.replace(study, mesh=dataclasses.replace(study.mesh, data=1, fsdp=-1))
    assert list(plan_remedies.of(study, "train", devices)) == []
    body, _ = _make(study, devices, fits_at=1)
    assert body["fits"] and body["tried"] == []


def test_each_remedy_takes_memory_from_the_arguments_or_the_step(devices):
    """Shards and the optimiser's type change what a chip holds by what they say."""
    study = _study()
    base = plan_parts.build(study, "c8", devices, "train").held
    assert base["average"] == base["parameters"]
    assert base["optimiser"] == pytest.approx(2 * base["parameters"], rel=1e-3)
    by_name = {r.name: r.study for r in plan_remedies.of(study, "train", devices)}
    sharded = plan_parts.build(by_name["fsdp axis"], "c8", devices, "train").held
    assert sharded["parameters"] < 0.3 * base["parameters"]
    tracked = plan_parts.build(_study(averages=(0.05, 0.1)), "c8", devices, "train").held
    assert tracked == base | {"other averages": 3 * base["average"]}
    small = plan_parts.build(by_name["optimiser dtype"], "c8", devices, "train").held
    assert small["optimiser"] == pytest.approx(1.5 * small["parameters"], rel=1e-2)


def test_fewer_lanes_where_sampling_does_not_fit(devices):
    body, compiler = _make(_study(), devices, fits_at=2, kind="sample")
    assert body["remedies"] == ["--config.sweep.batch_size=8"]
    assert [part.examples for part in compiler.parts] == [16, 8]
    assert list(plan_remedies.of(_study(), "encode", devices)) == []


def test_a_distillation_holds_its_teacher_once_in_shards(devices):
    """As the student's parameters, which are cut as it is; CoDi's own step needs none. What makes
    it fit is said of the distillation's run."""
    def study(method):
        given = recipes.distilled(method, "39m,local")
        small = config.parse(given)
        part = small.distillations[0]
        run = dataclasses.replace(part.train, batch_size=64)
        part = dataclasses.replace(part, train=run, imitation=run)
        mesh = dataclasses.replace(small.mesh, data=1, fsdp=8)
        return dataclasses.replace(small, mesh=mesh, **{part.NAME: part})

    held = {}
    for method, kind in (("codi", "distill"), ("codi", "distill:imitation"), ("lcm", "distill")):
        own = study(method)
        own = dataclasses.replace(own, train=plan_parts.run_of(own, kind)[1])
        part = plan_parts.build(own, "c8", devices, kind)
        held[method, kind] = part.held
        assert part.examples == 64 and part.kind == kind
    assert held["codi", "distill"]["teacher"] == 0
    for key in (("codi", "distill:imitation"), ("lcm", "distill")):
        assert held[key]["teacher"] == pytest.approx(held[key]["average"], rel=0.05) != 0
    body, compiler = _make(study("lcm"), devices, fits_at=2, kind="distill")
    assert body["remedies"] == ["--config.consistency.train.remat=block"]
    assert body["batch"] == 64 and body["steps"] == 4
    body, _ = _make(study("codi"), devices, fits_at=2, kind="distill:imitation")
    assert body["remedies"] == ["--config.consistency.imitation.remat=block"]
    assert plan.with_batch(study("lcm"), "distill", 16).consistency.train.batch_size == 16
    for wrong, message in ((_study(), "distils nothing"), (study("lcm"), "no such stage")):
        with pytest.raises(UserError, match=message):
            plan_parts.stage_of(wrong, "distill:s16")


@pytest.mark.parametrize("task, channels", [("super_resolution", 8), ("inpainting", 9)])
def test_fine_tuning_is_its_own_run_with_the_encoder_in_its_step(task, channels, devices):
    study = config.parse(recipes.conditioned(task, "39m,local"))
    mesh = dataclasses.replace(study.mesh, data=8, fsdp=1)
    tune = dataclasses.replace(study.finetune, pretrained="elsewhere")
    study = dataclasses.replace(study, mesh=mesh, finetune=tune)
    seen = []

    def compile(part):
        part.program.lower(*part.args)
        seen.append(part)
        return _program()

    body = plan.make(study, "c8", TARGET, "finetune", devices, compile)
    (part,) = seen
    shapes = {jax.tree_util.keystr(k): v.shape
              for k, v in jax.tree_util.tree_leaves_with_path(part.args[0].params)}
    assert [s[2] for k, s in shapes.items() if "conv_in" in k and "kernel" in k] == [channels]
    small = 32 // (4 if task == "super_resolution" else 1)
    assert part.args[1]["condition"].shape == (16, small, small, 3)
    assert ("condition_mask" in part.args[1]) == (task == "inpainting")
    assert (body["batch"], body["steps"], body["before"]) == (16, 4, [])
    assert body["days_bound"] == pytest.approx(4 * 0.5 / 86400)
    assert 0 < body["encoder_share_of_flops"] < 1 and body["hbm_by_kind_gb"]["encoder"] > 0
    assert "c8, finetune: batch 16" in (said := plan_show.text([body])) and "encoder" in said
    # What makes it fit is said of that run; its batch is what --batch changes.
    name, run = plan_parts.run_of(study, "finetune")
    own = dataclasses.replace(study, train=run)
    first = next(plan_remedies.of(own, "finetune", devices)).of_run(name)
    assert first.flags == ["--config.finetune.train.remat=block"]
    assert plan.with_batch(study, "finetune", 8).finetune.train.batch_size == 8
    # Its own settings decide its key, and not the others'.
    longer = dataclasses.replace(study, finetune=dataclasses.replace(
        tune, train=dataclasses.replace(tune.train, batch_size=8)))
    for kind, same in (("finetune", False), ("train", True)):
        one, other = (plan.key(s, "c8", TARGET, kind) for s in (study, longer))
        assert (one == other) == same


def test_a_plan_of_members_says_what_it_is_not_of(devices):
    tuned = config.parse(recipes.conditioned("deblurring", "39m,local"))
    taught = dataclasses.replace(_study(), dreambooth=DreamBooth(subjects="x"))
    distilled = config.parse(recipes.distilled("lcm", "39m,local"))
    for study, word in ((tuned, "fine-tuning for deblurring, planned by --kind=finetune"),
                        (taught, "DreamBooth, which is not planned"),
                        (distilled, "distillation, planned by --kind=distill")):
        study = dataclasses.replace(study, mesh=_study().mesh, train=_study().train)
        body, _ = _make(study, devices, fits_at=1)
        assert f"of the members before {word}" in " ".join(plan_show.text([body]).split()), word
    assert plan_parts.before(_study(), "train") == []
    with pytest.raises(UserError, match="fine-tunes nothing"):
        plan_parts.run_of(_study(), "finetune")


@pytest.mark.parametrize("kind", plan_parts.KINDS)
def test_every_part_is_lowered_and_has_the_keys(kind, devices):
    def compile(part):
        part.program.lower(*part.args)
        return _program()

    body = plan.make(_study(), "c8", TARGET, kind, devices, compile)
    assert KEYS <= set(body)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["fits"] and body["hbm_gb"] == pytest.approx(8)
    assert sum(body["hbm_by_kind_gb"].values()) == pytest.approx(8)
    assert body["mesh"]["data"] * body["mesh"]["fsdp"] == 8
    assert body["hbm_capacity_gb"] == pytest.approx(15.75 * 2**30 / 1e9)
    assert kind in plan_show.text([body])


def test_links_and_the_network_carry_each_their_own(devices):
    one = plan.make(_study(), "c8", TARGET, "train", devices, lambda _: _program())
    one["collectives"] = {"all-reduce": {
        "count": 1, "bytes": 9e9, "sent": 8e9, "slice_sent": 3e9}}
    one["roofline_seconds"] = {"links": 0.1, "network": 0.2}
    text = plan_show.text([one])
    assert re.search(r"links +0\.1000 +5 GB", text) and re.search(r"network +0\.2000 +3 GB", text)


def test_what_the_compiler_could_not_do_without_is_told(devices):
    program = dataclasses.replace(_program(), options={"xla_gpu_enable_triton_gemm": False})
    one = plan.make(_study(), "c8", TARGET, "train", devices, lambda _: program)
    assert "compiled with xla_gpu_enable_triton_gemm=False" in plan_show.text([one])
    del one["compiler_options"]  # As in plans of earlier versions.
    assert "compiled with" not in plan_show.text([one])


def test_time_is_the_larger_of_the_compilers_and_the_roofs(devices):
    def body(**work):
        program = dataclasses.replace(_program(), work=aot.Work(**work))
        return plan.make(_study(steps=1000), "c8", TARGET, "train", devices, lambda _: program)

    roof = body(flops=197e12, bytes=3 * 819e9, optimistic_seconds=2.0, sent=0.0, slice_sent=0.0)
    assert roof["seconds_per_step_bound"] == pytest.approx(3)
    assert roof["binds"] == "roofline: memory"
    assert roof["days_bound"] == pytest.approx(3 * 1000 / 86400)
    assert roof["chip_hours_bound"] == pytest.approx(3 * 1000 / 3600 * 8)
    assert roof["examples_per_second_bound"] == pytest.approx(64 / 3)
    compiler = body(flops=1.0, bytes=1.0, optimistic_seconds=2.0, sent=0.0, slice_sent=0.0)
    assert (compiler["seconds_per_step_bound"], compiler["binds"]) == (2.0, "compiler")


def test_share_of_frozen_encoders_by_time():
    rates = {"train": 10.0, "encode": 40.0, "text": 40.0}
    plans = {k: {"fits": True, "examples_per_second_bound": r} for k, r in rates.items()}
    # 0.1 s of training, 0.05 s of encoders.
    assert plan.frozen_share(plans) == pytest.approx(1 / 3)
    plans["text"]["fits"] = False
    assert plan.frozen_share(plans) is None


def test_cost_of_the_attention_kernel():
    """Batch 2, 8 heads, 1024 queries, 512 keys, width 64; products of 2 B N L M W each."""
    q, k = ("bf16", (2, 8, 64, 1024)), ("bf16", (2, 8, 64, 512))
    mask, product = ("s8", (1, 1, 1)), 2 * 2 * 8 * 1024 * 512 * 64

    def cost(name, results):
        return plan.kernel_cost(hlo.CustomCall(name, 1, (mask, mask, q, k, k), results))

    flops, moved = cost("splash_mha_fwd_residuals", (("f32", (1024, 64)), q))
    assert flops == 2 * product
    assert moved == 2 * 2 * 8 * 64 * (1024 + 512 + 512 + 1024)
    assert cost("splash_mha_dkv_no_residuals", (q, k, k))[0] == 5 * product
    assert cost("another_kernel", (q,)) is None


def test_the_attention_kernel_takes_tokens_last():
    """As its cost takes it to; 2 examples, 8 heads, 1024 queries, 256 keys, width 40."""
    def shape(tokens):
        return jax.ShapeDtypeStruct((2, 8, tokens, 40), jnp.bfloat16)

    traced = jax.jit(attention.splash).trace(shape(1024), shape(256), shape(256))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    (call,) = [line for line in text.splitlines() if "tpu_custom_call" in line]
    operands = re.findall(r"tensor<([0-9x]+)xbf16>", call.split(" : ")[-1].split("->")[0])
    assert operands == ["2x8x40x1024", "2x8x40x256", "2x8x40x256"]


def test_a_batch_that_does_not_split_is_named(devices):
    with pytest.raises(UserError, match="train.batch_size=60 does not split over 8 devices"):
        plan.make(_study(batch_size=60), "c8", TARGET, "train", devices, FakeCompiler(1))


def test_the_key_follows_what_decides_a_plan():
    def key(study=None, member="c8", kind="train", topology="v5e:2x4"):
        return plan.key(study or _study(), member, Target(topology), kind)

    others = {
        key(), key(_study(remat="block")), key(member="c16"), key(kind="sample"),
        key(topology="v6e:2x4"), key(_study(averages=(0.1,))),
    }  # fmt: skip
    assert len(others) == 6
    assert key(_study(keep_steps=(3,))) == key()
    assert key(dataclasses.replace(_study(), name="another")) == key()


def test_comments_do_not_decide():
    first = 'def f(x):\n    """A."""\n    return x  # why\n'
    second = 'def f(x):\n    """B."""\n    return x'
    one, other = (plan._bare(source) for source in (first, second))
    assert one == other != plan._bare("def f(x):\n    return -x")


# --- the family, the command line ---------------------------------------------------------------

_STAND_IN = """
import json, os, sys
flags = dict(w.lstrip("-").split("=", 1) for w in sys.argv[1:] if "=" in w)
with open(os.environ["LOG"], "a") as log:
    log.write(flags["to"] + "\\n")
if "145m_v6e" in flags["to"]:
    print("it is broken", file=sys.stderr); sys.exit(3)
body = json.load(open(os.environ["BODY"]))
member = flags["config"].split("t2i_")[1][:-3]
body |= {"member": member, "topology": flags["topology"], "kind": flags["kind"],
         "key": body["keys"][member + flags["topology"]]}
json.dump(body, open(flags["to"], "w"))
"""


def test_the_family_goes_on_where_it_was(tmp_path, monkeypatch, devices):
    configs, folder = tmp_path / "configs", tmp_path / "plans"
    configs.mkdir()
    folder.mkdir()
    monkeypatch.setattr(plan_family, "TOPOLOGIES", ("v5e:16x16", "v6e:16x16"))
    monkeypatch.setattr(plan_family, "KINDS", ("train",))
    monkeypatch.setattr(plan_family, "OTHERS", ("dit_xl2",))
    family = [m for m in plan_family.zoo.PAPER if m.name in ("39m", "145m")]
    monkeypatch.setattr(plan_family.zoo, "PAPER", tuple(family))
    jobs = [(m.name, where) for m in family for where in plan_family.TOPOLOGIES]
    jobs.append(("dit_xl2", "v5e:16x16"))  # Of other backbones the first topology alone.
    jobs += [("39m", "v5e:8x8"), ("145m", "v5e:8x8"), ("dit_xl2", "v5e:8x8")]  # Where asked for.
    for member, _ in jobs:
        (configs / f"t2i_{member}.py").touch()
    body, _ = _make(_study(), devices, fits_at=1)

    def study_of(flag):
        return config.parse(recipes.text_to_image(flag.split("t2i_")[1][:-3]))

    body["keys"] = {
        member + topology: plan.key(
            study_of(f"t2i_{member}.py"), member, Target(topology), "train"
        )
        for member, topology in jobs
    }
    (tmp_path / "body.json").write_text(json.dumps(body))
    (tmp_path / "tool.py").write_text(_STAND_IN)
    monkeypatch.setenv("BODY", str(tmp_path / "body.json"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def run(**topologies):
        (tmp_path / "log").write_text("")
        command = (sys.executable, str(tmp_path / "tool.py"))
        try:
            plan_family.run(study_of, configs, folder, [], command=command,
                            say=lambda line: None, **topologies)
        finally:
            made = (tmp_path / "log").read_text().splitlines()
        return made

    with pytest.raises(UserError, match="1 plans could not be made: 145m_v6e-16x16_train.json"):
        run()
    names = {path.name for path in folder.glob("*.json")}
    assert names == {
        "39m_v5e-16x16_train.json", "39m_v6e-16x16_train.json", "145m_v5e-16x16_train.json",
        "dit_xl2_v5e-16x16_train.json",
    }
    table = (folder / "README.md").read_text()
    assert "| 39m | v6e:16x16 |" in table and "not measurements" in table
    assert "| dit_xl2 |" in table.split("## Other backbones")[1].split("##")[0]
    assert "earlier version" not in table and "of which no day is known" in table
    assert "Not made yet: 145m_v6e-16x16_train.\n" in table
    # The table alone says what no longer holds.
    old = plan_family.read(folder / "39m_v5e-16x16_train.json") | {
        "key": "old", "made": {"date": "2026-01-02", "commit": "abc"}}
    plan_family.write(folder / "39m_v5e-16x16_train.json", old)
    assert len(plan_family.run(study_of, configs, folder, [], command=("false",), table=True)) == 4
    table = (folder / "README.md").read_text()
    assert "1 made on 2026-01-02 by the code of commit abc" in table
    assert "**1 of them are of an earlier version of the code" in table

    (folder / "39m_v5e-16x16_train.json").unlink()
    with pytest.raises(UserError):
        run()
    made = (tmp_path / "log").read_text().splitlines()
    assert [line.rsplit("/", 1)[1] for line in made] == [
        "39m_v5e-16x16_train.json", "145m_v6e-16x16_train.json"
    ]
    made = run(topologies=("v5e:8x8",))
    assert [line.rsplit("/", 1)[1] for line in made] == [
        "39m_v5e-8x8_train.json", "145m_v5e-8x8_train.json", "dit_xl2_v5e-8x8_train.json"]
    plan_family.run(study_of, configs, folder, [], command=("false",), table=True)
    table = (folder / "README.md").read_text()
    assert "| 39m | v5e:8x8 |" in table and "| 39m | v6e:16x16 |" in table


def test_the_readme_shows_what_the_plans_say():
    plans = [plan_family.read(path) for path in (ROOT / plan_family.FOLDER).glob("*_train.json")]
    order = {(topology, member.name): (k, j) for k, topology in enumerate(plan_family.TOPOLOGIES)
             for j, member in enumerate(plan_family.zoo.PAPER)}
    plans = [one for one in plans if (one["topology"], one["member"]) in order]
    plans.sort(key=lambda one: order[one["topology"], one["member"]])
    table = "\n".join(plan_show.glance(plans))
    assert table in (ROOT / "README.md").read_text()
    assert table in (ROOT / plan_family.FOLDER / "README.md").read_text()


def test_rows_of_samples_are_no_pictures():
    one = plan_family.read(ROOT / plan_family.FOLDER / "866m_v5e-16x16_sample.json")
    heads, _, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in plan_show._rows("sample", [one]))
    said = dict(zip(heads, row, strict=True))
    assert "examples/s" not in said and said["rows/s"] == "25,393"
    assert said["pictures/s of 50 rows"] == f"{one['images_per_second_bound']['50 rows']:,.0f}"


def test_a_plan_says_of_which_code_it_is(monkeypatch, tmp_path):
    found = plan_family.made()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{9,}(-dirty)?", found["commit"])
    monkeypatch.setattr(plan_family, "_git", lambda *words, **more: "")
    assert set(plan_family.made()) == {"date"} and plan_family._came(tmp_path / "a.json") == {}


def test_what_is_worse_than_the_baseline_is_told(tmp_path):
    old = {
        "member": "39m", "topology": "v5e:16x16", "num_slices": 1, "kind": "train", "fits": True,
        "key": "", "seconds_per_step_bound": 0.1, "hbm_gb": 3.0, "batch": 64,
    }  # fmt: skip
    plan_family.write(tmp_path / "39m_v5e-16x16_train.json", old)
    assert plan_family.compare([old | {"hbm_gb": 3.01}], tmp_path) == []
    (line,) = plan_family.compare([old | {"seconds_per_step_bound": 0.12}], tmp_path)
    assert "+20.0%" in line
    assert plan_family.compare([old | {"fits": False}], tmp_path) != []
    with pytest.raises(UserError, match="holds no 83m"):
        plan_family.compare([old | {"member": "83m"}], tmp_path)
    plan_family.write(tmp_path / "83m_v5e-16x16_train.json", old)
    with pytest.raises(UserError, match="of another job: its member is 39m"):
        plan_family.compare([old | {"member": "83m"}], tmp_path)
    staged = old | {"kind": "distill:student"}
    plan_family.write(tmp_path / "39m_v5e-16x16_distill-student.json", staged)
    assert plan_family.compare([staged | {"hbm_gb": 4.0}], tmp_path) != []


def test_the_plan_of_a_distillation_is_compared_too(tmp_path, monkeypatch, capsys):
    made = {
        "member": "39m", "topology": "v5e:16x16", "num_slices": 1, "kind": "distill", "fits": True,
        "key": "", "seconds_per_step_bound": 0.2, "hbm_gb": 3.0, "batch": 64,
    }  # fmt: skip
    monkeypatch.setattr(aot_tpu, "require", lambda: None)
    monkeypatch.setattr(plan, "make", lambda *unused, **more: made)
    monkeypatch.setattr(plan, "with_batch", lambda study, *unused: study)
    plan_family.write(
        tmp_path / "39m_v5e-16x16_distill.json", made | {"seconds_per_step_bound": 0.1})
    line = ["plan", "--config=configs/t2i_39m.py", "--topology=v5e:16x16", "--kind=distill",
            "--format=json", f"--baseline={tmp_path}"]
    assert cli.main(line) == 2
    told, why = capsys.readouterr().err.splitlines()
    assert told.startswith("39m_v5e-16x16_distill.json: ") and "+100.0%" in told
    assert "1 figures are worse" in why
    plan_family.write(tmp_path / "39m_v5e-16x16_distill.json", made)
    assert cli.main(line) == 0
    out, err = capsys.readouterr()
    assert err == f"no worse than {tmp_path}\n" and json.loads(out) == made | {
        "made": plan_family.made()}


def test_what_is_trained_elsewhere_is_planned_as_its_fine_tuning(tmp_path, monkeypatch, devices):
    body, _ = _make(_study(), devices, fits_at=1)
    made = []
    monkeypatch.setattr(aot_tpu, "require", lambda: None)
    monkeypatch.setattr(plan, "make", lambda study, member, target, kind, **more: made.append(
        (kind, study.finetune.train.batch_size)) or body)
    line = ["plan", "--config=configs/inpainting.py:39m,local", "--topology=v5e:2x4", "--batch=32"]
    elsewhere = "--config.finetune.pretrained=elsewhere"
    assert cli.main([*line, elsewhere]) == 0 and made == [("finetune", 32)]
    made.clear()
    assert cli.main([*line, elsewhere, "--kind=train"]) == 0 and made == [("train", 16)]
    made.clear()
    # Here the members are trained first: all that is of them, as for any config.
    assert cli.main([*line, "--kind=all-parts"]) == 0
    assert cli.main(line) == 0 and [kind for kind, _ in made] == [*plan_parts.KINDS] * 2


def _fails(capsys, *arguments):
    assert cli.main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_users_mistakes_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(aot_tpu, "require", lambda: None)
    file = "--config=configs/t2i_39m.py"
    assert "needs --config" in _fails(capsys)
    assert "needs --topology" in _fails(capsys, file)
    assert "did you mean v5e:16x16" in _fails(capsys, file, "--topology=v5e:256")
    assert "did you mean v5e:16x16" in _fails(capsys, "--all", "--topology=v5e:256")
    assert "did you mean h100:8" in _fails(capsys, file, "--topology=h10:8")
    assert "how many: h100:1, h100:8" in _fails(capsys, file, "--topology=H100")
    assert "'12' GPUs: give 1 to 8, or a multiple" in _fails(capsys, file, "--topology=h100:12")
    assert "'0' is not a whole number above 0" in _fails(capsys, file, "--batch=0")
    assert "does not go with --all" in _fails(capsys, "--all", file)
    assert "unknown argument '--depth=3'" in _fails(capsys, file, "--depth=3")
    where = f"--baseline={tmp_path}"
    told = "is where plans would be written"
    assert told in _fails(capsys, "--all", f"--to={tmp_path}", where)
    assert told in _fails(
        capsys, file, "--topology=v5e:16x16", f"--to={tmp_path}/39m_v5e-16x16_train.json", where)


def test_without_the_compiler_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = _fails(capsys, "--config=configs/t2i_39m.py", "--topology=v5e:16x16")
    assert "pip install -e '.[tpu-plan]'" in line
    line = _fails(capsys, "--config=configs/t2i_39m.py", "--topology=h100:8")
    assert "pip install -e '.[gpu-plan]'" in line


def test_a_pods_processes_sample_on_their_own_chips():
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install -e '.[parity]'")
    study = config.parse(recipes.text_to_image("39m"))
    devices = aot.topology("v5e:4x4")
    mesh, processes = plan_parts.own_mesh(study, devices)
    assert (mesh.size, processes) == (4, 4)
    assert {d.process_index for d in mesh.devices.flat} == {0}
    part = plan_parts.build(study, "39m", devices, "sample")
    assert (part.examples, part.copies) == (study.sweep.batch_size, 4)


def test_a_network_by_the_tpus_own_compiler(capsys, tmp_path, monkeypatch):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install -e '.[parity]'")
    path = tmp_path / "plan.json"
    status = cli.main([
        "plan", "--config=configs/t2i_39m.py:local", "--topology=v5e:16x16", "--kind=sample",
        f"--to={path}",
    ])  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    assert "sample: batch 16 on v5e:16x16 (256 chips)" in out
    assert "64 processes side by side" in out
    body = json.loads(path.read_text())
    assert KEYS <= set(body) and body["fits"] and body["versions"]["libtpu"] != "not installed"
    # The compiler may leave out or add little of what the network's layers need.
    assert 0.9 < body["flops_over_analytic"] < 1.2
    # Parameters lie in four parts and are gathered.
    assert body["collectives"]["all-gather"]["count"] > 0
    # Of an earlier version, but the same program: its key is renewed, its figures stay.
    plan_family.write(path, body | {"key": "old", "made": {}})

    def compiles(*unused, **more):
        raise UserError("compiles")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)
    line = ["plan", "--config=configs/t2i_39m.py:local", "--topology=v5e:16x16", "--kind=sample",
            f"--to={path}"]
    assert cli.main(line) == 0
    renewed = json.loads(path.read_text())
    assert renewed["key"] == body["key"] and renewed["program"] == body["program"]
    assert renewed["compile_seconds"] == body["compile_seconds"]
    for name in ("seconds_per_step_bound", "hbm_by_kind_gb", "collectives", "kernels"):
        assert renewed[name] == body[name]
    for other in ("--config.sweep.batch_size=32", "--again"):
        assert cli.main([*line, other]) == 2


def test_a_network_by_a_gpus_own_compiler(capsys, tmp_path, monkeypatch):
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="no GPU compiler: pip install -e '.[parity]'"
    )
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".9")
    path = tmp_path / "plan.json"
    status = cli.main([
        "plan", "--config=configs/t2i_39m.py:local", "--topology=h200:2", "--kind=sample",
        f"--to={path}",
    ])  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    assert "sample: batch 16 on h200:2 (2 GPUs)" in out and "kernels one after the other" in out
    assert re.search(r"attention +\d+", out) and "chip" not in out
    body = json.loads(path.read_text())
    assert KEYS <= set(body) and body["fits"] and "jax-cuda13-pjrt" in body["versions"]
    assert 0.9 < body["flops_over_analytic"] < 1.2
    assert body["hbm_capacity_gb"] == pytest.approx(0.9 * 139.8 * 2**30 / 1e9)
    sorts = body["kernels_by_kind"].values()
    assert body["compiler_seconds"] == pytest.approx(sum(row["seconds"] for row in sorts))


def test_a_gpus_attention_kernel_is_cudnns(monkeypatch):
    monkeypatch.setattr(aot, "on_gpu", lambda devices: True)
    devices = jax.devices()[:8]
    first = next(plan_remedies.of(_study(attention="plain"), "train", devices))
    assert first.flags == ["--config.train.attention=cudnn"]
