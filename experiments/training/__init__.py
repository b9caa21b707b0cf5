"""The parts of every training script: options, devices, the loop, the run folder, plots."""
