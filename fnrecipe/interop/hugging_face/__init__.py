"""Directories of Hugging Face: read (`directory`, `weights`) and written (`export`)."""
