"""Wraps an optimizer for networks whose weights are drawn: variational dropout and L0.

A second array for each leaf says how its weights are drawn. It is no parameter: it lies
in the state. Its gradient follows from that of the weights and from the numbers that
were drawn, which the update draws again from the same key.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import (
    Layers,
    PyTree,
    Where,
    check_real,
    check_some,
    chosen_layers,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.masks.make import Key, as_key, check_key, draw, highest, leaf_keys
from sparse_optax.masks.make import ranking as ranked
from sparse_optax.masks.optimizer_state import states_with
from sparse_optax.masks.tree import check_gradient, flatten, names_of
from sparse_optax.patterns import SINGLE, Pattern
from sparse_optax.selection.leaf import wide as as_wide

Strength = optax.ScalarOrSchedule | Mapping[str, float]


class Family(NamedTuple):
    """How the weights of a leaf are drawn; arrays are in float32 or wider.

    Attributes:
      field: Name of the second arrays in the state.
      noise: What is drawn, a function of ``jax.random``.
      weights: ``(w, second, noise)``, the weights of a step.
      slope: ``(w, second, noise, g)``, the gradient by the second array, with the
        shape of the weights, from that by w.
      penalty: ``(w, second)``, the gradients of the penalty by w and the second array.
      kept: ``(w, second)``, the weights of a test that are not zero.
      alive: ``(w, second)``, which they are.
      score: ``(w, second)``, what ranks them for a cut to a number.
      limits: Where the second array stays.
    """

    field: str
    noise: Callable[..., jax.Array]
    weights: Callable[..., jax.Array]
    slope: Callable[..., jax.Array]
    penalty: Callable[..., tuple[Any, jax.Array]]
    kept: Callable[..., jax.Array]
    alive: Callable[..., jax.Array]
    score: Callable[..., jax.Array]
    limits: tuple[float, float]


class VariationalDropoutState(NamedTuple):
    """State of ``sparse_variational_dropout``.

    Attributes:
      count: Finished updates. # shape=(), int32
      key: Random key data. # uint32
      log_variance: A tree like the parameters: log sigma^2 of each weight, in float32
        or wider, and holes for leaves that are not drawn.
      inner_state: State of the wrapped optimizer.
      drawn_state: Its state for ``log_variance``.
    """

    count: jax.Array
    key: jax.Array
    log_variance: PyTree
    inner_state: Any
    drawn_state: Any


class HardConcreteState(NamedTuple):
    """State of ``l0_regularization``.

    Attributes:
      count: Finished updates. # shape=(), int32
      key: Random key data. # uint32
      log_open: A tree like the parameters: log a of each gate, in float32 or wider,
        with length 1 along axes that share one, and holes for leaves without gates.
      inner_state: State of the wrapped optimizer.
      drawn_state: Its state for ``log_open``.
    """

    count: jax.Array
    key: jax.Array
    log_open: PyTree
    inner_state: Any
    drawn_state: Any


# --- sparse variational dropout -------------------------------------------------------
# The approximation of the divergence (Molchanov et al, 2017, equation 14).
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695
# A weight is dropped from here on, and log alpha is cut off there.
DROPPED, _LARGEST = 3.0, 8.0


def log_alpha(w: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Log of sigma^2 / theta^2; infinite at zero."""
    return log_variance - 2 * jnp.log(jnp.abs(w))


