"""Shared by the tests of the scripts."""

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def module(monkeypatch):
    """Import a file of the experiments."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module
