"""Optimizers, by the names that `optimizer.name` takes."""
