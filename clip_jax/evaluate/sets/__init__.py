"""Evaluation data sets: what is known of each (sets/*.json), and where it lies on disk.

dataset: what is known of a set; reading: of a JSON file; own: of a directory of the user's;
registry: sets by name; classes: how a source's classes become a set's; views: sources cut and
relabelled; directories, finding: a split as a `clip_jax.data` source, or what fetches it.
"""
