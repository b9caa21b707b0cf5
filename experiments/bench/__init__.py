"""The parts of every measuring script, and a folder for what one of them measures."""
