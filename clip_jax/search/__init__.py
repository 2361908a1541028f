"""Search in embeddings by text or picture: python -m clip_jax search."""
