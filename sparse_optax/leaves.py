"""Which leaves of a parameter tree take part, and what they are called.

Everything here runs on the host, on structure alone: it accepts abstract arrays
and allocates nothing. A *leaf* is an array of the parameter tree; a *layer* is a
leaf, or one slice of a leaf that stacks several layers (``nn.scan``).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Where = PyTree | Callable[[str, Any], bool]

# Scales and shifts are dense in every paper of the field. They are told by name,
# not by rank alone: attention biases have shape (heads, head_dim), and `nn.scan`
# stacks a bias or a norm's scale to two dimensions.
DENSE_NAMES = frozenset({"bias", "b", "scale", "offset", "gamma", "beta"})

_EMBEDDING = re.compile(r"(.*_)?embed(ding|der)?s?(_?\d+)?", re.IGNORECASE)


def is_hole(node: Any) -> bool:
    """Tells whether a node stands for a leaf that does not take part.

    Args:
      node: Any node of a tree.

    Returns:
      True for ``optax.MaskedNode()``.

    Examples:
      >>> import optax
      >>> from sparse_optax import leaves
      >>> leaves.is_hole(optax.MaskedNode())
      True
    """
    return isinstance(node, optax.MaskedNode)


def path_name(path: Sequence[Any]) -> str:
    """Normalised name of a leaf, the same in every neural network library.

    Keys are joined by a slash. A trailing ``value`` is dropped: ``flax.nnx`` hands
    a state of variables to ``init`` and plain arrays to ``update``, so the paths
    of one leaf differ by that key.

    Args:
      path: A key path, as given by ``jax.tree_util.tree_flatten_with_path``.

    Returns:
      A name such as ``"Dense_0/kernel"``.

    Examples:
      >>> import jax
      >>> from sparse_optax import leaves
      >>> tree = {"Dense_0": {"kernel": 1.0}, "layers": [2.0]}
      >>> [leaves.path_name(p) for p, _ in jax.tree.leaves_with_path(tree)]
      ['Dense_0/kernel', 'layers/0']
    """
    keys = [key_name(key) for key in path]
    if len(keys) > 1 and keys[-1] == "value":
        keys = keys[:-1]
    return "/".join(keys)


def key_name(key: Any) -> str:
    """Plain text of one key of a path: a dict key, an attribute or an index.

    Args:
      key: One entry of a key path.

    Returns:
      Its text.

    Examples:
      >>> import jax
      >>> from sparse_optax import leaves
      >>> leaves.key_name(jax.tree_util.DictKey("kernel"))
      'kernel'
    """
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaf_names(tree: PyTree) -> list[str]:
    """Normalised names of all leaves, in leaf order.

    Args:
      tree: A pytree; holes (``optax.MaskedNode``) count as leaves.

    Returns:
      One name a leaf.

    Examples:
      >>> from sparse_optax import leaves
      >>> leaves.leaf_names({"b": 0.0, "w": 0.0})
      ['b', 'w']
    """
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    return [path_name(path) for path, _ in paths]


def is_embedding(name: str) -> bool:
    """Tells whether a leaf is an embedding table, by its name.

    Args:
      name: A normalised leaf name.

    Returns:
      True where one of the last two keys is ``embedding``, ``embed``,
      ``Embed_0``, ``tok_embeddings`` and the like.

    Examples:
      >>> from sparse_optax import leaves
      >>> [leaves.is_embedding(n) for n in ("Embed_0/embedding", "Dense_0/kernel")]
      [True, False]
    """
    return any(_EMBEDDING.fullmatch(key) for key in name.split("/")[-2:])


def _default_where(name: str, leaf: Any) -> bool:
    return len(leaf.shape) >= 2 and name.split("/")[-1] not in DENSE_NAMES


def _is_function(where: Any) -> bool:
    # A callable whose leaves are bools is a tree (an equinox module of bools).
    return callable(where) and all(callable(x) for x in jax.tree.leaves(where))


def resolve_where(
    params: PyTree,
    where: Where | None = None,
    *,
    embeddings: bool = True,
    caller: str = "where",
) -> list[bool]:
    """Resolves the choice of leaves to one bool a leaf, in leaf order.

    Args:
      params: The parameters, concrete or abstract.
      where: None for the default choice (floating leaves of two or more dimensions
        whose last key is not bias, b, scale, offset, gamma or beta), a tree or
        prefix tree of bools, or a callable ``(name, leaf) -> bool``.
      embeddings: Whether the default choice takes embedding tables.
      caller: The name that an error starts with.

    Returns:
      A list of bools, one a leaf of ``params``.

    Raises:
      ValueError: If ``where`` does not fit ``params``, is not made of bools, or
        chooses a leaf that is not floating.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
      >>> leaves.resolve_where(params)
      [False, True]
      >>> leaves.resolve_where(params, lambda name, leaf: True)
      [True, True]
    """
    leaves = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    floating = [
        hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves
    ]
    if where is None:
        return [
            f and _default_where(name, x) and (embeddings or not is_embedding(name))
            for name, x, f in zip(names, leaves, floating, strict=True)
        ]
    if _is_function(where):
        chosen = [
            False if is_hole(x) else where(name, x)
            for name, x in zip(names, leaves, strict=True)
        ]
    else:
        try:
            spread = jax.tree.broadcast(where, params, is_leaf=is_hole)
            chosen = jax.tree.leaves(spread, is_leaf=is_hole)
        except ValueError as error:
            raise ValueError(
                f"{caller}: `where` must have the structure of params, or of a "
                f"prefix of it; got {jax.tree.structure(where)}. Pass a tree of "
                "bools or a callable (name, leaf) -> bool."
            ) from error
    # `optax.partition` hands each group a tree with holes: they stay holes.
    chosen = [
        False if is_hole(x) else choice
        for x, choice in zip(leaves, chosen, strict=True)
    ]
    for name, x, f, choice in zip(names, leaves, floating, chosen, strict=True):
        if not isinstance(choice, bool):
            raise ValueError(
                f"{caller}: `where` must give True or False for each leaf; got "
                f"{choice!r} for {name!r}. Pass a tree of bools or a callable "
                "(name, leaf) -> bool."
            )
        if choice and not f:
            raise ValueError(
                f"{caller}: `where` chooses the leaf {name!r} of dtype "
                f"{getattr(x, 'dtype', type(x).__name__)}; only floating leaves can "
                "be made sparse. Leave it out of `where`."
            )
    return chosen


def eligible(
    params: PyTree, where: Where | None = None, *, embeddings: bool = True
) -> PyTree:
    """Shows which leaves are made sparse: a tree of bools like ``params``.

    It is the default choice of every transformation here and serves as a mask for
    Optax, for instance to decay kernels and leave biases alone. ``gsm_mask`` leaves
    embedding tables out as well: the gradient of a row absent from the batch is
    zero, so that the row would only decay.

    Args:
      params: The parameters, concrete or abstract.
      where: Another choice, see ``resolve_where``.
      embeddings: Whether the default choice takes embedding tables.

    Returns:
      A tree with the structure of ``params`` whose leaves are Python bools.

    Raises:
      ValueError: If ``where`` does not fit ``params``.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
      >>> sparse_optax.eligible(params)
      {'bias': False, 'kernel': True}
      >>> decay = optax.add_decayed_weights(5e-4, mask=sparse_optax.eligible)
    """
    chosen = resolve_where(params, where, embeddings=embeddings, caller="eligible")
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_hole), chosen)


class Layout(NamedTuple):
    """The leaves that take part, and how each splits into layers.

    Attributes:
      index: Positions of the chosen leaves in leaf order.
      names: Their normalised names.
      axes: For each, the axis whose slices are layers of their own, or None.
    """

    index: tuple[int, ...]
    names: tuple[str, ...]
    axes: tuple[int | None, ...]


def layout(
    params: PyTree,
    chosen: Sequence[bool],
    stacked: Mapping[str, int] | None = None,
    *,
    caller: str,
) -> Layout:
    """Pairs the choice of leaves with their names and stacked axes.

    Args:
      params: The parameters, concrete or abstract.
      chosen: One bool a leaf, from ``resolve_where`` or from the holes of a state.
      stacked: ``{name: axis}`` of leaves that stack several layers along an axis.
      caller: The name that an error starts with.

    Returns:
      A ``Layout``.

    Raises:
      ValueError: If ``stacked`` names a leaf that does not take part, or an axis
        that the leaf does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 2, 3))}
      >>> leaves.layout(params, [False, True], {"kernel": 0}, caller="doc")
      Layout(index=(1,), names=('kernel',), axes=(0,))
    """
    stacked = dict(stacked or {})
    names, flat = leaf_names(params), jax.tree.leaves(params, is_leaf=is_hole)
    index = tuple(i for i, choice in enumerate(chosen) if choice)
    axes = []
    for i in index:
        axis = stacked.pop(names[i], None)
        if axis is not None:
            rank = len(flat[i].shape)
            if not -rank <= axis < rank or rank < 2:
                raise ValueError(
                    f"{caller}: `stacked` gives axis {axis} for the leaf "
                    f"{names[i]!r} of shape {flat[i].shape}; the axis must be in "
                    f"[{-rank}, {rank - 1}] of a leaf of two or more dimensions. "
                    "Correct the axis."
                )
            axis %= rank
        axes.append(axis)
    if stacked and flat:
        raise ValueError(
            f"{caller}: `stacked` names {sorted(stacked)}, which do not take part; "
            f"it must name some of {[names[i] for i in index]}. Correct the names."
        )
    return Layout(index, tuple(names[i] for i in index), tuple(axes))


def require_some(params: PyTree, plan: Layout, *, caller: str) -> None:
    """Raises where the parameters have leaves and none of them takes part.

    A tree without leaves passes: ``optax.tree.map_params`` initialises with one.

    Args:
      params: The parameters, concrete or abstract.
      plan: The leaves that take part.
      caller: The name that the error starts with.

    Raises:
      ValueError: If no leaf takes part.

    Examples:
      >>> from sparse_optax import leaves
      >>> leaves.require_some({}, leaves.Layout((), (), ()), caller="doc")
    """
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    if not plan.index and any(not is_hole(x) for x in flat):
        raise ValueError(
            f"{caller}: no leaf of {leaf_names(params)} is to be made sparse; there "
            "must be one. Choose leaves with where=lambda name, leaf: ...; by default "
            "those of two or more dimensions that are not biases or scales."
        )
