"""Writes the address of the repository wherever it stands, from pyproject.toml.

    python .ci/addresses.py

To publish elsewhere, change `[project.urls]`, run this, and commit. It replaces owner
and name in links to github.com, raw.githubusercontent.com and Colab, and the address of
the documentation, in the README, the docs, the notebooks and CITATION.cff. A test says
whether all agree.
"""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOSTS = r"(github\.com|raw\.githubusercontent\.com|research\.google\.com/github)"
NAME = re.compile(rf"{HOSTS}/[\w.-]+/sparse[_-]optax\b")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SITE = re.compile(r"https://[\w.-]+/sparse[_-]optax/(?=[\w/-]+\.html)")
site = PROJECT["project"]["urls"]["Documentation"]
owner = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
files = [*ROOT.glob("*.md"), ROOT / "CITATION.cff", *(ROOT / "docs").rglob("*.md")]
files += (ROOT / "notebooks").glob("*.*")
for path in files:
    text = path.read_text(encoding="utf-8")
    new = NAME.sub(lambda found: f"{found.group(1)}/{owner}", text)
    new = SITE.sub(f"{site}/", new)
    if new != text:
        path.write_text(new, encoding="utf-8")
        print(path.relative_to(ROOT))
