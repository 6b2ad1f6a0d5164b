"""The README keeps its promises: its commands exist and its Python runs."""

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


def test_links_into_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert "LICENSE" in targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


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
    rows = re.findall(
        r"^\| `regrowth\.(\w+)` \| ([^|]+) \|", section("Methods"), re.MULTILINE
    )
    assert [kind for kind, _ in rows] == ["prune", "redistribute", "grow"]
    for kind, names in rows:
        module = getattr(sparse_optax.regrowth, kind)
        for name in re.findall(r"`(\w+)`", names):
            assert isinstance(getattr(module, name), sparse_optax.regrowth.Rule)


# --- snippets -------------------------------------------------------------------------

STEPS_PER_EPOCH, EPOCHS = 4, 3
SIZES = (16, 40, 30, 8)
WEIGHTS = sum(a * b for a, b in itertools.pairwise(SIZES))


def network():
    """A small net, its loss and its batch: what the snippets take for given."""
    rng = np.random.default_rng(0)
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=shape) / 4, jnp.float32),
            "bias": jnp.zeros(shape[1]),
        }
        for i, shape in enumerate(itertools.pairwise(SIZES))
    }

    def loss(params, batch):
        x, y = batch
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None, :])
        return jnp.mean((x - y) ** 2)

    batch = (
        jnp.asarray(rng.normal(size=(32, SIZES[0])), jnp.float32),
        jnp.asarray(rng.uniform(-1, 1, size=(32, SIZES[-1])), jnp.float32),
    )
    return {
        "params": params,
        "loss": loss,
        "batch": batch,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": STEPS_PER_EPOCH * EPOCHS,
    }


def run(snippet, names):
    exec(compile(snippet, "README.md", "exec"), names)  # the README's own text
    return names


def snippet(part):
    (found,) = [body for body in blocks(README, "python") if part in body]
    return found


def nonzeros(params):
    return sum(int(jnp.count_nonzero(layer["kernel"])) for layer in params.values())


def train(names, steps):
    params, state = names["params"], names["opt_state"]
    for _ in range(steps):
        params, state = names["train_step"](params, state, names["batch"])
    return {**names, "params": params, "opt_state": state}


@pytest.fixture(scope="module")
def started():
    """The names after the first snippet, before any step."""
    return run(snippet("def train_step("), network())


@pytest.fixture(scope="module")
def trained(started):
    """The same after a few epochs of the snippet's train step."""
    return train(started, STEPS_PER_EPOCH * EPOCHS)


def kept(density):
    return sum(int(density * a * b) for a, b in itertools.pairwise(SIZES))


def test_every_python_snippet_is_run_here():
    marks = ("def train_step(", "gsm_mask(", "gsm_gap(", "get_masks(")
    marks += ("save_sparse(", "keep=masks", "optax.partition(")
    assert sorted(map(snippet, marks)) == sorted(blocks(README, "python"))


def test_sparse_momentum_snippet_starts_and_stays_at_the_count(started, trained):
    assert nonzeros(started["params"]) == kept(0.05)
    before = float(started["loss"](started["params"], started["batch"]))
    masks = sparse_optax.get_masks(trained["opt_state"])
    assert sparse_optax.masks.count(masks) == kept(0.05)
    for layer, mask in zip(trained["params"].values(), masks.values(), strict=True):
        assert not np.any(np.asarray(layer["kernel"])[~np.asarray(mask["kernel"])])
    assert float(trained["loss"](trained["params"], trained["batch"])) < before


def test_sparse_momentum_snippet_moves_weights(started, trained):
    start = jax.tree.leaves(sparse_optax.get_masks(started["opt_state"]))
    end = jax.tree.leaves(sparse_optax.get_masks(trained["opt_state"]))
    assert any(bool(jnp.any(a != b)) for a, b in zip(start, end, strict=True))


def test_shared_budget_snippet_keeps_one_budget_over_two_methods(started):
    names = run(snippet("optax.partition("), dict(started))
    counts = {name: layer["kernel"] for name, layer in names["counts"].items()}
    assert sum(counts.values()) == int(0.05 * WEIGHTS)
    params, tx = started["params"], names["tx"]
    state, step = tx.init(params), jax.jit(tx.update)
    for done in range(STEPS_PER_EPOCH * EPOCHS):
        grads = jax.grad(names["loss"])(params, names["batch"])
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        found = {
            name: int(layer["kernel"].sum())
            for name, layer in sparse_optax.get_masks(state).items()
        }
        if done < STEPS_PER_EPOCH:  # pruned along a ramp, from all on
            assert found["Dense_2"] == params["Dense_2"]["kernel"].size
        assert found["Dense_0"] + found["Dense_1"] == (
            counts["Dense_0"] + counts["Dense_1"]
        )
    assert found["Dense_2"] == counts["Dense_2"]
    assert nonzeros(params) <= sum(counts.values())


