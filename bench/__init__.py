"""Benchmarks: every number is a ratio to the frozen model and to the stock stack, measured in the same run."""
