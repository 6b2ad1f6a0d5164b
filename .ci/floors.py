"""Prints the lowest versions that pyproject.toml admits, as constraints for pip.

    python .ci/floors.py       # of the library with its extra `experiments`
    python .ci/floors.py core  # of the library alone

Those of the packages that the support policy names: the core dependencies, and flax.
The extra may ask for a newer jax than the library does.
"""

import pathlib
import re
import sys
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]["experiments"]
named = ("flax", "jax", "jaxlib", "optax", "numpy")
needs = list(project["dependencies"])
if sys.argv[1:] != ["core"]:
    needs += [need for need in extras if re.split(r"[^\w-]", need)[0] in named]
floors = {}
for need in needs:
    match = re.fullmatch(r"([\w-]+)>=([\d.]+)", need)
    if match is None:
        raise SystemExit(f"floors.py: {need!r} is not of the form name>=version")
    name, version = match.groups()
    floors[name] = version  # that of the extra comes last
for name, version in floors.items():
    print(f"{name}=={version}")
