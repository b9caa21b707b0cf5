"""The sections of accelerator.py."""
