"""The command line: it parses arguments, finds the recipe and calls the library. Importing it does not import torch."""
