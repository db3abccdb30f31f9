"""OLMo 2: its config, which is free of torch, and its functions."""
