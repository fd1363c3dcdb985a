"""Code of one's own: a workdir knows it again, from any folder and in a process of its own."""

import dataclasses
import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import cli, config
from ldm_scaling.cli import flags
from ldm_scaling.data import image_folder
from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import catalog
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.sampling import solvers
from ldm_scaling.study import (
    advise_cli,
    evaluate,
    extractors,
    figure_cli,
    labels,
    published_scorer,
    records,
    report,
    scores,
    sweep_checks,
)
from ldm_scaling.study.features import ImageSet
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import MARKER, Workdir
from tests.study import fake_networks, fake_records

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SOLVER = """
from ldm_scaling.sampling.solvers import SOLVERS
SOLVERS["mine_own"] = SOLVERS["ddim"]
"""


@pytest.fixture
def fresh(monkeypatch):
    """Forgets what plugins of these names did, as a new process would not know it; afterwards too.
    """
    def forget(*names):
        monkeypatch.setattr(sys, "path", list(path))
        monkeypatch.setattr(solvers, "SOLVERS", dict(known))
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)

    path, known, before = list(sys.path), dict(solvers.SOLVERS), set(sys.modules)
    forget()
    yield forget
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def test_a_workdir_knows_its_plugins_again(tmp_path, fresh, monkeypatch):
    (tmp_path / "plug_a.py").write_text(SOLVER)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    study = config.parse({"plugins": ["plug_a.py"], "sample": {"sampler": "mine_own"}})
    assert study.plugins == (str(tmp_path / "plug_a.py"),)
    Workdir(tmp_path / "wd").bind(study)
    fresh("plug_a")
    with pytest.raises(UserError, match="unknown sampler 'mine_own'"):
        solvers.parse("mine_own")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = Workdir(tmp_path / "wd").last_config()
    assert found == study
    assert solvers.make("mine_own", schedule.get("sd"), 3).calls == 3

    # It is not bound to them, nor are networks.
    bare = config.parse({"sample": {"sampler": "mine_own"}})
    Workdir(tmp_path / "wd").bind(bare)
    assert (bare.identity(), bare.training_hash("c8")) == (
        study.identity(), study.training_hash("c8"))
    assert json.loads((tmp_path / "wd" / MARKER).read_text())["config"]["plugins"] == []

    Workdir(tmp_path / "wd").bind(study)
    fresh("plug_a")
    (tmp_path / "plug_a.py").rename(tmp_path / "gone.py")
    with pytest.raises(UserError, match=rf"{MARKER}: .*no file {tmp_path}/plug_a.py.*--config"):
        Workdir(tmp_path / "wd").last_config()


def test_what_is_imported_once_is_not_imported_again(tmp_path, fresh):
    path = tmp_path / "plug_once.py"
    path.write_text("import sys\nsys.plug_count = getattr(sys, 'plug_count', 0) + 1\n")
    try:
        for _ in range(3):
            config.parse({"plugins": [str(path)]})
        assert sys.plug_count == 1
    finally:
        del sys.plug_count


def test_workdirs_may_each_have_their_own_of_the_same(tmp_path, fresh):
    one, two, other = (tmp_path / name / "plug_same.py" for name in "abc")
    for path, text in ((one, "x = 1\n"), (two, "x = 1\n"), (other, "x = 2\n")):
        path.parent.mkdir()
        path.write_text(text)
    assert config.parse({"plugins": [str(one), str(two)]}).plugins == (str(one), str(two))
    with pytest.raises(UserError, match="another module is called plug_same, .*give --config with"):
        config.parse({"plugins": [str(other)]})


def test_a_plugin_comes_before_names_are_checked(tmp_path, fresh):
    """Modules beside a file, and dotted ones."""
    (tmp_path / "plug_beside.py").write_text("NAME = 'mine_own'\n")
    (tmp_path / "plug_b.py").write_text("import plug_beside\n" + SOLVER)
    found = config.parse({"plugins": (str(tmp_path / "plug_b.py"), "plug_beside", "json.tool")})
    assert found.plugins[1:] == ("plug_beside", "json.tool")
    assert "mine_own" in solvers.SOLVERS


