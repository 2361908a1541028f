"""Formats of other projects, one module for each; none of them needs PyTorch."""
