"""A run around the fold: `train`, and what it does beside training: files, signals, the screen."""
