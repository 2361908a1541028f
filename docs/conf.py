"""The site: python -m sphinx -W -b html docs build/docs."""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

project = "clip_jax"
author = "the clip_jax authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "outside_pages",
    "settings_tables",
]
exclude_patterns = ["*.ipynb"]
html_theme = "furo"
html_title = "clip_jax"

myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_legacy_class_based = True
napoleon_use_ivar = True
napoleon_use_rtype = False

# References among the pages and within the package must resolve. Types in signatures need not: some
# have no place on the page. Those of other libraries are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:.*", r"(?!clip_jax).*")]
