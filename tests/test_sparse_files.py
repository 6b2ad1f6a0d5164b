"""A finished model in a file: the same bits come back, or one clear error."""

import ast
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import stat
import sys
import tracemalloc

import flax.nnx as nnx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import network, refuses
from hypothesis import given, settings

import sparse_optax
from sparse_optax import export, load_sparse, masks, save_sparse

HOLE = optax.MaskedNode()
PARAMS = {
    "fc": {
        "bias": np.array([0.5, -0.0], np.float32),
        "kernel": np.array([[1, 0], [0, 0], [5, 6]], np.float32),
    },
    "head": {"kernel": np.array([[0, 8, 0]], np.float16)},
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

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "file-format.md"


def ten_lines():
    """The program of the page, without its imports."""
    block = re.search("```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = block.split("\n\n")[1].splitlines()
    assert len(lines) == 10
    return "\n".join(lines)


def read_by_numpy(path, monkeypatch):
    """What ten lines of NumPy read: an oracle that shares no code with the package."""
    program = ast.parse(ten_lines())
    path.with_name("model.sparse").write_bytes(path.read_bytes())
    monkeypatch.chdir(path.parent)
    scope = {"json": json, "np": np}
    exec(compile(program, "file-format.md", "exec"), scope)
    scope["file"].close()
    return scope["leaves"]


def test_a_file_byte_by_byte(path):
    """Written out by hand for two small leaves."""
    params = {"b": np.float32(0.5), "w": np.float32([[0, 7, 0, 0], [0, 0, 0, 9]])}
    save_sparse(path, params, {"w": params["w"] != 0})
    first, rest = path.read_bytes().split(b"\n", 1)
    assert first.startswith(b'SPARSE1 {"name":["b","w"],"kind":["dense","sparse"],')
    header = json.loads(first[8:])
    assert header["shape"] == [[], [2, 4]]
    assert header["dtype"] == ["float32", "float32"]
    # A bitmap, 0100 0001, is as short as anything else.
    bits = bytes([0b01000001])
    assert (header["low"][1], header["high"][1], header["missing"][1]) == (0, 8, 0)
    body = np.float32([0.5]).tobytes() + bits + np.float32([7, 9]).tobytes()
    assert rest[:-32] == body
    assert rest[-32:] == hashlib.sha256(first + b"\n" + body).digest()


def test_gaps_by_hand(path):
    """Positions 3 and 60 of 64, in gaps of 3 and 56, the lower four bits apart."""
    params = {"w": np.zeros((8, 8), np.int8)}
    params["w"].flat[[3, 60]] = 1
    save_sparse(path, params, {"w": params["w"] != 0})
    first, rest = path.read_bytes().split(b"\n", 1)
    header = json.loads(first[8:])
    low, high = header["low"][0], header["high"][0]
    upper = [3 >> low, 56 >> low]
    ones = "0" * upper[0] + "1" + "0" * upper[1] + "1"
    assert high == len(ones)
    lower = "".join(str(gap >> bit & 1) for bit in range(low) for gap in (3, 56))
    sent = b"".join(
        int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))
        for bits in (ones, lower)
    )
    assert rest[:-32] == sent + bytes([1, 1])
    assert len(sent) < 8  # of a bitmap


def test_ten_lines_of_numpy_read_it(path, monkeypatch):
    loaded = read_by_numpy(path, monkeypatch)
    wanted = {name: leaf.dense() for name, leaf in load_sparse(path).leaves.items()}
    assert loaded.keys() == wanted.keys()
    for name in wanted:
        assert bits(loaded[name]) == bits(wanted[name])


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


def drawn(shape, density, seed=0, dtype=np.float32):
    """Weights with random positions, and their mask."""
    rng = np.random.default_rng(seed)
    kept = np.zeros(math.prod(shape), bool)
    kept[rng.permutation(kept.size)[: round(density * kept.size)]] = True
    kept = kept.reshape(shape)
    values = rng.normal(size=shape).astype(dtype)
    return np.where(kept, values, np.zeros((), dtype)), kept


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "int8"])
def test_sizes_are_those_of_the_file(path, dtype):
    params = {"a": drawn((30, 40), 0.1)[0], "b": np.ones(7), "c": drawn((9, 5), 0.9)[0]}
    kept = {name: params[name] != 0 for name in ("a", "c")}
    save_sparse(path, params, kept, dtype=dtype)
    assert export.sparse_bytes(params, kept, dtype=dtype) == path.stat().st_size
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert export.sparse_bytes(abstract, kept, dtype=dtype) == path.stat().st_size


