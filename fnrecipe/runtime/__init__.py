"""Processes, devices, signals, clocks and files: everything of a run that is not pure."""
