"""Weights of other projects in, and out: one module for each format, none of which needs torch."""

from clip_jax.weights.convert.formats import FORMATS, read, read_variables, write
from clip_jax.weights.convert.tokens import create as create_tokenizer

__all__ = ["FORMATS", "create_tokenizer", "read", "read_variables", "write"]