def choices(n, k):
    """Bits that say which k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / (
        math.log(2)
    )


@pytest.mark.parametrize("density", [0.001, 0.02, 0.1, 0.3, 0.45, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [None, "float16", "int8"])
def test_positions_take_what_random_positions_must(density, dtype):
    """Within 5% of values and log2 C(n, k) bits, summed over layers, headers apart."""
    shapes = ((784, 300), (300, 100), (3, 3, 16, 32))
    params, kept = zip(*(drawn(shape, density) for shape in shapes), strict=True)
    small = {"low": np.zeros((1, 1), np.float32)}
    size = export.sparse_bytes(list(params), list(kept), dtype=dtype)
    header = export.sparse_bytes(small, {"low": np.zeros((1, 1), bool)})
    width = {None: 4, "float16": 2, "int8": 1}[dtype]
    least = 0
    for mask in kept:
        count = int(mask.sum())
        values = width * count + (4 * mask.shape[-1] if dtype == "int8" else 0)
        least += min(values, 4 * count) + choices(mask.size, count) / 8
    assert least <= size <= 1.05 * least + 2 * header


def test_dead_rows_and_columns_cost_their_bitmap():
    """Half of the rows and columns hold nothing: positions are among a quarter."""
    _, kept = drawn((200, 150), 0.05)
    spread = np.zeros((400, 300), bool)
    spread[::2, ::2] = kept
    params = spread.astype(np.int8)
    inner = export.sparse_bytes(kept.astype(np.int8), kept)
    size = export.sparse_bytes(params, spread)
    assert size <= inner + 400 // 8 + 300 // 8 + 8
    assert size < kept.sum() + choices(spread.size, int(kept.sum())) / 8


def test_equal_models_give_equal_files(path, tmp_path):
    save_sparse(tmp_path / "again", PARAMS, MASKS)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


# --- fewer bits a value ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", jnp.float16, np.float16])
def test_values_are_rounded_to_a_shorter_float(path, dtype, monkeypatch):
    weights, kept = drawn((30, 20), 0.3)
    save_sparse(path, {"b": np.float32([1.1]), "w": weights}, {"w": kept}, dtype=dtype)
    loaded = load_sparse(path).dense()
    assert loaded["b"] == np.float32(1.1)
    wanted = weights.astype(np.dtype(dtype)).astype(np.float32)
    assert bits(loaded["w"]) == bits(wanted)
    assert bits(read_by_numpy(path, monkeypatch)["w"]) == bits(wanted)


@pytest.mark.parametrize("axis", [-1, 0])
def test_int8_has_one_scale_for_each_output_unit(path, axis, monkeypatch):
    """NumPy's word: a weight is within half a step of its unit."""
    weights, kept = drawn((40, 50), 0.3)
    factors = 10.0 ** np.arange(weights.shape[axis])[:: -1 if axis else 1] % 7
    weights = (weights * (factors if axis else factors[:, None])).astype(np.float32)
    weights[:, 3] = weights[5] = 0  # units without a weight
    kept &= weights != 0
    save_sparse(path, {"w": weights}, {"w": kept}, dtype="int8", unit_axis=axis)
    loaded = np.asarray(load_sparse(path).dense()["w"])
    step = np.abs(weights).max(axis=1 + axis if axis else 1, keepdims=True) / 127
    assert np.all(np.abs(loaded - weights) <= step * 0.50001)
    assert np.all(loaded[~kept] == 0)
    assert path.stat().st_size < kept.sum() * 2 + 400 + 4 * 50
    np.testing.assert_array_equal(read_by_numpy(path, monkeypatch)["w"], loaded)


