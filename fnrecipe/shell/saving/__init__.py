"""The checkpoints of a run: saved, listed, kept, copied, set aside and removed."""