@pytest.mark.parametrize("name, text, said", [
    ("plug_none.py", None, "there is no file {path}: restore it"),
    ("plug_raises.py", "x = 1\n\nraise ValueError('oh\\nno')", "{path} cannot be imported: "
     "ValueError: oh ({path}, line 3): mend it"),
    ("plug_broken.py", "x = (", "{path} cannot be imported: SyntaxError: '(' was never closed "
     "(plug_broken.py, line 1): mend it"),
    ("plug_lacks.py", "import plug_nothing", "ModuleNotFoundError: No module named 'plug_nothing'"),
    ("json.py", "", "another module is called json, "),
    ("sys.py", "", "another module is called sys, one of Python: rename the file"),
    ("plug.dots.py", "", "leave out the dots before .py"),
    ("plug_no_module", None, "there is no module 'plug_no_module': install its package"),
    (".x", None, "'.x' is neither a dotted name of a module nor a file"),
    ("", None, "'' is neither a dotted name of a module nor a file"),
])  # fmt: skip
def test_a_plugin_that_cannot_be_had(tmp_path, fresh, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    given = str(path) if name.endswith(".py") else name
    with pytest.raises(UserError) as e:
        config.parse({"plugins": [given]})
    assert said.format(path=path) in str(e.value) and "\n" not in str(e.value)


def test_a_figure_of_ones_own_is_one_of_them(tmp_path, fresh, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "FIGURES", list(catalogue.FIGURES))
    (tmp_path / "plug_fig.py").write_text(
        "from ldm_scaling.study.figures import catalogue\n"
        "catalogue.FIGURES.append(catalogue.Entry(\n"
        "    'mine_all', '', 'My figure', lambda source: {}, 'luck', 'curves', 'What it shows.'))\n"
    )
    study = config.parse({"plugins": [str(tmp_path / "plug_fig.py")]})
    Workdir(tmp_path).bind(study)
    for record in fake_records.make(models=("c8",), samplers=("ddim",))[:2]:
        records.write(tmp_path / "records", record)
    fresh("plug_fig")
    del catalogue.FIGURES[-1]
    figure_cli.run(["mine", f"--workdir={tmp_path}"], lambda words: None)
    assert "skipped: mine_all needs luck" in capsys.readouterr().out
    assert report._section("mine_all", catalogue.entry_of("mine_all"), {}) == (
        "curves", "My figure", "My figure. What it shows.")


def test_the_pages_config_names_a_file_beside_it(tmp_path, fresh):
    page = (DOCS / "extending.md").read_text()
    *_, example, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(SOLVER.replace("mine_own", "my_solver"))
    (tmp_path / "my_study.py").write_text(example)
    try:
        given = flags.values_of("train", [f"--config={tmp_path / 'my_study.py'}"])
        study = config.parse(given.config)
        assert study.plugins == (str(tmp_path / "mine.py"),)
        assert study.sweep.samplers[1] in solvers.SOLVERS
        materials = Materials(study, Workdir(tmp_path / "run"))
        assert [materials.spec(member).sample_size for member in study.members] == [8, 8]
    finally:
        sys.modules.pop("mine", None)


@pytest.fixture
def own_scores(tmp_path):
    """The page's example in a file."""
    path = tmp_path / "my_scores.py"
    with fake_networks.scores_of_ones_own(path):
        yield path


def test_the_pages_scores_are_in_evaluate(tmp_path, own_scores, capsys):
    """Values by their definition, with intervals; features are kept by the network's hash."""
    rng, images = np.random.default_rng(0), {}
    for name in "ab":
        images[name] = rng.integers(0, 256, (12, 6, 6, 3), np.uint8)
        (tmp_path / name).mkdir()
        for i, image in enumerate(images[name]):
            Image.fromarray(image).save(tmp_path / name / f"{i:02}.png")
    (tmp_path / "captions.txt").write_text("one red\nnone\n" * 6)

    def found(*more):
        out = tmp_path / "out.json"
        status = cli.main(["evaluate", str(tmp_path / "a"), *more, f"--plugins={own_scores}",
                           f"--cache={tmp_path / 'cache'}", f"--output={out}"])
        assert status == 0, capsys.readouterr().err
        return {one["name"]: one for one in json.loads(out.read_text())["scores"]}

    said = found("--metrics=named", f"--captions={tmp_path / 'captions.txt'}")["named"]
    means_NC = images["a"].mean((1, 2)) / 255
    want_N = (means_NC[:, 0] - means_NC.mean(1)) * ([1, 0] * 6)
    assert said["value"] == pytest.approx(want_N.mean(), rel=1e-5)
    assert said["interval"][0] < said["value"] < said["interval"][1]
    assert (said["against"], said["better"]) == ("their captions", "higher")

    both = found(str(tmp_path / "b"), "--metrics=fd_mine,colourful")
    features = {k: scores.EXTRACTORS["mine"].load().run(v)["ninths"] for k, v in images.items()}
    want = frechet_from_features(features["a"], ReferenceStats(Moments.of(features["b"]), ""))
    assert both["fd_mine"]["value"] == pytest.approx(want, rel=1e-6)
    assert both["colourful"]["interval"][0] > 0
    sys.modules["my_scores"].VERSION = 2
    again = found(str(tmp_path / "b"), "--metrics=fd_mine")["fd_mine"]
    assert again["extractor"] != both["fd_mine"]["extractor"]
    assert cli.main(["evaluate", str(tmp_path / "a"), "--metrics=named"]) == 2
    assert "named needs the images' captions" in capsys.readouterr().err


def test_a_workdir_s_pages_and_advice_know_its_scores(tmp_path, own_scores, capsys):
    """Which way is better too: the guidance of the highest is chosen, which alone is reported."""
    study = config.parse({"plugins": [str(own_scores)], "sweep": {
        "metrics": ["named"], "choose_by": "named"}})
    Workdir(tmp_path).bind(study)
    for r in fake_records.make(models=("c8", "c16"), samplers=("ddim",), noise=0.0):
        drawn_R = [-x for x in r.replicates.get("fd_effnetlite0", ())]
        records.write(tmp_path / "records", dataclasses.replace(
            r, metrics={"named": -r.metrics["fd_effnetlite0"]}, intervals={},
            replicates={"named": drawn_R} if drawn_R else {}))
    for table, name in ((scores.SCORES, "named"), (sys.modules, "my_scores")):
        del table[name]
    advise_cli.run([f"--workdir={tmp_path}", "--budget=3 cost"], lambda words: None)
    said = capsys.readouterr().out
    assert "For 3.00 cost: c8, DDIM, 20 steps, guidance 3" in said
    assert "expect named colours -59." in said
    figure_cli.run(["fig7", f"--workdir={tmp_path}", "--page"], lambda words: None)
    assert "named colours (higher is better)" in (
        tmp_path / "figures" / "report.html").read_text()
    assert (tmp_path / "figures" / "fig7_guidance.png").exists()


def test_a_score_of_ones_own_is_measured_anew_when_its_network_changes(tmp_path, own_scores):
    config.parse({"plugins": [str(own_scores)]})
    real = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)

    def of(name):
        return published_scorer.load((name,), tmp_path, lambda: [real]).hash

    names = ("fd_mine", "colourful", "named")
    before = [of(name) for name in names]
    assert before == [of(name) for name in names] and len(set(before)) == 3
    sys.modules["my_scores"].VERSION = 2
    assert not {*before} & {of(name) for name in names}


