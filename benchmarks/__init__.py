"""Benchmarks: `python -m benchmarks NAME [--json FILE]`. README.md holds the tables that were measured."""
