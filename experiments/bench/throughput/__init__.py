"""The sections of throughput.py."""
