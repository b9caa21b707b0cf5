"""The sections of soundness.py."""
