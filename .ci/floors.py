"""Prints the lowest versions that pyproject.toml admits, as constraints for pip.

Those of the packages that the support policy names: the core dependencies, and flax.
"""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]["experiments"]
bounds = project["dependencies"] + [need for need in extras if need.startswith("flax")]
for need in bounds:
    match = re.fullmatch(r"([\w-]+)>=([\d.]+)", need)
    if match is None:
        raise SystemExit(f"floors.py: {need!r} is not of the form name>=version")
    print("==".join(match.groups()))