def _divergence(w: jax.Array, log_variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of the divergence by theta and log sigma^2."""
    ratio = log_alpha(w, log_variance)
    inside = jnp.abs(ratio) < _LARGEST
    gate = jax.nn.sigmoid(_K2 + _K3 * ratio)
    slope = _K1 * _K3 * gate * (1 - gate) + 0.5 * jax.nn.sigmoid(-ratio)
    slope = jnp.where(inside, slope, 0)
    return 2 * slope / jnp.where(inside, w, 1), -slope


GAUSSIAN = Family(
    field="log_variance",
    noise=jax.random.normal,
    weights=lambda w, s, noise: w + jnp.exp(s / 2) * noise,
    slope=lambda w, s, noise, g: g * noise * jnp.exp(s / 2) / 2,
    penalty=_divergence,
    kept=lambda w, s: w,
    alive=lambda w, s: log_alpha(w, s) <= DROPPED,
    score=lambda w, s: -log_alpha(w, s),
    limits=(-math.inf, math.inf),
)

# --- L0 -------------------------------------------------------------------------------
# The temperature and the ends of the stretched distribution (Louizos et al, 2018).
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
_SMALLEST = 1e-6


def _uniform(key: jax.Array, shape: Any, dtype: Any, **options: Any) -> jax.Array:
    u = jax.random.uniform(key, shape, dtype, **options)
    return _SMALLEST + (1 - 2 * _SMALLEST) * u


def _stretched(s: jax.Array) -> jax.Array:
    return s * (HIGH - LOW) + LOW


def _soft(log_open: jax.Array, u: jax.Array) -> jax.Array:
    return jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_open) / BETA)


def _gate(log_open: jax.Array, u: jax.Array) -> jax.Array:
    return jnp.clip(_stretched(_soft(log_open, u)), 0, 1)


def _gate_slope(w, log_open, u, g):
    """With z the gate, the gradient by w is z times that of the weights that were used.
    Where a gate is shut or fully open it does not move.
    """
    s = _soft(log_open, u)
    z = _stretched(s)
    moves = jnp.logical_and(z > 0, z < 1)
    by_gate = g * w / jnp.where(moves, z, 1)
    return jnp.where(moves, by_gate * (HIGH - LOW) * s * (1 - s) / BETA, 0)


def _expected(w: jax.Array, log_open: jax.Array) -> tuple[Any, jax.Array]:
    """The gradient of the expected number of open gates, each for its weights."""
    p = jax.nn.sigmoid(log_open - BETA * math.log(-LOW / HIGH))
    return 0, (w.size / max(log_open.size, 1)) * p * (1 - p)


def _test_gate(log_open: jax.Array) -> jax.Array:
    return jnp.clip(_stretched(jax.nn.sigmoid(log_open)), 0, 1)


HARD_CONCRETE = Family(
    field="log_open",
    noise=_uniform,
    weights=lambda w, s, noise: w * _gate(s, noise),
    slope=_gate_slope,
    penalty=_expected,
    kept=lambda w, s: w * _test_gate(s),
    alive=lambda w, s: jnp.broadcast_to(_test_gate(s) > 0, w.shape),
    score=lambda w, s: jnp.abs(w) * jax.nn.sigmoid(s),
    limits=(math.log(1e-2), math.log(1e2)),
)
FAMILIES = (GAUSSIAN, HARD_CONCRETE)
_STATES = {"log_variance": VariationalDropoutState, "log_open": HardConcreteState}


# --- the transformation ---------------------------------------------------------------
def sampled(
    inner: optax.GradientTransformation,
    family: Family,
    *,
    start: float,
    examples: int,
    strength: Strength,
    key: Key,
    where: Where | None = None,
    pattern: Pattern = SINGLE,
) -> optax.GradientTransformationExtraArgs:
    """Trains weights and second arrays by the same optimizer, each with its own state.
    The penalty is that of ``strength`` / ``examples``.
    """
    checks.transformation("inner", inner)
    checks.whole("examples", examples, 1, cure="Give the number of training examples.")
    inner_tx = optax.with_extra_args_support(inner)

    def init_fn(params):
        layers = layers_of(params, where, None, pattern, may_be_empty=True)
        check_some(layers, params)
        check_real(layers.leaves, "what is drawn")
        _check_names(strength, layers)
        cure = "Give a schedule of numbers of at least 0."
        checks.first_value("strength", strength, 0, cure=cure)
        second = []
        for x, leaf in zip(layers.pick(params), layers.leaves, strict=True):
            shape = leaf.pattern.view_shape(leaf.shape)
            whole = len(shape) == len(leaf.shape) and pattern.density is None
            pairs = zip(shape, leaf.shape, strict=False)
            if not whole or any(n not in (1, m) for n, m in pairs):
                cure = "Pass patterns.output_units(axis=0) for input units, or None."
                checks.fail("pattern", pattern.name, "units of whole axes", cure)
            one = jnp.zeros_like(x, dtype=as_wide(x.dtype))
            if shape != leaf.shape:
                one = jnp.zeros(shape, one.dtype)
            second.append(one + start)
        second = layers.rebuild(second)
        seed = jax.random.key_data(as_key(key))
        return _STATES[family.field](
            jnp.zeros([], jnp.int32),
            jnp.array(seed, copy=True),
            second,
            inner_tx.init(params),
            inner_tx.init(second),
        )

    def update_fn(updates, state, params=None, **extra_args):
        checks.needs_params(params, "the weights decide how they are drawn")
        checks.own_state(state, _STATES[family.field])
        second = getattr(state, family.field)
        layers = _layers_of(second, params)
        check_gradient(updates, params)
        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        arrays = list(layers.pick(second))
        noises = _noises(family, state, layers.names, arrays)
        slopes = []
        for i, w, s, noise, name in zip(
            layers.index, layers.pick(params), arrays, noises, layers.names, strict=True
        ):
            w, g = w.astype(s.dtype), flat[i].astype(s.dtype)
            size = _at(strength, name, state.count) / examples
            by_weight, by_second = family.penalty(w, s)
            slope = _summed(family.slope(w, s, noise, g), s.shape)
            slopes.append((slope + size * by_second).astype(s.dtype))
            flat[i] = (g + size * by_weight).astype(flat[i].dtype)
        updates, inner_state = inner_tx.update(
            jax.tree.unflatten(structure, flat), state.inner_state, params, **extra_args
        )
        steps, drawn_state = inner_tx.update(
            layers.rebuild(slopes), state.drawn_state, second
        )
        moved = [
            jnp.clip(s + u, *family.limits).astype(s.dtype)
            for s, u in zip(arrays, layers.pick(steps), strict=True)
        ]
        return updates, _STATES[family.field](
            jnp.asarray(optax.safe_increment(state.count)),
            state.key,
            layers.rebuild(moved),
            inner_state,
            drawn_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_names(strength: Strength, layers: Layers) -> None:
    if isinstance(strength, Mapping) and set(strength) != set(layers.names):
        cure = "Give one number for each leaf, or one for all."
        checks.fail("strength", sorted(strength), f"a dict of {layers.names}", cure)


def _at(strength: Strength, name: str, count: jax.Array) -> Any:
    """The strength of a leaf at an update."""
    if isinstance(strength, Mapping):
        return strength[name]
    if callable(strength):
        return checks.scalar("strength", cast(Any, strength)(count))
    return strength


def _layers_of(second: PyTree, params: PyTree) -> Layers:
    """The leaves that have a second array, whose trees have its structure."""
    flat, structure = flatten(second)
    if names_of(structure) != leaf_names(params):
        raise ArgumentError(
            f"`params` has the leaves {leaf_names(params)}; init saw "
            f"{names_of(structure)}. Pass the tree that init was called with."
        )
    chosen = [not is_hole(x) for x in flat]
    return chosen_layers(params, chosen, structure=structure)


def _summed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum over axes that share one entry."""
    axes = tuple(
        i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m
    )
    return jnp.sum(x, axis=axes, keepdims=True) if axes else x


def _noises(family: Family, state: Any, names: Any, likes: Any, key: Any = None) -> Any:
    """What is drawn at this step, by the leaves' own keys; or with another key."""
    if key is None:
        own = jax.random.wrap_key_data(state.key.astype(jnp.uint32))
        key = jax.random.fold_in(own, state.count)
    pairs = zip(leaf_keys(key, names), likes, strict=True)
    return [draw(family.noise, own, x, x.dtype) for own, x in pairs]


# --- what the loss and the test call --------------------------------------------------
def _drawn(opt_state: PyTree) -> Iterator[tuple[Family, Any, dict[str, jax.Array]]]:
    """Each state whose weights are drawn: its family, and second arrays by name."""
    found = False
    for state in states_with(opt_state, *_STATES):
        found = True
        family = next(f for f in FAMILIES if hasattr(state, f.field))
        flat, structure = flatten(getattr(state, family.field))
        pairs = zip(names_of(structure), flat, strict=True)
        yield family, state, {name: x for name, x in pairs if not is_hole(x)}
    if not found:
        raise ArgumentError(
            f"`opt_state` draws no weights; got {type(opt_state).__name__}, and it "
            "must come from sparse_variational_dropout or l0_regularization. Pass the "
            "state of that optimizer."
        )


def _changed(params: PyTree, change: Callable[..., Any], named: Mapping) -> PyTree:
    """Parameters with the leaves of these names changed, in their own dtype."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    names = leaf_names(params)
    if missing := sorted(set(named) - set(names)):
        raise ArgumentError(
            f"`params` lacks {missing}, which `opt_state` draws; its leaves are "
            f"{names}. Pass the parameters that the optimizer was made for."
        )
    for i, (name, w) in enumerate(zip(names, flat, strict=True)):
        if name in named:
            wide = w.astype(named[name].dtype)
            flat[i] = change(name, wide, named[name]).astype(w.dtype)
    return jax.tree.unflatten(structure, flat)


@boundary("sample_weights")
def sample_weights(params: PyTree, opt_state: PyTree, key: Key | None = None) -> PyTree:
    """The weights of this step, as the method draws them: what the loss is called with.

    ``sparse_variational_dropout`` and ``l0_regularization`` learn how the weights are
    drawn. The gradient of that comes from the drawn weights, so that the loss must use
    them: differentiate ``loss(sample_weights(params, opt_state), batch)`` by
    ``params``. The numbers are those of the state's key and count; the update draws the
    same.

    Args:
      params: The parameters.
      opt_state: The optimizer state, also chained or injected.
      key: None for the step of the state. An integer seed or a random key draws other
        weights, for an average over networks after training; the update that follows
        would not know of it.

    Returns:
      A tree like ``params``. Leaves that are not drawn are as they were.

    Raises:
      ValueError: Without a state of such a method, or if ``params`` does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_variational_dropout(
      ...     optax.adam(1e-3), examples=100, key=0)
      >>> params = {"w": jnp.ones((3, 2))}
      >>> state = tx.init(params)
      >>> def loss(params, x):
      ...     params = sparse_optax.sample_weights(params, state)  # the second line
      ...     return jnp.sum(x @ params["w"])
      >>> grads = jax.grad(loss)(params, jnp.ones((1, 3)))
      >>> updates, state = tx.update(grads, state, params)
    """
    if key is not None:
        check_key(key)
    for family, state, named in _drawn(opt_state):
        given = None if key is None else as_key(key)
        noises = _noises(family, state, list(named), list(named.values()), given)
        noise = dict(zip(named, noises, strict=True))

        def change(name, w, s, family=family, noise=noise):
            return family.weights(w, s, noise[name])

        params = _changed(params, change, named)
    return params


@boundary("final_weights")
def final_weights(params: PyTree, opt_state: PyTree, density: Any = None) -> PyTree:
    r"""The weights for a test, exactly zero where the method has dropped them.

    Variational dropout keeps :math:`\theta` where :math:`\log \alpha \le 3`. L0 keeps
    w times the gate of the test,
    :math:`\hat z = \min(1, \max(0, \sigma(\log a) (\zeta - \gamma) + \gamma))`. How
    many are left is what the penalty has led to.

    Args:
      params: The parameters.
      opt_state: The optimizer state of ``sparse_variational_dropout`` or
        ``l0_regularization``, also chained or injected.
      density: None for the rule of the method. A fraction in (0, 1], or a budget, keeps
        that many weights instead, of all drawn leaves as one pool: those with the
        smallest :math:`\alpha`, or the largest :math:`|w| \sigma(\log a)`. With L0 a
        weight whose gate is shut is zero all the same.

    Returns:
      A tree like ``params``. ``masks.nonzero_masks`` of it are the masks.

    Raises:
      ValueError: Without a state of such a method, or if an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_variational_dropout(
      ...     optax.sgd(1e-3), examples=100, log_variance=0.0, key=0)
      >>> params = {"w": jnp.array([[2.0, 0.2], [0.1, 0.5]])}
      >>> state = tx.init(params)  # alpha is 1 / w^2
      >>> sparse_optax.final_weights(params, state)["w"].tolist()
      [[2.0, 0.0], [0.0, 0.5]]
    """
    for family, _, named in _drawn(opt_state):
        stays = _cut(params, family, named, density) if density is not None else {}

        def change(name, w, s, family=family, stays=stays):
            alive = stays[name] if stays else family.alive(w, s)
            return jnp.where(alive, family.kept(w, s), 0)

        params = _changed(params, change, named)
    return params


def _cut(params: PyTree, family: Family, named: Mapping, density: Any) -> dict:
    """Masks by name of the weights that a density keeps."""
    wanted = ranked(params, density, where=lambda name, leaf: name in named)
    scores = [
        (family.score(w.astype(named[name].dtype), named[name]),)
        for name, w in zip(wanted.layers.names, wanted.layers.pick(params), strict=True)
    ]
    masks = wanted.layers.pick(highest(wanted, scores))
    return dict(zip(wanted.layers.names, masks, strict=True))
