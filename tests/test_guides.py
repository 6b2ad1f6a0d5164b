"""The pages in docs/: their blocks run, and print what they say they print."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_optax

nnx = pytest.importorskip("flax.nnx")

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# Pages that are one program: their blocks run in order.
GUIDES = (
    *("recipes", "fine-tuning", "low-rank-adapters", "deploy", "analysis"),
    "channels",
    *("budgets-and-patterns", "masks-and-reports", "questions", "moving"),
    *("mixed-precision", "tour", "transformers", "seeds-and-ensembles"),
    *("continual-learning", "reinforcement-learning", "scan-and-remat"),
    "prune-until-lossless",
    "faster-training",
    "imagenet",
)
# Each block is a program of its own.
PROGRAMS = ("four-frameworks",)
# A program that starts with other devices than the tests have.
PROCESSES = ("meshes",)
# Blocks that show how a call looks, or that other tests run.
SHOWN = ("which-weights", "file-format")
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def blocks(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def is_missing(block):
    """Whether a block begins with a line that names packages which are not here."""
    said = re.match(r"# Needs the packages? (.+)\.\n", block)
    names = said[1].split(" and ") if said else []
    return not all(map(importlib.util.find_spec, names))


def promised(block):
    """What a line ``print(...)  # text`` says that it prints: the first words of it."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", block, re.MULTILINE)


def check_promised(block, printed):
    """Each promise begins with a printed line, in their order; how many there are."""
    lines = iter(printed.splitlines())
    for said in promised(block):
        starts = (f"{line}{end}" for line in lines for end in (" ", ":", ",", "."))
        assert any(f"{said} ".startswith(start) for start in starts), said
    return len(promised(block))


def run(block, guide, names):
    out = io.StringIO()
    # What users write may broadcast, which the tests of this package may not.
    with contextlib.redirect_stdout(out), jax.numpy_rank_promotion("allow"):
        exec(compile(block, f"docs/{guide}.md", "exec"), names)
    return check_promised(block, out.getvalue())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a block saves lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_runs_and_prints_what_it_says(guide):
    names = {}
    here = [block for block in blocks(guide) if not is_missing(block)]
    assert sum(run(block, guide, names) for block in here)


@pytest.mark.parametrize(
    ("guide", "number"),
    [(guide, i) for guide in PROGRAMS for i in range(len(blocks(guide)))],
)
def test_every_program_runs_alone(guide, number):
    assert run(blocks(guide)[number], guide, {})


@pytest.mark.parametrize("guide", PROCESSES)
def test_a_page_with_devices_of_its_own(guide):
    program = "\n".join(blocks(guide))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    # A program's key does not tell how a selection is divided among devices.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert check_promised(program, done.stdout)


def test_every_page_with_python_is_run():
    known = (*GUIDES, *PROGRAMS, *PROCESSES, *SHOWN)
    with_python = {page.removesuffix(".md") for page in PAGES}
    assert {page for page in with_python if blocks(page)} == set(known)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        path = (DOCS / page).parent / name if name else DOCS / page
        assert path.exists(), target
        if heading:
            linked = path.read_text(encoding="utf-8")
            slugs = [
                re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
                for x in re.findall(r"^#+ (.+)$", linked, re.MULTILINE)
            ]
            assert heading in slugs, target


@pytest.mark.parametrize("framework", ["nnx", "pure", "equinox", "linen"])
def test_masks_of_torch_find_their_leaves(framework):
    """The function of the page, with the trees of each framework and a wrong name."""
    [block] = [block for block in blocks("moving") if "def from_torch" in block]
    names = {"jax": jax, "jnp": jnp, "np": np, "optax": optax}
    exec(block.partition("# Of torch")[0], names)
    there = np.eye(4, 3)  # (out, in)
    if framework == "equinox":
        eqx = pytest.importorskip("equinox")
        model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
        params, name = eqx.filter(model, eqx.is_inexact_array), "layers/0/weight"
        found = lambda masks: masks.layers[0].weight  # noqa: E731
    elif framework == "linen":
        params, name = {"fc": {"kernel": jnp.ones((3, 4))}}, "fc/kernel"
        found = lambda masks: masks["fc"]["kernel"].T  # noqa: E731
    else:
        model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        params, name = nnx.state(model, nnx.Param), "layers/0/kernel"
        params = nnx.as_pure(params) if framework == "pure" else params
        found = lambda masks: jax.tree.leaves(masks)[0].T  # noqa: E731
    assert name in {
        leaf.name for leaf in sparse_optax.report.eligibility(params).leaves
    }
    masks = names["from_torch"](
        {"fc.weight_mask": there}, params, {name: "fc.weight_mask"}
    )
    np.testing.assert_array_equal(found(masks), there.astype(bool))
    assert sparse_optax.masks.count(masks) == 3
    with pytest.raises(AssertionError, match="no such leaves"):
        names["from_torch"]({"m": there}, params, {name: "m", "fc9/kernel": "m"})
