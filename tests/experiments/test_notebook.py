"""The notebook runs from start to end, and is committed as it is meant to be."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "first_deq.ipynb"


@pytest.mark.slow
def test_runs_from_start_to_end_and_draws_its_figures():
    # The cells assert what the prose says.
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_is_committed_without_outputs_and_without_traces_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata["kernelspec"]["name"] == "python3"
