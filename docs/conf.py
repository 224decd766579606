"""Configuration of the documentation site: sphinx-build -W --keep-going -b html docs docs/_build"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from zsu_fast import __version__

project = "zsu_fast"
author = "The zsu_fast team"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # `name` in a docstring links to what it names, where that is documented

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" of a class must not repeat its documented members
napoleon_use_rtype = False  # the signature has the type, see _as_written

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",  # run these; the others are shown as they are
    "download_all_examples": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
    "show_memory": False,
}

html_theme = "pydata_sphinx_theme"
html_title = f"zsu_fast {version}"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}


def _underline_title(_app: object, docname: str, source: list[str]) -> None:
    """Makes the first line of an example's docstring its page's title; scripts need no markup."""
    if docname.startswith("auto_examples/"):
        title = re.compile(r"(\.\. _sphx_glr_auto_examples_\w+\.py:\n+)(.+)\n(?!(\W)\3{2})")
        source[0] = title.sub(lambda m: f"{m[1]}{m[2]}\n{'=' * len(m[2])}\n", source[0], count=1)


def _as_written(
    _app: object, _what: str, _name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Undoes what napoleon reads into "Returns: a copy: ..." and "Attributes: mean, std: ..."."""
    text = "\n".join(lines)
    text = re.sub(r"^:returns: (\*?)(.+?)\1 -- ", r":returns: \2: ", text, flags=re.M)
    several = re.compile(r"^:ivar (\w+(?:, \w+)+):((?:.*)(?:\n(?: .*)?)*)", re.M)
    text = several.sub(
        lambda m: "\n".join(f":ivar {name}:{m[2].rstrip()}" for name in m[1].split(", ")) + "\n",
        text,
    )
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _underline_title)
    app.connect("autodoc-process-docstring", _as_written, priority=600)  # after napoleon
