"""The notebooks run from start to end, and are committed as they are meant to be."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
# What a test trains less: everything is run, and what the prose says was asserted by the full run
# of which the outputs are stored.
SHORTER = {
    "first_deq": {},
    "thinking_longer": {"steps=800": "steps=20", "steps=700": "steps=20", "assert ": "# assert "},
}
FIGURES = {"first_deq": 2, "thinking_longer": 3}


def figures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return len([output for output in outputs if "image/png" in output.get("data", {})])


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_runs_from_start_to_end_and_draws_its_figures(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for before, after in SHORTER[name].items():
        assert any(before in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(before, after)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert figures(notebook) == FIGURES[name]


@pytest.mark.parametrize("name", FIGURES)
def test_is_committed_without_traces_of_a_machine(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    # The outputs of a notebook that takes minutes are stored, for those who only read.
    if name == "thinking_longer":
        assert figures(notebook) == FIGURES[name]
    else:
        assert not any(cell.get("outputs") for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert "/tmp" not in text and "/home" not in text and 'execution_count": 1' not in text