def test_a_shorter_dtype_is_used_where_it_is_shorter(path):
    params = {
        "few": np.float32([[3.3, 0, 0]]),  # shorter than with three scales
        "half": np.float16([[1.1]]),
        "whole": np.array([[300]], np.int32),
    }
    kept = {name: x != 0 for name, x in params.items()}
    for dtype in ("int8", "bfloat16"):
        save_sparse(path, params, kept, dtype=dtype)
        loaded = load_sparse(path).dense()
        assert loaded["whole"] == 300
        assert loaded["half"].dtype == np.float16
        if dtype == "int8":
            assert loaded["few"][0, 0] == np.float32(3.3)
        else:
            assert loaded["half"] == np.float16(1.1)


@pytest.mark.parametrize(
    ("dtype", "value", "named"),
    [
        ("float16", 1e5, "too large for float16"),
        ("int8", np.nan, "not finite"),
        ("int8", -np.inf, "not finite"),
        ("bfloat16", np.finfo(np.float32).max, "too large for bfloat16"),
    ],
)
def test_values_that_a_shorter_dtype_cannot_hold(tmp_path, dtype, value, named):
    params = {"w": np.full((20, 2), value, np.float32)}
    with refuses("save_sparse", "dtype", f"40 weights of 'w' .*{named}"):
        save_sparse(tmp_path / "m", params, {"w": params["w"] != 0}, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_what_a_shorter_float_can_hold_stays(path):
    params = {"w": np.float32([[np.inf, -np.inf, np.nan, 65504, -0.0]])}
    save_sparse(path, params, {"w": np.ones((1, 5), bool)}, dtype="float16")
    loaded = np.asarray(load_sparse(path).dense()["w"])
    np.testing.assert_array_equal(loaded, params["w"])
    assert np.signbit(loaded[0, 4])


@pytest.mark.parametrize("dtype", ["float32", "int4", 8, np.float64, object()])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with refuses("save_sparse", "dtype", "'float16' or 'bfloat16' or 'int8' or None"):
        save_sparse(tmp_path / "m", PARAMS, MASKS, dtype=dtype)


@pytest.mark.parametrize("axis", [2, -3, 1.5, "0", None, True])
def test_axes_that_no_leaf_has(tmp_path, axis):
    with refuses("save_sparse", "unit_axis", re.escape(repr(axis).strip("'"))):
        save_sparse(tmp_path / "m", *drawn((9, 9), 0.9), dtype="int8", unit_axis=axis)


# --- the same bits --------------------------------------------------------------------

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e5m2": 1, "float64": 8}


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
    save_sparse(path, params, [kept for _, kept in drawn], force=True)
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
    save_sparse(tmp_path / "m", jnp.array(values), jnp.array(kept), force=True)
    loaded = load_sparse(tmp_path / "m").dense()
    assert loaded.dtype == dtype
    assert bits(loaded) == bits(cut(values, kept))


DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn", "int4", "uint4", "int2", "uint2"),
]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_round_trips(dtype, order, path):
    """Whole and sparse, in either byte order."""
    if dtype == "float8_e8m0fnu" or order == ">":
        values = np.array([[1, 2], [1, 1]], np.dtype(dtype))  # no zero in the first
    else:
        values = np.array([[1, 0], [0, 1]], np.dtype(dtype))
    swapped = values
    if order == ">" and values.dtype.kind in "iufc" and values.itemsize > 1:
        swapped = values.astype(values.dtype.newbyteorder(">"))
        assert swapped.tobytes() != values.tobytes()
    kept = np.asarray(values == np.ones((), values.dtype))
    params = {"sparse": swapped, "whole": swapped}
    save_sparse(path, params, {"sparse": kept}, force=True)
    leaves = load_sparse(path, like=params).leaves
    assert bits(leaves["whole"].dense()) == bits(values)
    assert bits(leaves["sparse"].dense()) == bits(cut(values, kept))


@pytest.mark.parametrize(
    "leaf",
    [
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array([object()]),
        np.zeros(1, "f4,i4"),
        np.zeros(1, "V3"),
        np.zeros(1, np.longdouble),
        np.timedelta64(3, "s"),
    ],
)
def test_dtypes_that_no_file_holds(leaf, tmp_path):
    with refuses("save_sparse", "params", "'x'"):
        save_sparse(tmp_path / "m", {"x": leaf}, {})
    assert list(tmp_path.iterdir()) == []


