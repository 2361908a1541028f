"""Searches embeddings by text or by picture: python -m clip_jax search."""
