"""Qwen 2 and 2.5: its config, which is free of torch, and its functions."""
