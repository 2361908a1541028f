"""Tools for data sets: index, check, describe, pack, deduplicate and balance them."""
