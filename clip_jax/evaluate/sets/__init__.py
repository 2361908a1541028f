"""Evaluation data sets: their descriptions (definitions/*.json), and their splits on disk.

dataset       the description of a set
descriptions  reads it from a JSON file, or from a directory of the user's own
registry      sets by name
classes       maps the classes of a source to those of a set
views         sources cut and relabelled
directories   a split in a directory as a `clip_jax.data` source
finding       a split wherever it lies, or the command that fetches it
"""
