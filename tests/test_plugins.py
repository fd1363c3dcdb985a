"""Code of one's own: a workdir knows it again, from any folder and in a process of its own."""

import importlib
import json
import pathlib
import re
import sys

import pytest

from ldm_scaling import config
from ldm_scaling.cli import flags
from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.study import figure_cli, records, report
from ldm_scaling.study.figures import catalogue
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import MARKER, Workdir
from tests.study import fake_records

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
    assert report._section("mine_all", {}) == ("curves", "My figure", "My figure. What it shows.")


def test_the_pages_config_names_a_file_beside_it(tmp_path, fresh):
    page = (DOCS / "extending.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
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


def test_the_pages_tables_are_there():
    page = (DOCS / "extending.md").read_text()
    rows = re.findall(r"^\| .*?`(ldm_scaling[\w.]+)`.*\[(\w+\.md)\]", page, re.MULTILINE)
    assert len(rows) == page.count("\n| ") - 1
    for table, other in rows:
        module, _, name = table.rpartition(".")
        assert hasattr(importlib.import_module(module), name), table
        assert (DOCS / other).exists()
