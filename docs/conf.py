"""Sphinx builds the site: see CONTRIBUTING.md for the command.

Notebooks are shown with the outputs that are committed. `notebooks/execute.py` runs
them in CI, where errors are fatal. MYST_NB_EXECUTE=force runs them here as well.
"""

import importlib.metadata
import os
import pathlib
import re
import shutil
import tomllib
import urllib.error
import urllib.request

import sparse_optax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["project"]["urls"]["Repository"]

project = "sparse_optax"
author = "the sparse_optax authors"
version = release = sparse_optax.__version__
assert version == importlib.metadata.version("sparse_optax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "images/*.py"]
html_theme = "sphinx_book_theme"
html_title = "sparse_optax"
html_theme_options = {
    "repository_url": REPOSITORY,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_source_button": True,
}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Errors are fatal where a notebook runs.
nb_execution_mode = os.environ.get("MYST_NB_EXECUTE", "off")
nb_execution_raise_on_error = True
nb_execution_timeout = 600

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"


def reachable(inventory: str) -> bool:
    """Whether another project's index can be read: without a network none is used."""
    try:
        with urllib.request.urlopen(inventory, timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


OTHERS = {
    "jax": "https://docs.jax.dev/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
}
intersphinx_mapping = {
    name: (url, None) for name, url in OTHERS.items() if reachable(f"{url}objects.inv")
}

# The notebooks lie beside this folder; Sphinx reads only what is in it.
shown = pathlib.Path(__file__).parent / "notebooks"
shutil.rmtree(shown, ignore_errors=True)
shown.mkdir()
for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, shown)


def bars(app, what, name, obj, options, lines):
    """A bar is an absolute value here, not a substitution of reStructuredText."""
    math = None  # the indentation of the equation that a line belongs to
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if math is not None and line.strip() and indent <= math:
            math = None
        if line.lstrip().startswith(".. math::"):
            math = indent
        if math is None and not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``|`.*?`)", line)
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[i] = "".join(parts)


def link_notebooks(app, docname, source):
    """Links to a notebook go to the folder beside this one, as on GitHub; Sphinx reads
    the copy.
    """
    source[0] = source[0].replace("../notebooks/", "notebooks/")


def setup(app):
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", bars)
    app.connect("source-read", link_notebooks)
