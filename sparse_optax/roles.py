"""What a leaf is, told from its name, its siblings and its shape.

Libraries of layers agree on names only in part, and a parameter tree says nothing else.
``roles`` says of each leaf whether it is a kernel, and why; ``layout`` says along which
axes a kernel sums and which are its outputs. ``docs/which-weights.md`` lists the rules.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

# Shifts and scales are dense in every paper of the field. They are recognised by name,
# not only by rank: attention biases have shape (heads, head_dim), and `nn.scan` stacks
# biases and scales to two dimensions.
_BIASES = frozenset({"bias", "biases"})
_SCALES = frozenset(
    {"scale", "scales", "gamma", "beta", "offset", "shift", "slope", "gain"}
)
_NORMS = re.compile(r".*norm|ln|bn|gn")
_TABLE = re.compile(
    r"(pos|tok|position|token|word)?emb(s|eds?|eddings?|edders?)?|wte|wpe"
)
# What may follow in the name of a table, as in `embed_tokens`.
_OF_A_TABLE = frozenset(
    {"token", "tokens", "position", "positions", "table", "weight", "weights", "matrix"}
)
_TOKENS = frozenset({"token", "tokens", "cls"})
_ADAPTER = re.compile(r"(.*_)?lora_?(a|b|down|up)")
# The pairs of weight normalisation: a length and a direction.
_LENGTHS = {"g": "v", "weight_g": "weight_v", "original0": "original1"}


class Role(NamedTuple):
    """What a leaf is, and how that was told.

    Attributes:
      kind: ``"kernel"``, ``"table"`` (of embeddings), ``"adapter"`` (of low rank),
        ``"bias"``, ``"scale"`` or ``"vector"`` (fewer than two axes longer than 1).
      reason: How it was told, in words.
    """

    kind: str
    reason: str


class Layout(NamedTuple):
    """The axes of a kernel; further axes are spatial.

    Attributes:
      inputs: Axes that the layer sums over, but for spatial ones.
      outputs: Axes whose indices are output units.
    """

    inputs: Shape
    outputs: Shape


# --- names ----------------------------------------------------------------------------
def _words(key: str) -> list[str]:
    """The words of a key in lower case, without numbers: ``LayerNorm_0``, ``ln1_w``."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = (word.rstrip("0123456789") for word in apart.split("_"))
    return [word for word in words if word]


def _split(name: str) -> tuple[str, str]:
    """The path of the parent and the last key."""
    parent, _, key = name.rpartition("/")
    return parent, key


def is_bias(name: str) -> bool:
    """Whether the last key is that of a bias: ``bias``, ``b``, ``b1``, ``bias_hh``."""
    key = _split(name)[1]
    return bool(re.fullmatch(r"b_?\d*", key)) or not _BIASES.isdisjoint(_words(key))


def _is_kernel(key: str) -> bool:
    """Whether a key is one that only kernels have."""
    return _words(key)[-1:] == ["kernel"]


def _names_table(key: str) -> bool:
    """Whether a key is that of a table: ``Embed_0``, ``pos_embed``."""
    words = _words(key)
    while len(words) > 1 and words[-1] in _OF_A_TABLE:
        words.pop()
    return bool(words) and bool(_TABLE.fullmatch(words[-1]))


# --- what a leaf is -------------------------------------------------------------------
def roles(names: Sequence[str], shapes: Sequence[Shape | None]) -> list[Role]:
    """What each leaf is. ``shapes`` has None for what has no shape."""
    known = {n: s for n, s in zip(names, shapes, strict=True) if s is not None}
    return [
        _role(name, () if shape is None else shape, known)
        for name, shape in zip(names, shapes, strict=True)
    ]


