"""The guides in docs/: their blocks run, and print what they say they print."""

import contextlib
import io
import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
GUIDES = ("recipes", "fine-tuning", "low-rank-adapters", "deploy", "analysis")


def blocks(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def promised(block):
    """What a line ``print(...)  # text`` says that it prints: the first words of it."""
    return re.findall(r"^print\(.*\)  # (.+)$", block, re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_runs_and_prints_what_it_says(guide):
    names, found = {}, 0
    for block in blocks(guide):
        out = io.StringIO()
        # What users write may broadcast, which the tests of this package may not.
        with contextlib.redirect_stdout(out), jax.numpy_rank_promotion("allow"):
            exec(compile(block, f"docs/{guide}.md", "exec"), names)
        for said, line in zip(
            promised(block), out.getvalue().splitlines(), strict=True
        ):
            assert said == line or said.startswith((f"{line} ", f"{line}:", f"{line},"))
            found += 1
    assert found


@pytest.mark.parametrize("guide", GUIDES)
def test_links_of_a_guide_lead_somewhere(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, heading = target.partition("#")
        page = (DOCS / name).read_text(encoding="utf-8")
        slugs = [
            re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-")
            for x in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        ]
        assert not heading or heading in slugs
