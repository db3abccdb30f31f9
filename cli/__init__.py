"""The command line: it parses, finds the recipe and calls `fnrecipe.run`. Importing it does not import torch."""
