"""Shared by the tests of the scripts."""

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Fixtures in which a script runs from its start to its end, in a process of its own.
SCRIPTS = {"adjoints", "default", "folder", "run", "smoke", "solvers"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that run a whole script are slow."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and SCRIPTS & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def module(monkeypatch):
    """Import a file of the experiments."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module
