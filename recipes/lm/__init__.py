"""Language-model pre-training."""
