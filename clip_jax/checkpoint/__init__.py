"""Orbax checkpoints: asynchronous, sharded, the most recent ones and the best.

store    save, find and restore; the fall-back where the newest is damaged
reading  one checkpoint from disk, compared with its checksums
manager  orbax's manager, with the changes that runs need
writes   saves that take long or fail
together saves of several hosts, which succeed or fail on all

A checkpoint has three items: "model" (parameters and BatchNorm statistics; inference reads no
more), "optimizer", and "meta" (JSON: step, position in the data, config, tokenizer, checksums of
the arrays and of itself). What is read is compared with its checksums.
"""

from clip_jax.checkpoint.store import DIRECTORY, Checkpoints, Restored, split_path

__all__ = ["DIRECTORY", "Checkpoints", "Restored", "split_path"]
