"""The rest is in pyproject.toml, which cannot say where a single package lies."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["clip_jax", "clip_jax.*"]), "clip_jax.configs"],
    package_dir={"clip_jax.configs": "configs"},
)
