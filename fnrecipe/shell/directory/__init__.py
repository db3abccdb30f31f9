"""The output directory of a run: who may write in it, what the run says of itself there, and that it is the same run."""
