"""Text that goes on: a fold of a pure step that applies a model to one token of each row and samples the next."""
