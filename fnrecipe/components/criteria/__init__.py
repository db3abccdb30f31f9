"""Criteria of preferences, by the names that `criterion.name` takes."""
