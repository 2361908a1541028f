"""Embeddings of whole data sets, and search in them: python -m clip_jax embed, ... search."""