@pytest.mark.parametrize("row, said", [
    (("fd_mine", "", "fid", "mine", "tenths"), "layer 'tenths' of 'mine', which has ninths, colo"),
    (("fd_mine", "", "fid", "nobody", ""), "extractor 'nobody', which extractors.EXTRACTORS lacks"),
    (("fd_mine", "", "fid", "inception_clean", "pooled"), "has pool, logits_unbiased"),
    (("fd_mine", "", "fod", "mine", "ninths"), "metric 'fod', which catalog.METRICS lacks"),
    (("other", "", "fid", "mine", "ninths"), "calls itself 'other'"),
    (("fd_mine", "", "clip_t", "mine", "ninths"), "against captions, and 'mine' has no words"),
    (("fd_mine", "", "kid", "mine_read", "named"), "takes captions: its metric holds images"),
    (("fd_mine", "", "fid", "heavy", "x"), "needs the weights nowhere, which weights.PUBLISHED"),
])  # fmt: skip
def test_a_row_that_names_what_there_is_not_is_refused_with_the_config(own_scores, row, said):
    config.parse({"plugins": [str(own_scores)]})
    scores.SCORES["fd_mine"] = scores.Row(*row)
    scores.EXTRACTORS["heavy"] = extractors.Extractor(("nowhere",), "", lambda path: None)
    with pytest.raises(UserError, match=f"the score 'fd_mine' .*{re.escape(said)}.*: mend its row"):
        sweep_checks.check("sweep", config.Sweep(metrics=("fd_mine",)))
    with pytest.raises(UserError, match="the score 'fd_mine'"):
        labels.measure("named")


