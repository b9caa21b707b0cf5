"""The parts of language_modelling.py."""
