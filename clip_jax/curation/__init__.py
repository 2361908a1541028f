"""Data sets as such: to index, check, describe, pack, de-duplicate and curate them."""
