"""Embeddings of whole data sets: made by all hosts together, kept on disk."""
