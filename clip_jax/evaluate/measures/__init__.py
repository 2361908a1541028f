"""Metrics and statistics of the paper's evaluation, as pure functions of arrays."""