def test_gsm_snippet_lets_the_asked_share_pass():
    names = run("import optax, sparse_optax\n" + snippet("gsm_mask("), network())
    params = names["params"]
    gradients = jax.tree.map(jnp.ones_like, params)
    decay_only = jax.tree.map(jnp.zeros_like, params)
    tx = names["tx"]
    moved, _ = tx.update(gradients, tx.init(params), params)
    decayed, _ = tx.update(decay_only, tx.init(params), params)
    passed = jax.tree.map(lambda a, b: a - b, moved, decayed)
    assert nonzeros(passed) == int(WEIGHTS / 60)
    for layer in decayed.values():
        assert not np.any(np.asarray(layer["bias"]))  # decay reaches kernels alone


def test_cut_snippet_leaves_the_asked_share_and_gives_advice(capsys):
    names = run("import optax, sparse_optax\n" + snippet("gsm_mask("), network())
    names["opt_state"] = names["tx"].init(names["params"])
    names = run(snippet("gsm_gap("), names)
    assert nonzeros(names["params"]) == int(WEIGHTS / 60)
    assert len(capsys.readouterr().out.split()) > 3


def test_mask_snippet_reads_and_writes_the_state(trained, capsys):
    names = run(snippet("get_masks("), dict(trained))
    count, density, skipped, misplaced = capsys.readouterr().out.split()
    assert int(count) == kept(0.05)
    assert float(density) == pytest.approx(kept(0.05) / WEIGHTS, rel=1e-6)
    assert int(skipped) == int(misplaced) == 0
    before = optax.tree.get(trained["opt_state"], "regrow_masks")
    after = optax.tree.get(names["opt_state"], "regrow_masks")
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_average_snippet_gives_masks_of_now_and_another_density(trained):
    names = dict(trained)
    run("import sparse_optax\n" + snippet("get_masks("), names)
    names["average"] = jax.tree.map(jnp.ones_like, names["params"])
    run(snippet("keep=masks"), names)
    assert nonzeros(names["average"]) == kept(0.05)
    count = sparse_optax.masks.count
    assert count(names["fewer"]) == int(0.02 * WEIGHTS)
    assert count(sparse_optax.get_masks(names["opt_state"])) == kept(0.1)
    assert nonzeros(names["params"]) <= kept(0.05)
    train(names, 1)


def test_report_snippet_tells_and_keeps_the_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(snippet("save_sparse("), dict(trained))
    (total,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tot")]
    assert total.split()[1:3] == [f"{WEIGHTS:,}", str(kept(0.05))]
    assert names["metrics"]["kept/total"] == kept(0.05)
    biases = sum(SIZES[1:])
    values = 4 * (kept(0.05) + biases)
    # Positions take less than a bitmap.
    assert values < names["summary"].file_bytes < values + WEIGHTS // 8
    size = (tmp_path / "model.sparse").stat().st_size
    assert values < size < names["summary"].file_bytes + 600  # the header
    before, after = trained["params"], names["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    np.testing.assert_array_equal(
        names["kernel"].toarray(), before["Dense_0"]["kernel"]
    )


# --- the page of the engine -----------------------------------------------------------
ALGEBRA = (ROOT / "sparse_optax" / "regrowth" / "README.md").read_text(encoding="utf-8")


def test_the_rule_of_the_page_trains_and_has_fifteen_lines():
    (rule,) = blocks(ALGEBRA, "python")
    lines = rule.split("tx = ")[0].splitlines()
    code = [x for x in lines if x.strip() and not x.startswith(("import", "from"))]
    assert len(code) <= 15
    names = run(rule, network())
    params, tx = names["params"], names["tx"]
    state = tx.init(params)
    before = sparse_optax.get_masks(state)
    step = jax.jit(tx.update)
    for _ in range(101):
        grads = jax.grad(names["loss"])(params, names["batch"])
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    after = sparse_optax.get_masks(state)
    assert nonzeros(params) <= sparse_optax.masks.count(after) == kept(0.05)
    moved = sparse_optax.masks.combine(jnp.logical_xor, before, after)
    assert sparse_optax.masks.count(moved) > 0
