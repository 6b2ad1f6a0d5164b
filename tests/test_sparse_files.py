"""A finished model in a file: the same bits come back, or one clear error."""

import dataclasses
import errno
import io
import json
import os
import sys
import zipfile

import flax.nnx as nnx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import network, refuses
from hypothesis import given

import sparse_optax
from sparse_optax import budgets, export, load_sparse, masks, save_sparse

HOLE = optax.MaskedNode()
PARAMS = {
    "fc": {
        "bias": np.array([0.5, -0.0], np.float32),
        "kernel": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
    },
    "head": {"kernel": np.array([[7, 8, 9]], np.float16)},
}
MASKS = {
    "fc": {"bias": HOLE, "kernel": np.array([[1, 0], [0, 0], [1, 1]], bool)},
    "head": {"kernel": np.array([[0, 1, 0]], bool)},
}
NAMES = ["fc/bias", "fc/kernel", "head/kernel"]


def bits(x):
    """The bytes of an array, whatever its dtype compares equal to."""
    return np.asarray(x).shape, np.asarray(x).dtype.name, np.asarray(x).tobytes()


def cut(params, kept):
    """NumPy's word for what must come back: zero where the mask is False."""
    full = np.zeros(params.shape, params.dtype)
    full[kept] = np.asarray(params)[kept]
    return full


@pytest.fixture
def path(tmp_path):
    """The path of a file that holds PARAMS."""
    save_sparse(tmp_path / "model.npz", PARAMS, MASKS)
    return tmp_path / "model.npz"


# --- the file -------------------------------------------------------------------------


def test_numpy_reads_names_values_and_bits(path):
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == {*NAMES, "__bits__", "__header__"}
        assert file["fc/bias"].tolist() == [0.5, 0.0]
        assert file["fc/kernel"].tolist() == [1, 5, 6]
        assert file["head/kernel"].tolist() == [8]
        # 100011 of the first kernel, then 010 of the second: end to end.
        assert file["__bits__"].tolist() == [0b10001101, 0b00000000]
        header = json.loads(file["__header__"].tobytes())
    assert header["version"] == 1
    assert [leaf["name"] for leaf in header["leaves"]] == NAMES
    assert [leaf["dtype"] for leaf in header["leaves"]] == [
        "float32",
        "float32",
        "float16",
    ]


def test_the_model_by_name(path):
    model = load_sparse(path)
    assert list(model.leaves) == NAMES
    assert model.leaves["fc/bias"].mask is None
    leaf = model.leaves["fc/kernel"]
    assert leaf.shape == (3, 2)
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf.mask, MASKS["fc"]["kernel"])
    assert leaf.values.tolist() == [1, 5, 6]
    dense = model.dense()
    assert dense["fc"]["kernel"].tolist() == [[1, 0], [0, 0], [5, 6]]
    assert bits(dense["fc"]["bias"]) == bits(PARAMS["fc"]["bias"])  # -0 stays -0
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(dense))
    assert model.masks["fc"]["bias"] == HOLE
    np.testing.assert_array_equal(model.masks["head"]["kernel"], [[False, True, False]])


def test_sizes_by_hand():
    # 9 bits in 2 bytes; 3 float32, 1 float16; a bias of 2 float32.
    assert export.sparse_bytes(PARAMS, MASKS) == 2 + 12 + 2 + 8
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert export.sparse_bytes(abstract, MASKS) == 24


def test_sizes_are_those_of_the_stored_arrays(path):
    with np.load(path) as file:
        stored = sum(file[name].nbytes for name in (*NAMES, "__bits__"))
    assert stored == export.sparse_bytes(PARAMS, MASKS)


@pytest.mark.parametrize("n", [700, 701, 1000, 1501])
def test_a_budget_of_bytes_is_met_by_the_file(n):
    params = [np.ones((25, 13), np.float32), np.ones((33, 5), np.float32)]
    kept = masks.random_masks(0, params, budgets.num_bytes(n))
    assert n - 4 < export.sparse_bytes(params, kept) <= n


def test_bits_shrink_in_the_file(tmp_path):
    params = {"w": np.ones((1000, 800), np.float32)}
    save_sparse(tmp_path / "m", params, masks.random_masks(0, params, 0.001))
    payload = 100_000 + 4 * 800
    size = (tmp_path / "m").stat().st_size
    assert size < payload / 3


