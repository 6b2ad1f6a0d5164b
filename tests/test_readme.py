"""The README keeps its promises: its commands exist and its Python runs."""

import contextlib
import io
import itertools
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_optax

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    return [body for name, body in FENCE.findall(text) if name == language]


def section(title):
    """The text under a second-level heading."""
    _, found, rest = README.partition(f"\n## {title}\n")
    assert found, f"the README has no section {title!r}"
    return rest.partition("\n## ")[0]


# --- commands -------------------------------------------------------------------------


def test_quick_start_is_two_blocks():
    assert len(blocks(section("Quick start"), "sh")) == 2
    assert len(blocks(README, "sh")) == 2


def test_first_block_ends_in_the_main_job_and_the_second_in_the_tests():
    first, second = (block.splitlines() for block in blocks(README, "sh"))
    assert first[-1] == "sparse-optax train"
    assert "sparse-optax" in PROJECT["project"]["scripts"]
    assert second[-1] == "pytest -n auto"


@pytest.mark.parametrize("number", [0, 1])
def test_each_block_makes_its_own_environment_and_installs_what_it_runs(number):
    block = blocks(README, "sh")[number]
    make, activate, install, _ = block.splitlines()
    assert make.endswith("python3 -m venv .venv")
    assert activate == ". .venv/bin/activate"
    (extra,) = re.findall(r'^pip install -e "\.\[(\w+)\]"$', install)
    needed = PROJECT["project"]["optional-dependencies"][extra]
    tool = ("tyro", "pytest")[number]
    assert any(requirement.startswith(tool) for requirement in needed)


def test_python_floor_is_the_one_of_the_package():
    assert "Python 3.11 or newer" in section("Quick start")
    assert PROJECT["project"]["requires-python"] == ">=3.11"


# --- text -----------------------------------------------------------------------------


def test_results_markers_stand_once_and_in_order():
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert README.count(begin) == README.count(end) == 1
    assert README.index(begin) < README.index(end)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_links_into_the_repository_lead_somewhere():
    """They are absolute, so that they work on PyPI, too."""
    home = re.escape(PROJECT["project"]["urls"]["Repository"])
    targets = re.findall(rf"\]\({home}/(?:blob|tree)/main/([^)#]+)(?:#\S*)?\)", README)
    assert {"LICENSE", "docs/results.md"} <= set(targets)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
    assert not re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)


def test_pictures_have_the_address_of_the_repository():
    home = PROJECT["project"]["urls"]["Repository"]
    raw = home.replace("https://github.com", "https://raw.githubusercontent.com")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert picture.startswith(f"{raw}/main/")
        assert (ROOT / picture.removeprefix(f"{raw}/main/")).is_file()


def test_files_named_in_the_text_exist():
    named = re.findall(r"`([\w./]+/[\w./]+\.(?:md|ipynb|py))`", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_methods_of_the_table_are_public():
    cells = re.findall(r"^\| (`[^|]+) \|", section("Methods"), re.MULTILINE)
    rows = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert {"sparse_momentum_regrow", "gsm_mask"} <= set(rows)
    missing = [name for name in rows if not hasattr(sparse_optax, name)]
    assert not missing


def test_methods_that_are_public_are_named():
    public = [
        name
        for name, value in vars(sparse_optax.methods).items()
        if callable(value) and not isinstance(value, type) and name[0] != "_"
    ]
    missing = [name for name in public if f"`{name}`" not in section("Methods")]
    assert public
    assert not missing


def test_rules_of_the_table_exist():
    page = (ROOT / "docs" / "budgets-and-patterns.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `regrowth\.(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    assert [kind for kind, _ in rows] == ["prune", "redistribute", "grow"]
    for kind, names in rows:
        module = getattr(sparse_optax.regrowth, kind)
        for name in re.findall(r"`(\w+)`", names):
            assert isinstance(getattr(module, name), sparse_optax.regrowth.Rule)


# --- snippets -------------------------------------------------------------------------
WEIGHTS, KEPT = 50_200, 2_510  # of LeNet-300-100 on 8 x 8 pixels, and 5% of each layer


def run(snippet, names):
    # What users write may broadcast, which the tests of this package may not.
    with jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, "README.md", "exec"), names)  # the README's own text
    return names


def nonzeros(params):
    return sum(int(jnp.count_nonzero(layer["kernel"])) for layer in params)


