"""The sections of kernels.py."""
