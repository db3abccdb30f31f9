"""Gemma 3 for text: its config, which is free of torch, and its functions."""