def test_equal_models_give_equal_files(path, tmp_path):
    save_sparse(tmp_path / "again", PARAMS, MASKS)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:  # no date in it either
        assert {info.date_time[0] for info in archive.infolist()} == {1980}


# --- the same bits --------------------------------------------------------------------

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float64": 8}


@st.composite
def leaves(draw):
    """One leaf of arbitrary bits, NaN payloads and -0 included, and its mask."""
    dtype = draw(st.sampled_from(sorted(WIDTHS)))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    size = int(np.prod(shape))
    width = WIDTHS[dtype]
    raw = draw(st.binary(min_size=size * width, max_size=size * width))
    values = np.frombuffer(raw, f"u{width}").view(np.dtype(dtype)).reshape(shape)
    if draw(st.booleans()):
        return values, HOLE
    kept = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return values, np.array(kept, bool).reshape(shape)


@given(st.lists(leaves(), max_size=5))
def test_round_trip_to_the_bit(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("files") / "m"
    params = [values for values, _ in drawn]
    save_sparse(path, params, [kept for _, kept in drawn])
    model = load_sparse(path, like=params)
    wanted = [v if k is HOLE else cut(v, k) for v, k in drawn]
    loaded = [leaf.dense() for leaf in model.leaves.values()]
    assert list(map(bits, loaded)) == list(map(bits, wanted))
    assert list(map(bits, model.dense())) == list(map(bits, wanted))
    for mask, (_, kept) in zip(model.masks, drawn, strict=True):
        if kept is HOLE:
            assert isinstance(mask, optax.MaskedNode)
        else:
            np.testing.assert_array_equal(mask, kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_device_arrays_round_trip(dtype, tmp_path):
    values = np.array([[1.5, -0.0, np.nan], [np.inf, 1e-7, -3.0]]).astype(dtype)
    kept = np.array([[1, 1, 1], [1, 1, 0]], bool)
    save_sparse(tmp_path / "m", jnp.array(values), jnp.array(kept))
    loaded = load_sparse(tmp_path / "m").dense()
    assert loaded.dtype == dtype
    assert bits(loaded) == bits(cut(values, kept))


def test_missing_weights_come_back_as_zero_whatever_they_were(tmp_path):
    values = np.array([[np.nan, -2.0, np.inf, 3.0]], np.float32)
    kept = np.array([[False, False, False, True]])
    save_sparse(tmp_path / "m", {"w": values}, {"w": kept})
    loaded = load_sparse(tmp_path / "m").dense()["w"]
    assert bits(loaded) == bits(np.array([[0, 0, 0, 3]], np.float32))


def test_transposed_and_strided_arrays(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    params = {"bias": np.arange(6.0)[::2], "w": values.T}
    kept = values.T % 3 == 0
    save_sparse(tmp_path / "m", params, {"w": kept})
    loaded = load_sparse(tmp_path / "m")
    assert bits(loaded.dense()["w"]) == bits(cut(values.T, kept))
    assert loaded.leaves["bias"].values.tolist() == [0, 2, 4]


def test_whole_leaves_of_other_kinds(tmp_path):
    params = {"step": np.int64(2**40), "flag": np.array(True), "w": np.eye(2)}
    save_sparse(tmp_path / "m", params, {})
    assert {k: bits(v) for k, v in load_sparse(tmp_path / "m").dense().items()} == {
        k: bits(v) for k, v in params.items()
    }


# --- trees ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """What equinox gives: attributes, and None where a leaf was filtered out."""

    weight: jax.Array
    bias: jax.Array | None
    layers: list


def module(fill):
    inner = Module(jnp.full((2, 2), fill), jnp.full(2, fill), [])
    return Module(jnp.full((3, 2), fill), None, [inner, None])


def test_module_with_none_leaves(tmp_path):
    params = module(2.0)
    made = masks.random_masks(0, params, 0.5)
    save_sparse(tmp_path / "m", params, made)
    model = load_sparse(tmp_path / "m", like=module(0.0))
    dense = model.dense()
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    assert jax.tree.structure(model.masks) == jax.tree.structure(made)
    for x, y in zip(
        jax.tree.leaves(dense),
        jax.tree.leaves(sparse_optax.sparsify(params, made)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    assert sorted(load_sparse(tmp_path / "m").dense()) == ["layers", "weight"]


def test_nnx_state_and_its_optimizer(tmp_path):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=0.3,
        update_period=5,
        key=0,
        packed=True,
        update_stop=9,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    save_sparse(tmp_path / "m", params, optimizer.opt_state)
    abstract = nnx.eval_shape(lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    loaded = load_sparse(tmp_path / "m", like=nnx.state(abstract, nnx.Param))
    nnx.update(model, loaded.dense())  # takes a state, and nothing else
    assert int((model.kernel[...] != 0).sum()) == 9
    plain = load_sparse(tmp_path / "m").dense()
    np.testing.assert_array_equal(plain["kernel"], model.kernel[...])


def test_masks_of_a_loaded_model_start_a_run(path):
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        masks=load_sparse(path, like=PARAMS).masks,
        update_period=5,
        update_stop=20,
        key=0,
    )
    assert masks.count(sparse_optax.get_masks(tx.init(PARAMS))) == 4


def test_holes_of_the_parameters_stay_holes(tmp_path):
    params = {"a": HOLE, "w": np.ones((1, 2), np.float32)}
    save_sparse(tmp_path / "m", params, {"w": np.array([[True, False]])})
    dense = load_sparse(tmp_path / "m", like=params).dense()
    assert dense["a"] == HOLE
    assert dense["w"].tolist() == [[1, 0]]


def test_names_that_end_as_members_do(tmp_path):
    """The short name of one member is the whole name of another."""
    params = {"a": np.float32(1), "a.npy": np.float32(2)}
    save_sparse(tmp_path / "m", params, {})
    assert load_sparse(tmp_path / "m").dense() == {"a": 1, "a.npy": 2}


def test_names_beyond_ascii(tmp_path):
    save_sparse(tmp_path / "m", {"größe/η": np.float32(1), "file": np.int32(2)}, {})
    assert load_sparse(tmp_path / "m").dense() == {"größe": {"η": 1}, "file": 2}


def test_names_that_do_not_nest(tmp_path):
    params = {"a": np.float32(1), "a/b": np.float32(2)}
    save_sparse(tmp_path / "m", params, {})
    with refuses("load_sparse", "like", "'a/b'"):
        load_sparse(tmp_path / "m").dense()
    assert load_sparse(tmp_path / "m", like=params).dense() == params


# --- matrices -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    rng = np.random.default_rng(0)
    params = {
        "conv": rng.normal(size=(3, 3, 4, 5)).astype(np.float32),
        "fc": rng.normal(size=(6, 5)).astype(np.float32),
        "half": rng.normal(size=(6, 5)).astype(jnp.bfloat16),
        "bias": np.ones(5, np.float32),
    }
    kept = {name: rng.random(x.shape) < 0.3 for name, x in params.items() if x.ndim > 1}
    params["fc"][kept["fc"]] *= rng.random(kept["fc"].sum()) < 0.8  # kept zeros too
    path = tmp_path_factory.mktemp("kernels") / "m"
    save_sparse(path, params, kept)
    return load_sparse(path), {n: cut(params[n], kept[n]) for n in kept}, kept


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["conv", "fc", "half"])
def test_matrices_multiply_as_the_dense_kernel(kernels, name, transpose):
    model, dense, kept = kernels
    wanted = dense[name].reshape(-1, 5)
    wanted = wanted.T if transpose else wanted
    csr = model.to_csr(name, transpose=transpose)
    bcsr = model.to_bcsr(name, transpose=transpose)
    np.testing.assert_array_equal(csr.toarray(), wanted.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(bcsr.todense()), wanted)
    assert csr.nnz == bcsr.nse == kept[name].sum()
    assert csr.has_canonical_format
    x = np.random.default_rng(1).normal(size=(wanted.shape[1], 2)).astype(np.float32)
    np.testing.assert_allclose(csr @ x, wanted.astype(np.float32) @ x, rtol=1e-5)
    if name != "half":
        np.testing.assert_allclose(bcsr @ jnp.array(x), wanted @ x, rtol=1e-5)


def test_the_way_to_multiply_from_the_left(kernels):
    model, dense, _ = kernels
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    y = (model.to_bcsr("fc", transpose=True) @ jnp.array(x.T)).T
    np.testing.assert_allclose(y, x @ dense["fc"], rtol=1e-5)


def test_another_view_of_a_convolution(kernels):
    model, dense, _ = kernels
    csr = model.to_csr("conv", shape=(3, -1))
    np.testing.assert_array_equal(csr.toarray(), dense["conv"].reshape(3, -1))


@pytest.mark.parametrize("method", ["to_csr", "to_bcsr"])
def test_matrices_refuse(kernels, method):
    make = getattr(kernels[0], method)
    with refuses(method, "name", "'nil'", "'conv'"):
        make("nil")
    with refuses(method, "shape", r"\(7, 7\)", "180"):
        make("conv", shape=(7, 7))
    with refuses(method, "shape", r"\(5,\)", "two"):
        make("bias")


def test_csr_without_scipy(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"^to_csr: .*'fc'.*pip install scipy"):
        kernels[0].to_csr("fc")


# --- whole or not at all --------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "zipfile.ZipFile.open"])
@pytest.mark.parametrize("before", [True, False])
def test_a_failing_disk_changes_nothing(where, before, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    if before:
        save_sparse(path, PARAMS, MASKS)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(where, full_disk)
    with refuses("save_sparse", "path", "model.npz", "No space left on device"):
        save_sparse(path, {"w": np.ones(3)}, {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_an_interrupt_leaves_nothing_and_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_sparse(tmp_path / "m", PARAMS, MASKS)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced(path):
    save_sparse(path, {"w": np.ones(3)}, {})
    assert list(load_sparse(path).leaves) == ["w"]
    assert [p.name for p in path.parent.iterdir()] == ["model.npz"]


def test_a_link_stays_a_link(path):
    link = path.with_name("latest")
    link.symlink_to(path.name)
    save_sparse(link, {"w": np.ones(3)}, {})
    assert link.is_symlink()
    assert list(load_sparse(path).leaves) == ["w"]


def test_permissions_are_those_of_any_new_file(path):
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("place", ["nowhere/m", "file/m", "folder"])
def test_places_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with refuses("save_sparse", "path", place, "existing folder"):
        save_sparse(tmp_path / place, PARAMS, MASKS)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_without_permission(tmp_path, monkeypatch):
    # Not by chmod: the superuser writes everywhere.
    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with refuses("save_sparse", "path", "Permission denied"):
        save_sparse(tmp_path / "m", PARAMS, MASKS)


# --- broken files ---------------------------------------------------------------------


def same(model):
    return [bits(leaf.dense()) for leaf in model.leaves.values()]


def test_a_flipped_byte_is_found(path):
    """Wherever it is. What zip files never read may change; the model may not."""
    whole, wanted = path.read_bytes(), same(load_sparse(path))
    passed, messages = 0, set()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            model = load_sparse(path)
        except ValueError as error:
            messages.add(str(error).split("model.npz")[0])
        else:
            assert list(model.leaves) == NAMES
            assert same(model) == wanted
            passed += 1
    assert messages == {f"load_sparse: `path`='{path.parent}/"}
    assert passed < len(whole) / 3


def test_a_truncated_file_is_found(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with refuses("load_sparse", "path", "model.npz", "truncated"):
            load_sparse(path)


def rewrite(path, change):
    """Alters the arrays of a file behind the back of its zip checksums."""
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in members.items():
            text = io.BytesIO()
            np.save(text, array)
            archive.writestr(f"{name}.npy", text.getvalue())


def header(members, **changes):
    old = json.loads(members["__header__"].tobytes())
    members["__header__"] = np.frombuffer(json.dumps(old | changes).encode(), np.uint8)


CHANGES = {
    "a value": lambda m: m.update({"fc/kernel": np.float32([1, 5, 7])}),
    "a sign of zero": lambda m: m.update({"fc/bias": np.float32([0.5, 0.0])}),
    "a bit": lambda m: m.update({"__bits__": np.uint8([0b10001011, 0])}),
    "a name": lambda m: header(m, leaves=[]),
    "a checksum": lambda m: header(m, sha256="0"),
    "no header": lambda m: m.pop("__header__"),
    "no leaf": lambda m: m.pop("fc/bias"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_altered_file_is_found(path, what):
    rewrite(path, CHANGES[what])
    with refuses("load_sparse", "path", "model.npz", "altered"):
        load_sparse(path)


def test_an_unaltered_copy_is_read(path):
    wanted = same(load_sparse(path))
    rewrite(path, lambda members: None)
    assert same(load_sparse(path)) == wanted


def test_another_version_is_told_apart(path):
    rewrite(path, lambda members: header(members, version=2))
    with refuses("load_sparse", "path", "version 2", "version 1"):
        load_sparse(path)


@pytest.mark.parametrize(
    "content", [b"", b"no file of ours", b"PK\x03\x04", b"\x80\x04pickle"]
)
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with refuses("load_sparse", "path", "m", "not written by save_sparse"):
        load_sparse(tmp_path / "m")


def test_pickles_are_not_read(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{}], object), allow_pickle=True)
    with refuses("load_sparse", "path", "m.npy"):
        load_sparse(tmp_path / "m.npy")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^load_sparse: `path`=.*Give"):
        load_sparse(tmp_path / "m")
    with refuses("load_sparse", "path", "directory"):
        load_sparse(tmp_path)


# --- what does not fit ----------------------------------------------------------------


def altered(name, leaf):
    return {**PARAMS, "head": {name: leaf}}


@pytest.mark.parametrize(
    ("like", "value", "allowed"),
    [
        (altered("bias", np.zeros(3)), "head/bias", "head/kernel"),
        (altered("kernel", np.zeros((3, 1), np.float16)), r"\(3, 1\)", r"\(1, 3\)"),
        (altered("kernel", np.zeros((1, 3), np.float32)), "float32", "float16"),
        (altered("kernel", 1.0), "float", "float16"),
        ([], r"fc/bias", "equal"),
    ],
)
def test_like_of_another_network(path, like, value, allowed):
    with refuses("load_sparse", "like", value, allowed):
        load_sparse(path, like)


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("params", "kept", "argument", "value"),
    [
        (PARAMS, {"nil": MASKS["fc"]["kernel"]}, "masks", "nil"),
        (PARAMS, {"fc": {"kernel": np.ones((2, 3), bool)}}, "mask", r"\(2, 3\)"),
        (PARAMS, PARAMS, "mask", "float32"),
        (PARAMS, {"fc": {"kernel": 1}}, "mask", "int"),
        ({"f": jnp.tanh}, {}, "params", "'f'"),
        ({"lr": 0.1}, {}, "params", "'lr'"),
        ({"rng": KEY}, {}, "params", "'rng'"),
        ({"when": np.datetime64("2020-01-01")}, {}, "params", "'when'"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {}, "params", "a/b"),
        ({"__bits__": np.ones(1)}, {}, "params", "__bits__"),
        ({"a\0b": np.ones(1)}, {}, "params", "null"),
        ({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, {}, "params", "abstract"),
    ],
)
def test_parameters_and_masks_that_do_not_fit(params, kept, argument, value, tmp_path):
    with refuses("save_sparse", argument, value):
        save_sparse(tmp_path / "m", params, kept)
    assert list(tmp_path.iterdir()) == []


def test_saving_under_jit_is_refused(tmp_path):
    @jax.jit
    def step(params):
        save_sparse(tmp_path / "m", params, {})

    with refuses("save_sparse", "params", "abstract"):
        step({"w": jnp.ones(2)})


def test_masks_may_come_packed_or_in_a_state(tmp_path):
    params = network(((4, 3), (3, 5)))
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=0.5,
        update_period=4,
        update_stop=20,
        key=0,
    )
    state = optax.MultiSteps(tx, 2).init(params)
    made = sparse_optax.get_masks(state)
    packed = {k: {"kernel": masks.pack(v["kernel"])} for k, v in made.items()}
    for i, given_masks in enumerate((made, packed, state)):
        save_sparse(tmp_path / str(i), params, given_masks)
    files = {(tmp_path / str(i)).read_bytes() for i in range(3)}
    assert len(files) == 1