@pytest.fixture(scope="module")
def program():
    """The names after the program was pasted, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        names = run(blocks(README, "python")[0], {})
    # What later blocks do to `names` leaves the copy as it was.
    return dict(names), out.getvalue(), names


def test_the_program_is_short_and_complete():
    first, *others = blocks(README, "python")
    code = [line for line in first.splitlines() if line.strip()]
    assert len(code) <= 34
    assert len(others) == 2


def test_the_program_trains_at_its_exact_count(program):
    names, printed, _ = program
    said = re.fullmatch(r"2,510 of 50,200 weights, test error ([\d.]+)%\n", printed)
    assert said is not None
    assert float(said.group(1)) < 15
    masks = sparse_optax.get_masks(names["opt_state"])
    assert sparse_optax.masks.count(masks) == KEPT
    assert nonzeros(names["params"]) <= KEPT
    for layer, mask in zip(names["params"], masks, strict=True):
        assert not np.any(np.asarray(layer["kernel"])[~np.asarray(mask["kernel"])])


def test_the_program_moves_weights(program):
    names, *_ = program
    start = jax.tree.leaves(sparse_optax.get_masks(names["tx"].init(names["params"])))
    end = jax.tree.leaves(sparse_optax.get_masks(names["opt_state"]))
    assert any(bool(jnp.any(a != b)) for a, b in zip(start, end, strict=True))


def test_gsm_snippet_lets_the_asked_share_pass_and_cuts(program, capsys):
    names = run(blocks(README, "python")[1], program[2])
    assert len(capsys.readouterr().out.split()) > 3  # the advice
    params, tx = program[0]["params"], names["tx"]
    start = jax.tree.map(jnp.ones_like, params)
    gradients = jax.tree.map(jnp.ones_like, params)
    decay_only = jax.tree.map(jnp.zeros_like, params)
    moved, _ = tx.update(gradients, tx.init(start), start)
    decayed, _ = tx.update(decay_only, tx.init(start), start)
    passed = jax.tree.map(lambda a, b: a - b, moved, decayed)
    assert nonzeros(passed) == int(WEIGHTS * 0.05)
    for layer in decayed:
        assert not np.any(np.asarray(layer["bias"]))  # decay reaches kernels alone
    assert sparse_optax.masks.count(names["masks"]) == int(WEIGHTS * 0.05)
    assert nonzeros(names["params"]) <= int(WEIGHTS * 0.05)
    # The train step of the program trains with it: jit sees another state.
    step = "params, opt_state = train_step(params, opt_state, x[:32], y[:32])"
    again = run(step, names)
    assert int(optax.tree.get(again["opt_state"], "GsmState").count) == 1


def test_report_snippet_tells_and_keeps_the_run(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(blocks(README, "python")[1], dict(program[0]))
    before = names["params"]
    capsys.readouterr()
    names = run(blocks(README, "python")[2], names)
    (total,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tot")]
    assert total.split()[1:3] == [f"{WEIGHTS:,}", f"{KEPT:,}"]
    size = (tmp_path / "model.sparse").stat().st_size
    assert 4 * KEPT < size < 4 * KEPT + WEIGHTS // 8 + 4 * 410 + 600
    after = names["params"]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- the page of the engine -----------------------------------------------------------
ALGEBRA = (ROOT / "sparse_optax" / "regrowth" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [0, 1])
def test_a_rule_of_the_page_trains_and_has_fifteen_lines(number):
    names = {}
    for rule in blocks(ALGEBRA, "python")[: number + 1]:
        lines = rule.split("tx = ")[0].splitlines()
        code = [x for x in lines if x.strip() and not x.startswith(("import", "from"))]
        assert len(code) <= 15
        names = run(rule, names)
    rng = np.random.default_rng(0)
    sizes = itertools.pairwise((16, 40, 30, 8))
    params = [
        {"kernel": jnp.asarray(rng.normal(size=size) / 4, jnp.float32)}
        for size in sizes
    ]
    x = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)

    def loss(params):
        y = x
        for layer in params:
            y = jnp.tanh(y @ layer["kernel"])
        return jnp.mean(y**2)

    tx = names["tx"]
    state = tx.init(params)
    before = sparse_optax.get_masks(state)
    step = jax.jit(tx.update)
    for _ in range(101):
        updates, state = step(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    after = sparse_optax.get_masks(state)
    assert nonzeros(params) <= sparse_optax.masks.count(after) == 32 + 60 + 12
    moved = sparse_optax.masks.combine(jnp.logical_xor, before, after)
    assert sparse_optax.masks.count(moved) > 0