# --- weights outside of the masks -----------------------------------------------------

OUTSIDE = np.array([[np.nan, -2.0, np.inf, 3.0, -0.0, 1e-45]], np.float32)


def test_weights_outside_of_the_masks_are_not_dropped_in_silence(tmp_path):
    kept = np.array([[False, False, False, True, False, False]])
    with refuses("save_sparse", "masks", "4 weights.*'w': 4", "sparsify.*force=True"):
        save_sparse(tmp_path / "m", {"w": OUTSIDE}, {"w": kept})
    assert list(tmp_path.iterdir()) == []
    save_sparse(tmp_path / "m", {"w": OUTSIDE}, {"w": kept}, force=True)
    loaded = load_sparse(tmp_path / "m").dense()["w"]
    assert bits(loaded) == bits(np.array([[0, 0, 0, 3, 0, 0]], np.float32))
    save_sparse(tmp_path / "m", sparse_optax.sparsify({"w": OUTSIDE}, {"w": kept}), {})


def test_a_method_that_is_not_last_is_found_on_saving(tmp_path):
    params = network(((12, 8),))
    method = sparse_optax.rigl(
        optax.sgd(0.1), density=0.1, update_period=5, update_stop=10, key=0
    )
    tx = optax.chain(method, optax.scale(0.999))
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    nonzero = int((params["Dense_0"]["kernel"] != 0).sum())
    with refuses("save_sparse", "masks", f"{nonzero - 9} weights", "last element"):
        save_sparse(tmp_path / "m", params, state)
    save_sparse(tmp_path / "m", sparse_optax.sparsify(params, state), state)


@pytest.mark.parametrize("force", [1, "yes", None])
def test_force_is_yes_or_no(tmp_path, force):
    with refuses("save_sparse", "force", "True or False"):
        save_sparse(tmp_path / "m", PARAMS, MASKS, force=force)


def test_a_state_of_gsm_has_no_masks(tmp_path):
    params = network(((12, 8),))
    tx = sparse_optax.gsm(0.1, 0.1, momentum=0.9)
    state = tx.init(params)
    with refuses("save_sparse", "masks", "GSM", "magnitude_masks.*sparsify"):
        save_sparse(tmp_path / "m", params, state)
    kept = masks.magnitude_masks(params, 0.1)
    save_sparse(tmp_path / "m", sparse_optax.sparsify(params, kept), kept)
    assert masks.count(load_sparse(tmp_path / "m", params).masks) == 9


def test_transposed_and_strided_arrays(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    params = {"bias": np.arange(6.0)[::2], "w": values.T}
    kept = values.T % 3 == 0
    save_sparse(tmp_path / "m", params, {"w": kept}, force=True)
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
    save_sparse(tmp_path / "m", params, made, force=True)
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
    plain = load_sparse(tmp_path / "m").dense()
    assert sorted(plain) == ["bias", "layers", "weight"]
    assert plain["bias"] is None
    assert plain["layers"]["1"] is None


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
    params = sparse_optax.sparsify(nnx.state(model, nnx.Param), optimizer.opt_state)
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
    params = {"a": HOLE, "w": np.array([[1, 0]], np.float32)}
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


@pytest.mark.parametrize(
    "name", ["\ud800", "a\0b", "\n", '"', "__bits__", "x" * 65_535, "x" * 65_536, ""]
)
def test_any_name(name, tmp_path):
    params = {name: np.float32([[2, 0]]), "other": np.float32(1)}
    save_sparse(tmp_path / "m", params, {name: params[name] != 0})
    loaded = load_sparse(tmp_path / "m").dense()
    assert loaded.keys() == params.keys()
    assert loaded[name].tolist() == [[2, 0]]


# --- leaves of every kind -------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        7,
        2**70,
        -(2**70),
        0.1,
        -0.0,
        math.inf,
        1 + 2j,
        "",
        "ß",
    ],
)
def test_python_values_come_back_as_they_were(value, tmp_path):
    params = {"w": np.ones((1, 1), np.float32), "x": value}
    save_sparse(tmp_path / "m", params, {})
    for like in (None, params):
        loaded = load_sparse(tmp_path / "m", like).dense()["x"]
        assert type(loaded) is type(value)
        assert repr(loaded) == repr(value)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("number", [None, 0, 3])
