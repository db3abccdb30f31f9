"""The command line: it parses, finds the recipe and calls `fnrecipe.shell.train`. Importing it does not import torch."""