def _role(name: str, shape: Shape, known: Mapping[str, Shape]) -> Role:
    if len(shape) < 2:
        return Role("vector", "fewer than two dimensions")
    for rule in (_by_name, _as_table, _by_siblings):
        found = rule(name, shape, known)
        if found is not None:
            return found
    if len(shape) > 2 and sum(n > 1 for n in shape) == 1 and not _may_be_kernel(name):
        return Role("vector", f"of shape {shape}, a vector shaped to broadcast")
    return Role("kernel", "two or more dimensions, and nothing says otherwise")


def _may_be_kernel(name: str) -> bool:
    words = _words(_split(name)[1])
    return not {"kernel", "weight", "weights", "w"}.isdisjoint(words)


def _by_name(name: str, shape: Shape, known: Mapping[str, Shape]) -> Role | None:
    """Adapters, biases, scales and what belongs to a norm."""
    del shape
    parent, key = _split(name)
    for part in name.split("/"):
        if _ADAPTER.fullmatch(part.lower()):
            return Role("adapter", f"an adapter of low rank, by the name {part!r}")
    if is_bias(name):
        return Role("bias", f"a bias, by the name {key!r}")
    words = _words(key)
    if words[-1:] and words[-1] in _SCALES:
        return Role("scale", f"a scale or a shift, by the name {key!r}")
    if key in ("weight_g", "kernel_g"):
        return Role("scale", f"a length of weight normalisation, by the name {key!r}")
    if len(words) > 1 and "log" in (words[0], words[-1]):
        return Role("scale", f"a logarithm, by the name {key!r}: zero there means one")
    if _is_kernel(key):
        return None
    above = _split(parent)[1]
    if any(_NORMS.fullmatch(word) for word in words):
        return Role("scale", f"part of a norm, by the name {key!r}")
    ends = [word for word in _words(above) if word not in ("f", "final", "out")]
    if ends and _NORMS.fullmatch(ends[-1]) and not _has_other_bias(name, known):
        return Role("scale", f"part of a norm, by the name {above!r}")
    return None


def _has_other_bias(name: str, known: Mapping[str, Shape]) -> bool:
    """Whether a bias of another shape is beside a leaf, as beside a kernel."""
    bias = _bias_of(name, known)
    return bias is not None and bias != known[name]


def _bias_of(name: str, known: Mapping[str, Shape]) -> Shape | None:
    """The shape of the bias beside a leaf, or None."""
    parent = name.rpartition("/")[0]
    prefix = f"{parent}/" if parent else ""
    for key in ("bias", "b"):
        if f"{prefix}{key}" in known:
            return known[f"{prefix}{key}"]
    return None


def _as_table(name: str, shape: Shape, known: Mapping[str, Shape]) -> Role | None:
    """Tables of embeddings, and learned tokens."""
    parent, key = _split(name)
    if _words(key)[-1:] and _words(key)[-1] in _TOKENS:
        return Role("table", f"learned tokens, by the name {key!r}")
    if _names_table(key):
        return Role("table", f"a table of embeddings, by the name {key!r}")
    above = _split(parent)[1]
    # Layers that embed with a kernel (patches, features) are called so too. Their leaf
    # is a kernel by its name or its rank, or has a bias, which tables have not.
    plain = key == "w" or _is_kernel(key) or len(shape) > 3
    if _names_table(above) and not plain and _bias_of(name, known) is None:
        return Role("table", f"a table of embeddings, by the name {above!r}")
    return None


def _by_siblings(name: str, shape: Shape, known: Mapping[str, Shape]) -> Role | None:
    """Scales that are told by the leaves beside them."""
    parent, key = _split(name)
    if _is_kernel(key):
        return None
    beside = _shift_of(name, shape, known)
    # A kernel of one input may have a bias of its shape; it is called `w` then.
    if beside and key not in ("w", "W"):
        return Role("scale", f"a scale: {beside!r} beside it has its shape")
    if key in _LENGTHS:
        prefix = f"{parent}/" if parent else ""
        # In equinox the direction is the weight of a layer inside.
        for other in (prefix + _LENGTHS[key], f"{prefix}layer/weight"):
            if other in known and _spreads_to(shape, known[other]):
                return Role("scale", f"a scale of {other!r}, to whose shape it spreads")
    return None