def test_random_keys_come_back_as_they_were(impl, number, tmp_path):
    key = jax.random.key(7, impl=impl)
    key = key if number is None else jax.random.split(key, 3)[:number]
    save_sparse(tmp_path / "m", {"key": key}, {})
    for like in (None, {"key": key}, jax.eval_shape(lambda: {"key": key})):
        loaded = load_sparse(tmp_path / "m", like).dense()["key"]
        assert loaded.dtype == key.dtype
        assert loaded.shape == key.shape
        data = (bits(jax.random.key_data(x)) for x in (loaded, key))
        assert next(data) == next(data)


class Net(nnx.Module):
    """A kernel, batch norm and dropout."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_a_whole_nnx_model_goes_on_as_before(tmp_path):
    """Statistics of batch norm and the state of dropout travel too."""
    model, x = Net(0), jax.random.normal(jax.random.key(1), (8, 6))
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.3, key=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    kept = sparse_optax.get_masks(optimizer.opt_state)
    nnx.update(model, sparse_optax.sparsify(nnx.state(model, nnx.Param), kept))
    model(x)  # moves the statistics and the count of draws
    save_sparse(tmp_path / "m", nnx.state(model), optimizer.opt_state)
    other = Net(1)
    nnx.update(other, load_sparse(tmp_path / "m", nnx.state(other)).dense())
    for train in (False, True):
        for net in (model, other):
            net.eval() if not train else net.train()
        np.testing.assert_array_equal(model(x), other(x))


@pytest.mark.parametrize("names", [("params", "batch_stats"), ("0", "1")])
def test_masks_of_a_part_of_the_tree(names, tmp_path):
    """``{"params": params, "batch_stats": statistics}`` with the masks of params."""
    params = {"fc": {"bias": np.ones(2, np.float32), "kernel": np.float32([[0, 2]])}}
    stats = {"norm": {"mean": np.float32([0.25, 4])}}
    whole = dict(zip(names, (params, stats), strict=True))
    if names[0] == "0":
        whole = (params, stats)
    kept = {"fc": {"bias": HOLE, "kernel": np.array([[False, True]])}}
    save_sparse(tmp_path / "m", whole, kept)
    model = load_sparse(tmp_path / "m", whole)
    assert masks.count(model.masks) == 1
    same_bits = zip(jax.tree.leaves(model.dense()), jax.tree.leaves(whole), strict=True)
    assert all(bits(a) == bits(b) for a, b in same_bits)
    assert model.leaves[f"{names[0]}/fc/kernel"].positions.tolist() == [1]


def test_masks_that_fit_two_parts_are_not_guessed(tmp_path):
    part = {"w": np.float32([[0, 2]])}
    with refuses("save_sparse", "masks", r"\['w'\]"):
        save_sparse(tmp_path / "m", {"a": part, "b": part}, {"w": part["w"] != 0})


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
    save_sparse(path, params, kept, force=True)
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


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "secrets.token_hex"])
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


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_keeps_its_permissions(path, mode):
    path.chmod(mode)
    save_sparse(path, {"w": np.ones(3)}, {})
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(load_sparse(path).leaves) == ["w"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="not superuser")
def test_a_replaced_file_keeps_its_owner(path):
    os.chown(path, 12345, 54321)
    save_sparse(path, {"w": np.ones(3)}, {})
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (12345, 54321)


def refuse_device(path):
    with refuses("save_sparse", "path", "regular file"):
        save_sparse(path, PARAMS, MASKS)
    with refuses("load_sparse", "path", "Not a regular file"):
        load_sparse(path)


def test_devices_and_pipes_are_neither_replaced_nor_read(tmp_path):
    """Not even by the superuser, and not through a link; a pipe would block."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for place in (pipe, link, "/dev/null"):
        before = os.stat(place)
        refuse_device(place)
        after = os.stat(place)
        assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_paths_may_be_bytes(tmp_path):
    path = os.fsencode(tmp_path / "modèle")
    save_sparse(path, PARAMS, MASKS)
    assert list(load_sparse(path).leaves) == NAMES
    assert (tmp_path / "modèle").exists()


