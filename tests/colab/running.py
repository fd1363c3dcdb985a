"""Running a notebook whole, as Jupyter does, in a folder of its own."""

import os
import pathlib

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parents[2] / "colab"
SECONDS_A_CELL = 300


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def fill(notebook, field, value):
    """Types something into an empty form field."""
    empty = f'{field} = ""  # @param'
    (cell,) = [cell for cell in notebook.cells if empty in cell.source]
    cell.source = cell.source.replace(empty, f"{field} = {os.fspath(value)!r}  # @param")


def run(notebook, folder, more):
    """Executes all cells and then one more; returns what that one printed. An error in a cell
    raises."""
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    NotebookClient(
        notebook, timeout=SECONDS_A_CELL, kernel_name="python3",
        resources={"metadata": {"path": os.fspath(folder)}},
    ).execute()
    outputs = notebook.cells[-1].outputs
    return "".join(out.text for out in outputs if out.get("name") == "stdout").strip()


def pictures(notebook):
    """How many pictures each code cell shows."""
    return [
        sum("image/png" in out.get("data", {}) for out in cell.outputs)
        for cell in notebook.cells if cell.cell_type == "code"
    ]
