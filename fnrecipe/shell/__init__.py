"""What a run does beside training: files, signals, the screen."""