@pytest.mark.parametrize("change, said", [
    ({"better": "Lower"}, "better='Lower' in its metric: choose of 'lower', 'higher'"),
    ({"against": "feature"}, "against='feature'"), ({"count": "freee"}, "count='freee'"),
])  # fmt: skip
def test_a_word_of_a_metric_that_means_nothing_is_refused(own_scores, change, said):
    config.parse({"plugins": [str(own_scores)]})
    catalog.METRICS["named"] = dataclasses.replace(catalog.METRICS["named"], **change)
    with pytest.raises(UserError, match=f"the score 'named' has {said}"):
        scores.rows(["named"])
    scores.SCORES["caption_agreement"] = dataclasses.replace(
        scores.SCORES["fd_mine"], name="caption_agreement")
    with pytest.raises(UserError, match="the name of a sweep's own measure"):
        scores.rows(["caption_agreement"])


def test_a_layer_that_no_table_tells_is_refused_when_the_network_runs(tmp_path, own_scores):
    config.parse({"plugins": [str(own_scores)]})
    mine = scores.EXTRACTORS["mine"]
    scores.EXTRACTORS["mine"] = dataclasses.replace(mine, layers=())
    scores.SCORES["fd_mine"] = dataclasses.replace(scores.SCORES["fd_mine"], layer="tenths")
    with pytest.raises(UserError, match="'mine' has no layer 'tenths', it has ninths, colourful"):
        published_scorer.load(("fd_mine",), tmp_path, list)


def test_one_metric_of_two_layers(tmp_path, own_scores):
    """In `evaluate`, and in one sweep, though their own hash is the same."""
    config.parse({"plugins": [str(own_scores)]})
    mine = scores.EXTRACTORS["mine"]
    scores.EXTRACTORS["mine"] = dataclasses.replace(mine, load=lambda: dataclasses.replace(
        mine.load(), hash_of=lambda layer: "1"))
    scores.SCORES["two"] = scores.Row("two", "FD (colourful)", "fid", "mine", "colourful")
    names, options = ("fd_mine", "two"), evaluate.Options(None, tmp_path / "cache", 0)
    images, sets = np.random.default_rng(0).integers(0, 256, (2, 12, 6, 6, 3), np.uint8), []
    for name, some in zip("ab", images):
        (tmp_path / name).mkdir()
        for i, image in enumerate(some):
            Image.fromarray(image).save(tmp_path / name / f"{i:02}.png")
        sets.append(ImageSet(image_folder.listing(tmp_path / name)))
    task = evaluate.Task(*sets)
    found = {s.name: s.value for s in evaluate.score(scores.rows(names), task, options)}
    published = published_scorer.load(names, tmp_path, lambda: [images[1]])
    x_NF = published.features(images[0])
    assert found == pytest.approx(published.score(x_NF, np.zeros((12, 0)), None)[0], rel=1e-6)
    assert found["fd_mine"] != found["two"]
    with pytest.raises(UserError, match="fd_mine, two: a file of statistics is of one layer"):
        evaluate.make_reference(scores.rows(names), sets[1], options, tmp_path / "r.npz")


def test_the_pages_tables_are_there():
    page = (DOCS / "extending.md").read_text()
    rows = re.findall(r"^\| .*?`(ldm_scaling[\w.]+)`.*\[(\w+\.md)\]", page, re.MULTILINE)
    assert len(rows) == page.count("\n| ") - 1
    for table, other in rows:
        module, _, name = table.rpartition(".")
        assert hasattr(importlib.import_module(module), name), table
        assert (DOCS / other).exists()
