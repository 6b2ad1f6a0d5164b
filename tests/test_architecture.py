"""The rules of the house that no single function can break: imports, docs, names."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import sparse_optax

PACKAGE = pathlib.Path(sparse_optax.__file__).parent

# Dependencies only point upward in this list; an entry ending in a slash is a folder.
# A new file gets its place here, above all that import it.
ORDER = (
    "checks.py",
    "selection/",
    "schedules/",
    "roles.py",
    "contraction.py",
    "patterns.py",
    "layers.py",
    "encoding.py",
    "budgets/",
    "masks/",
    "transforms/",
    "gsm/",
    "export/",
    "scoring/",
    "regrowth/",
    "methods/",
    "structured/",
    "report/",
    "analysis/",
    "plot.py",
    "__init__.py",
    "experiments/",
)
# What the core may import; the rest of the environment serves experiments and tests.
CORE_NEEDS = {"jax", "optax", "numpy", "sparse_optax"}
# Asked for inside a function, by those who convert to it; see the import test below.
ON_DEMAND = {"export/model.py": {"scipy"}, "contraction.py": {"flax"}}
ON_DEMAND |= {"export/sparse.py": {"scipy"}}
ON_DEMAND |= {"plot.py": {"matplotlib"}}


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _place(path):
    """Rank in ORDER of a file of the package, or None."""
    name = path.relative_to(PACKAGE).as_posix()
    for rank, entry in enumerate(ORDER):
        if name == entry or (entry.endswith("/") and name.startswith(entry)):
            return rank
    return None


def _is_core(path):
    return not path.relative_to(PACKAGE).as_posix().startswith("experiments/")


def _module_file(name):
    """The file of ``sparse_optax.a.b``, or None if it is not a module."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(path):
    """Full names of all modules that a file imports: in functions, for types too."""
    package = ["sparse_optax", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                inside = base.startswith("sparse_optax") and _module_file(whole)
                yield whole if inside else base


def _imported_files(path):
    for name in _imports(path):
        if name.split(".")[0] == "sparse_optax":
            found = _module_file(name)
            if found is not None and found != path:
                yield found


def _ids(path):
    return path.relative_to(PACKAGE).as_posix()


CORE = [path for path in _files() if _is_core(path)]


# --- imports --------------------------------------------------------------------------


def test_every_file_has_its_place():
    assert [_ids(p) for p in _files() if _place(p) is None] == []


@pytest.mark.parametrize("path", _files(), ids=_ids)
def test_dependencies_point_upward(path):
    below = [
        f"{_ids(path)} imports {_ids(found)}"
        for found in _imported_files(path)
        if _place(found) > _place(path)
    ]
    assert below == []


def test_no_cycles():
    """Within a folder too, where the list above says nothing."""
    graph = {path: set(_imported_files(path)) for path in _files()}
    # A package's __init__ gathers what its files define; they may not ask it back.
    while graph:
        free = [path for path, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a cycle among {sorted(map(_ids, graph))}"
        for path in free:
            del graph[path]


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_core_imports_jax_optax_numpy_and_nothing_else(path):
    allowed = CORE_NEEDS | sys.stdlib_module_names | ON_DEMAND.get(_ids(path), set())
    foreign = {name for name in _imports(path) if name.split(".")[0] not in allowed}
    assert foreign == set()


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_core_does_not_import_private_parts_of_others(path):
    private = {
        name
        for name in _imports(path)
        if name.split(".")[0] in ("jax", "optax") and "._src" in name
    }
    assert private == set()


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_core_does_not_import_experiments(path):
    names = [n for n in _imports(path) if n.startswith("sparse_optax.experiments")]
    assert names == []


IMPORT = """
import importlib.abc, sys

BLOCKED = {"flax", "matplotlib", "chex", "orbax", "sklearn", "scipy", "pooch", "tyro",
           "rich", "pandas", "tensorflow", "torch", "hypothesis", "pytest"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # What jax and optax need themselves is theirs to import.
        frame = sys._getframe(1)
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asks = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in BLOCKED and asks.split(".")[0] not in NEEDS:
            raise ImportError(f"{asks} asks for {name}, which is blocked")

NEEDS = {"jax", "jaxlib", "optax", "numpy", "ml_dtypes", "opt_einsum", "scipy", "absl"}
import jax, optax, numpy
before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import sparse_optax
import jax.numpy as jnp
tx = sparse_optax.sparse_momentum_regrow(
    optax.sgd(0.1, momentum=0.9), density=0.5, update_period=1, update_stop=4, key=0)
params = {"w": jnp.ones((4, 4))}
state = tx.init(params)
for _ in range(2):
    updates, state = tx.update(params, state, params)
print(sparse_optax.masks.count(sparse_optax.get_masks(state)))
roots = {m.split(".")[0] for m in set(sys.modules) - before}
print(*sorted(roots - NEEDS - set(sys.stdlib_module_names)))
"""


def test_import_and_use_without_the_extras(tmp_path):
    """In a process where flax and its kin cannot be imported by this package."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, imported = done.stdout.splitlines()
    assert count == "8"
    assert imported.split() == ["sparse_optax"]


def test_importing_touches_no_configuration():
    """No ``config.update``, no environment variable, no device at import."""
    for path in CORE:
        for node in ast.parse(path.read_text()).body:
            text = ast.unparse(node) if isinstance(node, ast.Expr) else ""
            assert "config.update" not in text, f"{_ids(path)}: {text}"
            assert "environ" not in text, f"{_ids(path)}: {text}"


# --- docs -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_no_future_annotations(path):
    """Optax reads the annotations of factories: they must be objects, not text."""
    assert "from __future__ import annotations" not in path.read_text()


def _exports(path):
    """Names that an ``__init__`` gives out on purpose: ``import X as X``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (a.asname for a in node.names if a.asname == a.name)


def _public(module=sparse_optax):
    """All functions and classes that can be reached through exported names."""
    found = {}
    path = pathlib.Path(module.__file__)
    is_package = path.name == "__init__.py"
    for name in list(_exports(path)) if is_package else module.__all__:
        thing = getattr(module, name)
        if name.startswith("_") or not _is_ours(thing):
            continue
        if isinstance(thing, types.ModuleType):
            if is_package:
                found |= _public(thing)
        elif is_package or thing.__module__ == module.__name__:
            found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return dict(sorted(found.items()))


def _is_ours(thing):
    if isinstance(thing, types.ModuleType):
        return thing.__name__.startswith("sparse_optax")
    return (inspect.isfunction(thing) or inspect.isclass(thing)) and (
        thing.__module__.startswith("sparse_optax")
    )


def test_there_are_public_names():
    assert len(_public()) > 50


@pytest.mark.parametrize(("name", "thing"), _public().items(), ids=_public().keys())
def test_public_names_have_docs_with_examples(name, thing):
    """Functions show an example; records say what each field is."""
    doc = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and issubclass(thing, tuple):
        # The docstring that NamedTuple makes by itself does not say what fields are.
        assert "Attributes:" in doc, f"{name} does not describe its fields"
        for field in thing._fields:
            assert f"{field}:" in doc, f"{name} does not describe {field}"
        return
    if inspect.isclass(thing):
        assert doc, f"{name} has no docstring"
        return
    assert "Examples:" in doc, f"{name} has no example"
    assert ">>>" in doc.split("Examples:")[1], f"{name} has an empty example"
    parameters = inspect.signature(thing).parameters
    for parameter in parameters:
        assert f"{parameter}:" in doc, f"{name} does not describe {parameter}"


METHODS = sorted(
    name
    for name, thing in vars(sparse_optax.methods).items()
    if inspect.isfunction(thing) and "inner" in inspect.signature(thing).parameters
)
HIDDEN = {"network_surgery", "straight_through_magnitude"}


def test_there_are_methods():
    assert {"rigl", "static_sparse", "top_kast", "ham"} <= set(METHODS)


@pytest.mark.parametrize("name", ["regrow", *(m for m in METHODS if m != "ham")])
def test_a_method_says_how_to_clip(name):
    """A clip outside of it measures missing weights, and nothing tells."""
    doc = inspect.getdoc(getattr(sparse_optax, name))
    assert "Clip gradients inside" in doc or "clip_by_global_norm" in doc
    assert (name in HIDDEN) == ("has the right norm" in doc)


@pytest.mark.parametrize("name", ["regrow", *METHODS])
def test_a_method_that_takes_a_key_says_how_members_get_theirs(name):
    """One integer under ``jax.vmap`` gives all members the same masks."""
    thing = getattr(sparse_optax, name)
    doc = inspect.getdoc(thing)
    has_key = "key" in inspect.signature(thing).parameters
    assert has_key == ("give each member its own by ``in_axes``" in doc)


def _checks(node):
    """Whether a statement only raises where something is wrong."""
    if isinstance(node, ast.If | ast.For):
        return all(map(_checks, [*node.body, *node.orelse]))
    text = ast.unparse(node)
    return isinstance(node, ast.Raise) or text.startswith(("checks.", "cure = "))


def _own_code(path):
    """Lines of functions that neither check, nor document, nor hand a call back."""
    text, numbers = path.read_text(), set()

    def visit(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                visit(node.body)
            elif not (
                _checks(node)
                or isinstance(node, ast.Import | ast.ImportFrom)
                or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
                or (isinstance(node, ast.Return) and isinstance(node.value, ast.Call))
            ):
                numbers.update(range(node.lineno, node.end_lineno + 1))

    visit(ast.parse(text).body)
    lines = [
        line.strip() for i, line in enumerate(text.splitlines(), 1) if i in numbers
    ]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=_ids)
def test_a_method_is_a_composition(path):
    assert len(_own_code(path)) <= 30


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_no_function_is_told_its_callers_name(path):
    """``checks.boundary`` puts it in front of errors, once."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
            assert "caller" not in names, f"{_ids(path)}: {node.name}"


@pytest.mark.parametrize("path", CORE, ids=_ids)
def test_errors_about_arguments_can_be_given_a_name(path):
    """A bare ValueError would not get the name of the function that was called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            text = ast.unparse(node.exc)
            plain = text.startswith("ValueError(") and "`" in text
            assert not plain, f"{_ids(path)}: {text[:60]}"


FUNCTIONS = [
    name
    for name in sparse_optax.__all__
    if inspect.isfunction(getattr(sparse_optax, name))
]


def test_dir_shows_what_is_promised_and_nothing_else():
    assert set(dir(sparse_optax)) == {*sparse_optax.__all__, "__version__"}
    assert sorted(sparse_optax.__all__) == sparse_optax.__all__


@pytest.mark.parametrize("name", sparse_optax.__all__)
def test_the_promised_surface(name):
    thing = getattr(sparse_optax, name)
    if not isinstance(thing, types.ModuleType):
        # One object, under its short and its long name.
        module = importlib.import_module(thing.__module__)
        assert getattr(module, name) is thing


def test_help_opens_with_the_methods():
    """The docstring of the package names all that users call, one group a paragraph."""
    named = re.findall(r"``([\w.]+)``", sparse_optax.__doc__)
    assert set(FUNCTIONS) <= set(named)
    assert all(hasattr(sparse_optax, n.split(".")[0]) for n in named)


def test_errors_carry_the_public_name():
    """Every function that can raise about its arguments has the boundary."""
    for name in FUNCTIONS:
        assert hasattr(getattr(sparse_optax, name), "__wrapped__"), name


def test_rooms_are_listed_where_contributors_look():
    """CONTRIBUTING names them from top to bottom, as the list above."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rooms = [entry for entry in ORDER if entry != "__init__.py"]
    named = [room for room in re.findall(r"`([\w/.]+)`", text) if room in rooms]
    assert list(dict.fromkeys(named)) == rooms


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
