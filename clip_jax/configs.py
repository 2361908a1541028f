"""The configs, as a package: clip_jax.configs.default, clip_jax.configs.vit_b32, and so on.

In a clone they lie at the top level, where people look for them and edit them. A wheel has them in
clip_jax/configs instead, which Python prefers to this file.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[1] / "configs")]