@pytest.mark.parametrize("path", ["", b"", 1, None, 2.5, "a\0b", "\ud800", [], True])
def test_what_is_no_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses("save_sparse", "path", re.escape(repr(path))):
        save_sparse(path, PARAMS, MASKS)
    with refuses("load_sparse", "path", re.escape(repr(path))):
        load_sparse(path)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_of_a_file(tmp_path):
    save_sparse(tmp_path / ("x" * 255), PARAMS, MASKS)
    assert list(load_sparse(tmp_path / ("x" * 255)).leaves) == NAMES


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


def put(path, raw):
    """Writes a new file: truncating an old one waits for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


def test_a_flipped_bit_is_found(path):
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        put(path, broken)
        with refuses("load_sparse", "path", "model.npz", "altered"):
            load_sparse(path)


def test_a_truncated_or_longer_file_is_found(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        put(path, whole[:length])
        with refuses("load_sparse", "path", "model.npz", "truncated"):
            load_sparse(path)
    put(path, whole + b"\0")
    with refuses("load_sparse", "path", "model.npz", "altered"):
        load_sparse(path)


def rewrite(path, body=lambda raw: raw, version=1, **changes):
    """Alters a file and its checksum: ``changes`` are functions of columns."""
    first, rest = path.read_bytes().split(b"\n", 1)
    header = json.loads(first[8:])
    for column, change in changes.items():
        header[column] = change(header[column])
    text = json.dumps(header).encode()
    raw = b"SPARSE%d %b\n%b" % (version, text, body(rest[:-32]))
    path.write_bytes(raw + hashlib.sha256(raw).digest())


def test_a_rewritten_file_is_read(path):
    wanted = same(load_sparse(path))
    rewrite(path)
    assert same(load_sparse(path)) == wanted


def test_the_checksum_covers_dtypes(path):
    """What a zip file kept beside it."""
    for old, new in ((b'"float32"', b'"int32"  '), (b'"float16"', b'"uint16" ')):
        path.write_bytes(path.read_bytes().replace(old, new))
        with refuses("load_sparse", "path", "checksum differs"):
            load_sparse(path)


def at(i, value):
    """Replaces an entry of a column."""
    return lambda column: [*column[:i], value, *column[i + 1 :]]


# Headers with the right checksum that no model has; leaves 1 and 2 are sparse.
CRAFTED = {
    "a shape of another size": {"shape": at(1, [3, 1])},
    "a shape of negative numbers": {"shape": at(0, [-2])},
    "a shape of huge numbers": {"shape": at(0, [2**62, 2**62])},
    "a shape of many huge numbers": {"shape": at(0, [10**4000] * 200)},
    "a shape of very many axes": {"shape": at(0, [1] * 100_000)},
    "a shape of zeros and huge numbers": {"shape": at(0, [0, *[2**60] * 3])},
    "a shape of floats": {"shape": at(0, [2.0])},
    "a shape of bools": {"shape": at(0, [True, 2])},
    "no shape": {"shape": at(0, None)},
    "a shape of text": {"shape": at(0, "22")},
    "another dtype": {"dtype": at(0, "complex128")},
    "no dtype": {"dtype": at(0, "O")},
    "a dtype of fields": {"dtype": at(0, "f4,f4")},
    "a dtype of text": {"dtype": at(0, "str32")},
    "a void": {"dtype": at(0, "V4")},
    "a number as dtype": {"dtype": at(0, 4)},
    "another stored dtype": {"stored": at(1, "float16")},
    "an unknown stored dtype": {"stored": at(1, "int16")},
    "scales without an axis": {"stored": at(1, "int8")},
    "an axis without scales": {"axis": at(1, 0)},
    "an axis outside": {"stored": at(1, "int8"), "axis": at(1, 2)},
    "another kind": {"kind": at(1, "dense")},
    "an unknown kind": {"kind": at(0, "tuple")},
    "a key of the wrong size": {"kind": at(0, "key<rbg>"), "dtype": at(0, "uint32")},
    "a list as kind": {"kind": at(0, [])},
    "more upper bits": {"high": at(1, 2**40)},
    "fewer upper bits": {"high": at(1, 1)},
    "negative upper bits": {"high": at(1, -1)},
    "more lower bits": {"low": at(1, 60)},
    "too many lower bits": {"low": at(1, 61)},
    "negative lower bits": {"low": at(1, -1)},
    "the missing weights": {"missing": at(2, 1)},
    "neither kept nor missing": {"missing": at(1, 2)},
    "a live axis": {"live": at(1, [0])},
    "a live axis outside": {"live": at(1, [2])},
    "a live axis twice": {"live": at(1, [0, 0])},
    "no live axes": {"live": at(1, None)},
    "one name twice": {"name": at(0, "fc/kernel")},
    "no name": {"name": at(0, None)},
    "a short column": {"name": lambda column: column[1:]},
    "columns without end": {"name": lambda column: {"a": column}},
    "more bytes": {"body": lambda raw: raw + b"\0"},
    "fewer bytes": {"body": lambda raw: raw[:-1]},
    "no bytes": {"body": lambda raw: b""},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_file_is_refused(path, what):
    rewrite(path, **CRAFTED[what])
    with refuses("load_sparse", "path", "model.npz", "was not written by save_sparse"):
        load_sparse(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "[" * 100_000, '{"name":1}', "\xff", "NaN", "1" * 5000],
)
def test_a_header_that_is_none(path, text):
    raw = b"SPARSE1 " + text.encode("latin1") + b"\n"
    for end in (raw, raw[:-1]):
        path.write_bytes(end + hashlib.sha256(end).digest())
        with refuses("load_sparse", "path", "model.npz", "was not written"):
            load_sparse(path)


def test_a_bool_is_a_bool(path):
    save_sparse(path, {"x": np.array([True, False])}, {})
    rewrite(path, body=lambda raw: bytes([2, 0]))
    with refuses("load_sparse", "path", "bool"):
        load_sparse(path)


def declaring(path, size, kept=1000):
    """A file of few bytes that holds some weights of very many."""
    params = {"w": np.ones((kept, 1), np.float32)}
    save_sparse(path, params, {"w": np.ones((kept, 1), bool)})
    rewrite(
        path,
        shape=lambda column: [[size]],
        low=at(0, 0),
        high=at(0, kept),
        missing=at(0, 0),
        body=lambda raw: b"\xff" * (kept // 8) + raw,
    )


def test_what_a_file_declares_is_bounded_before_it_is_allocated(path):
    declaring(path, 2**31)
    tracemalloc.start()
    try:
        with refuses("load_sparse", "path", str(2**33), "max_bytes"):
            load_sparse(path)
        model = load_sparse(path, max_bytes=2**33)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert model.leaves["w"].shape == (2**31,)
    assert model.leaves["w"].positions.tolist() == list(range(1000))
    for size in (2**59, 2**60):
        declaring(path, size)
        with refuses("load_sparse", "path", "max_bytes"):
            load_sparse(path)


def test_a_limit_on_bytes(path):
    size = path.stat().st_size
    dense = 2 * 4 + 6 * 4 + 3 * 2
    assert dense < size
    with refuses("load_sparse", "path", f"{size} bytes", f"`max_bytes`={size - 1}"):
        load_sparse(path, max_bytes=size - 1)
    assert same(load_sparse(path, max_bytes=size)) == same(load_sparse(path))
    declaring(path, 10**6)
    with refuses("load_sparse", "path", "4000000 bytes", "at most 3999999"):
        load_sparse(path, max_bytes=3_999_999)
    assert len(load_sparse(path, max_bytes=4_000_000).leaves) == 1


@pytest.mark.parametrize("limit", [-1, 1.5, "1", True, float("inf")])
def test_limits_that_are_none(path, limit):
    with refuses("load_sparse", "max_bytes", re.escape(repr(limit).strip("'"))):
        load_sparse(path, max_bytes=limit)


def test_another_version_is_told_apart(path):
    rewrite(path, version=2)
    with refuses("load_sparse", "path", "version 2", "version 1"):
        load_sparse(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no file of ours", b"PK\x03\x04", b"\x80\x04pickle", bytes(99), b"SPARSE1 "],
)
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with refuses("load_sparse", "path", "m", "not written by save_sparse"):
        load_sparse(tmp_path / "m")


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
        ({"lr": 0.1}, {"lr": np.ones(1, bool)}, "masks", "'lr'"),
        ({"rng": KEY}, {"rng": np.ones((), bool)}, "masks", "'rng'"),
        ({"n": [None]}, {"n": [np.ones((), bool)]}, "masks", "'n/0'"),
        ({"when": np.datetime64("2020-01-01")}, {}, "params", "'when'"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {}, "params", "a/b"),
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
        params = sparse_optax.sparsify(params, made)
        save_sparse(tmp_path / str(i), params, given_masks)
    files = {(tmp_path / str(i)).read_bytes() for i in range(3)}
    assert len(files) == 1


# --- a random walk --------------------------------------------------------------------


def random_tree(rng):
    """A tree of random containers and leaves, with the masks of some of them."""
    params, kept = {}, {}
    for i in range(rng.integers(1, 6)):
        name = str(rng.choice(["w", "größe/", "\ud800", "a b"])) + str(i)
        dtype = rng.choice(["float32", "float16", "bfloat16", "float8_e5m2", "int8"])
        shape = tuple(rng.integers(0, 9, rng.integers(0, 4)))
        raw = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
        values = raw.view(np.dtype(dtype)).reshape(shape)
        kind = rng.integers(4)
        if kind == 0:
            params[name] = [values, None, int(rng.integers(9)), jax.random.key(i)][
                i % 4
            ]
            continue
        mask = rng.random(shape) < rng.choice([0.02, 0.1, 0.5, 0.9, 1])
        for axis in range(mask.ndim):
            if rng.random() < 0.3:
                alive = rng.random(shape[axis]) < 0.3
                mask = mask & np.expand_dims(
                    alive, [a for a in range(mask.ndim) if a != axis]
                )
        params[name] = cut(values, mask)
        kept[name] = mask
    return params, kept


def walk(folder, seed, steps):
    """Round trips, and files with a right checksum and something else wrong: they are
    refused by name, or read in little memory.
    """
    rng, path = np.random.default_rng(seed), folder / "model.npz"
    tried, messages = 0, set()
    for _ in range(steps):
        params, kept = random_tree(rng)
        save_sparse(path, params, kept)
        model = load_sparse(path, params)
        for name, mask in kept.items():
            leaf = model.leaves[name]
            assert bits(leaf.dense()) == bits(params[name])
            np.testing.assert_array_equal(leaf.mask, mask)
        assert export.sparse_bytes(params, kept) == path.stat().st_size
        whole = path.read_bytes()
        for _ in range(20):
            broken = bytearray(whole[:-32])
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(8, len(broken)))
                change = rng.integers(4)
                if change == 0:
                    del broken[place:]
                elif change == 1:
                    broken[place:place] = rng.bytes(int(rng.integers(1, 9)))
                else:
                    broken[place] = rng.integers(256) if change == 2 else ord("9")
                if len(broken) < 10:
                    break
            put(path, broken + whole[-32:])
            if bytes(broken) != whole[:-32]:
                with refuses("load_sparse", "path", "model.npz"):
                    load_sparse(path)
            put(path, broken + hashlib.sha256(broken).digest())
            try:
                load_sparse(path, max_bytes=10**7)
            except ValueError as error:
                messages.add(str(error)[: len(f"load_sparse: `path`='{folder}")])
            tried += 1
    assert messages == {f"load_sparse: `path`='{folder}"}
    return tried


def test_a_walk_over_files(tmp_path):
    assert walk(tmp_path, 0, 15) == 300


@pytest.mark.fuzz
def test_a_long_walk_over_files(tmp_path, figures):
    tried = sum(walk(tmp_path, seed, 100) for seed in range(1, 21))
    assert tried == 40_000
    figures["sparse files changed at random, each also with a right checksum"] += tried


@pytest.mark.fuzz
@settings(max_examples=2000, deadline=None)
@given(st.lists(leaves(), max_size=8))
def test_long_round_trips_to_the_bit(tmp_path_factory, figures, drawn):
    test_round_trip_to_the_bit.hypothesis.inner_test(tmp_path_factory, drawn)
    figures["sparse files written and read to the bit"] += 1
