"""Formats: how the files of each are found, cut into blocks, and read. One module each: `plan(files, …)`, `read(block, …)`."""
