"""The sections of gradient_fidelity.py."""
