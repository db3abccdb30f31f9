"""fnrecipe: recipes for training language models, as a fold of a pure step over a stream.

Nothing is imported here: `fnrecipe.data`, `fnrecipe.optim`, `fnrecipe.transforms`, … are each imported for themselves, so
that whoever only reads a config or composes a stream does not wait for torch.
"""
