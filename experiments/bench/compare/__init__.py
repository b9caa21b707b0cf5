"""The sections of compare_solvers.py and compare_adjoints.py."""
