"""The parts of image_classification.py."""
