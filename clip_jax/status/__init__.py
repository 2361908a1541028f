"""The command that tells how runs are doing: python -m clip_jax status."""
