"""The documentation site: every public name and every page is in it."""

import inspect
import pathlib
import re
import runpy
import tomllib
import types

import pytest

import sparse_optax
from sparse_optax import regrowth
from sparse_optax.experiments import readme

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = (
    *(m for m in vars(sparse_optax).values() if inspect.ismodule(m)),
    *(regrowth.prune, regrowth.redistribute, regrowth.grow),
)
ENTRY = re.compile(r"^\.\. auto(?:function|class|data):: (\S+)$", re.MULTILINE)


def entries():
    """What the pages document, by its full name."""
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")]
    return [name for page in pages for name in ENTRY.findall(page)]


def found(name):
    """The object of a full name."""
    parts = name.split(".")[1:]
    value = sparse_optax
    for part in parts:
        value = getattr(value, part)
    return value


def public(module):
    names = getattr(module, "__all__", None) or [n for n in dir(module) if n[0] != "_"]
    values = {name: getattr(module, name) for name in names}
    return {n: v for n, v in values.items() if not isinstance(v, types.ModuleType)}


def is_public(module):
    short = module.__name__.removeprefix("sparse_optax.")
    return short in sparse_optax.__all__ or short.startswith("regrowth.")


@pytest.mark.parametrize(
    "module",
    [sparse_optax, *filter(is_public, MODULES)],
    ids=lambda module: module.__name__,
)
def test_every_public_name_has_an_entry(module):
    documented = [found(name) for name in entries()]
    missing = [
        name
        for name, value in public(module).items()
        if not any(value is each for each in documented)
    ]
    assert public(module)
    assert not missing


def test_no_name_has_two_entries():
    names = entries()
    assert len(names) == len(set(names)) > 100


def listed(page):
    """What the toctrees of a page name, as paths below docs."""
    text = (DOCS / page).read_text(encoding="utf-8")
    trees = re.findall(r"^```{toctree}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for tree in trees for line in tree.splitlines()]
    folder = pathlib.PurePath(page).parent
    return [str(folder / f"{x}.md") for x in lines if x and not x.startswith(":")]


def test_every_page_is_in_the_index():
    names = listed("index.md") + listed("methods/index.md")
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages - {"index.md"} - set(names) == set()
    assert len(names) == len(set(names))


def test_every_method_has_a_page_with_its_results():
    pages = {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"}
    assert set(readme.METHOD_PAGES) <= pages
    texts = [path.read_text("utf-8") for path in (DOCS / "methods").glob("*.md")]
    with_page = {found(name) for text in texts for name in ENTRY.findall(text)}
    methods = {v for v in vars(sparse_optax.methods).values() if inspect.isfunction(v)}
    assert methods <= with_page


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_every_notebook_is_a_pair():
    scripts = {path.stem for path in (ROOT / "notebooks").glob("*.py")} - {"execute"}
    assert {path.stem for path in NOTEBOOKS} == scripts
    assert len(scripts) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_outputs_of_its_script(path):
    jupytext = pytest.importorskip("jupytext")
    made, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert [c.source for c in made.cells] == [c.source for c in script.cells]
    outputs = [x for c in made.cells for x in c.get("outputs", ())]
    assert any("image/png" in x.get("data", ()) for x in outputs)
    assert not [x for x in outputs if x.output_type == "error"]
    assert not [x for x in outputs if x.get("name") == "stderr"]


def test_the_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = project["project"]["version"]
    assert sparse_optax.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) in ([], [version])


def test_addresses_are_those_of_the_project():
    """Publishing elsewhere is one edit, and `.ci/addresses.py` writes the others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    home, site = (
        project["project"]["urls"][x] for x in ("Repository", "Documentation")
    )
    owner = home.removeprefix("https://github.com/")
    hosts = r"(?:github\.com|raw\.githubusercontent\.com|research\.google\.com/github)"
    files = [
        *ROOT.glob("*.md"),
        ROOT / "CITATION.cff",
        ROOT / "pyproject.toml",
        *DOCS.rglob("*.md"),
        *(ROOT / "notebooks").glob("*.*"),
    ]
    seen = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(rf"{hosts}/([\w.-]+/sparse[_-]optax)", text):
            assert name == owner, path
            seen += 1
        for address in re.findall(r"https://\S+?/sparse[_-]optax/\S+\.html", text):
            page = address.removeprefix(f"{site}/")
            assert (DOCS / page).with_suffix(".md").exists(), (path, address)
    assert seen > 10


def test_the_figure_of_all_methods_is_that_of_the_records():
    """Draw it again with `python docs/images/methods.py` where this fails."""
    image = pytest.importorskip("PIL.Image")
    path = DOCS / "images" / "methods.py"
    names = runpy.run_path(str(path))
    records = names["readme"].read_table(names["table"].TABLE, names["RESULTS"])
    drawn = image.open(path.with_suffix(".png")).text["Source"]
    assert drawn == names["fingerprint"](records)