def _shift_of(name: str, shape: Shape, known: Mapping[str, Shape]) -> str | None:
    """The key of a shift of the same shape beside a leaf."""
    parent = name.rpartition("/")[0]
    prefix = f"{parent}/" if parent else ""
    for key in ("bias", "b", "beta", "offset", "shift"):
        if known.get(prefix + key) == shape:
            return key
    return None


def _spreads_to(shape: Shape, whole: Shape) -> bool:
    """Whether a shape is the whole one with some axes of length 1 or left out."""
    if len(shape) == len(whole):
        pairs = list(zip(shape, whole, strict=True))
        return all(a in (1, b) for a, b in pairs) and 1 in shape
    rest = iter(whole)
    return len(shape) < len(whole) and all(n in rest for n in shape)


# --- the axes of a kernel -------------------------------------------------------------
def layout(
    name: str, shapes: Mapping[str, Shape], stacked: int | None = None
) -> Layout | None:
    """The axes of a leaf of two or more dimensions, or None if they cannot be told.
    ``shapes`` has those of all leaves by name. An axis of layers is left out.
    """
    whole = tuple(shapes[name])
    bias = _bias_of(name, shapes)
    shape = _without(whole, stacked)
    if bias is not None and stacked is not None:
        bias = _without(bias, stacked) if len(bias) > stacked else None
    if len(shape) < 2:
        return None
    found = _layout(name, shape, bias, _as_table(name, shape, shapes) is not None)
    if found is None or stacked is None:
        return found
    places = [i for i in range(len(whole)) if i != stacked]
    return Layout(*(tuple(places[i] for i in axes) for axes in found))


def _without(shape: Shape, axis: int | None) -> Shape:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _layout(
    name: str, shape: Shape, bias: Shape | None, is_table: bool
) -> Layout | None:
    parent, key = _split(name)
    rank, above = len(shape), _words(_split(parent)[1])
    ends = Layout((rank - 2,), (rank - 1,))
    if is_table:
        return ends
    if key.startswith("weight"):  # equinox: (out, in, ...), also of the bias if any
        swapped = rank == 2 and bias == shape[1:] and shape[0] != shape[1]
        return ends if swapped else Layout((1,), (0,))
    if rank == 2:
        swapped = bias == shape[:1] and shape[0] != shape[1]
        return Layout((1,), (0,)) if swapped else ends
    if "transpose" in above:
        return _of_transposed_convolution(key, shape, bias)
    # A bias has the shape of the outputs.
    outputs = len(bias) if bias and bias == shape[-len(bias) :] else 0
    attention = above[-1] if above else ""
    if attention in ("query", "key", "value"):
        outputs = outputs or 2
    if attention == "out":
        outputs = outputs or 1
        return Layout(tuple(range(rank - outputs)), tuple(range(rank - outputs, rank)))
    if outputs > 1:
        return Layout(tuple(range(rank - outputs)), tuple(range(rank - outputs, rank)))
    general = not {"general", "einsum"}.isdisjoint(above)
    if outputs == 1 or any("conv" in word for word in above):
        return ends
    # With four axes it is a convolution; with three it may also be a projection of
    # attention, of which any axis may be the one that is summed over.
    return ends if rank > 3 and not general else None


def _of_transposed_convolution(
    key: str, shape: Shape, bias: Shape | None
) -> Layout | None:
    """Haiku has (..., out, in), flax both; there the bias says which."""
    rank = len(shape)
    turned = Layout((rank - 1,), (rank - 2,))
    if key == "w":
        return turned
    if bias is None or len(bias) > 1 or shape[-1] == shape[-2]:
        return None
    return turned if bias == shape[-2:-1] else Layout((rank - 2,), (rank - 1,))
