"""The sections of certificates.py."""
