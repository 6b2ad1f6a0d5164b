"""The start of a run: checks the arguments and makes the first masks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax import checks, schedules
from sparse_optax.budgets.resolve import check_static, total, unit_counts_of
from sparse_optax.checks import ArgumentError, fail
from sparse_optax.layers import (
    Layers,
    PyTree,
    Where,
    check_some,
    check_where,
    choose,
    is_abstract,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.masks.make import (
    Key,
    check_key,
    place,
    random_of_layers,
    top_of_layers,
)
from sparse_optax.masks.optimizer_state import states_with
from sparse_optax.masks.tree import (
    check_dtype,
    check_masks,
    check_some_kept,
    check_some_masks,
    flatten,
    layers_of_masks,
    names_of,
    unpack,
    whole_count,
)
from sparse_optax.patterns import SINGLE, Pattern
from sparse_optax.regrowth.frozen import at_most, check_room, check_within, usable_of
from sparse_optax.regrowth.inner import has_line_search
from sparse_optax.regrowth.rules import Rule
from sparse_optax.regrowth.targets import first_counts, is_ramp
from sparse_optax.schedules.prune_rate import cosine_unless
from sparse_optax.schedules.timing import check_some_due, never_due


class Method(NamedTuple):
    """The arguments of ``regrow``, with their names."""

    inner: optax.GradientTransformation | None
    density: Any
    prune: Rule
    redistribute: Rule
    grow: Rule
    update_period: int
    update_start: int
    update_stop: int | None
    prune_rate: optax.ScalarOrSchedule | None
    key: Key
    masks: PyTree | None
    where: Where | None
    stacked: Mapping[str, int] | None
    momentum: str | float
    reset_moments: str
    packed: bool
    ramp: optax.Schedule | schedules.Towards | None
    hidden: bool
    pattern: Pattern
    regrown: str
    dense_until: int | None = None
    within: PyTree | None = None
    freeze: bool = False

    @property
    def timing(self) -> tuple[Any, Any, Any]:
        """Period, start and stop of cycles; the cut of `dense_until` is none."""
        start = self.update_start
        if self.dense_until is not None:
            after = self.dense_until + 1
            start, after = checks.concrete(start), checks.concrete(after)
            known = checks.known(start, after)
            start = max(start, after) if known else jnp.maximum(start, after)
        return self.update_period, start, self.update_stop

    @property
    def rules(self) -> tuple[Rule, Rule, Rule]:
        """The prune, the redistribution and the growth rule."""
        return self.prune, self.redistribute, self.grow

    @property
    def needs(self) -> set[str]:
        """What the rules read."""
        return {name for rule in self.rules for name in rule.needs}

    @property
    def inner_tx(self) -> optax.GradientTransformationExtraArgs:
        """The wrapped optimizer, or the identity behind an optimizer in a chain."""
        return optax.with_extra_args_support(self.inner or optax.identity())

    def rate_at(self, count: jax.Array) -> jax.Array:
        """The prune rate after ``count`` finished updates."""
        rate = cosine_unless(self.prune_rate, 0.5, self.update_stop)
        rate = rate(count) if callable(rate) else rate
        return jnp.asarray(checks.scalar("prune_rate", rate), jnp.float32)


def resets_of(reset_moments: str | None, inner: Any) -> str:
    """What is reset by default: moments of grown weights, where there are moments."""
    if reset_moments is not None:
        return reset_moments
    return "none" if inner is None else "grown"


# --- arguments ------------------------------------------------------------------------
def check(method: Method) -> None:
    """Raises if an argument of ``regrow`` is out of its range. Only Python numbers are
    checked: injected hyper-parameters are traced.
    """
    _check_parts(method)
    _check_timing(method)
    _check_ramp(method)
    _check_dense_until(method)
    _check_frozen(method)
    momentum = method.momentum
    if isinstance(momentum, str) and momentum != "auto":
        fail("momentum", momentum, '"auto" or a number in [0, 1)', "Pass 0.9.")
    if not isinstance(momentum, str):
        cure = 'Pass 0.9, or leave it out for "auto".'
        checks.number("momentum", momentum, 0, 1, ends="[)", cure=cure)
    cure = 'Use "grown" for RigL, else "none".'
    checks.choice("reset_moments", method.reset_moments, ("none", "grown"), cure=cure)
    cure = 'Use "zero", as most papers do.'
    checks.choice("regrown", method.regrown, ("zero", "value"), cure=cure)
    checks.flag("hidden", method.hidden)
    checks.flag("packed", method.packed)
    check_key(method.key)
    check_where(method.where)
    checks.names_axes("stacked", method.stacked)
    for name, given in (("masks", method.masks), ("within", method.within)):
        if given is not None:
            check_masks(name, given)
            check_some_masks(name, given)
    if method.inner is None:
        cure = "Wrap the optimizer: regrow(optax.sgd(...), ...)."
        for name, plain in (
            ("momentum", "auto"),
            ("reset_moments", "none"),
            ("hidden", False),
        ):
            value = getattr(method, name)
            if value != plain:
                fail(name, value, f"{plain!r} where there is no `inner`", cure)


def check_acts(method: Method) -> None:
    """Raises if no cycle would ever come."""
    check_some_due(*method.timing)


def _check_parts(method: Method) -> None:
    if method.inner is not None:
        checks.transformation("inner", method.inner)
    names = ("prune", "redistribute", "grow")
    for name, rule in zip(names, method.rules, strict=True):
        if not isinstance(rule, Rule):
            cure = "Wrap a function: regrowth.stateless(f)."
            fail(name, rule, "a regrowth.Rule", cure)
        if not set(rule.needs) <= {"momentum", "gradient"}:
            allowed = 'some of ("momentum", "gradient")'
            fail(f"{name}.needs", rule.needs, allowed, "All rules see the weights.")


def _check_timing(method: Method) -> None:
    cure = "Pass the steps of an epoch."
    checks.updates("update_period", method.update_period, 1, cure=cure)
    checks.updates("update_start", method.update_start, 0)
    checks.updates("update_stop", method.update_stop, 1, optional=True)
    if method.prune_rate is None:
        if method.update_stop is None:
            cure = "The default prune rate falls to 0 at update_stop; or pass a rate."
            fail("update_stop", None, "given where `prune_rate` is None", cure)
    else:
        cure = "Use 0.5 as in the paper."
        checks.number("prune_rate", method.prune_rate, 0, 1, schedule=True, cure=cure)


def _check_ramp(method: Method) -> None:
    may_miss = method.masks is not None and method.ramp is None
    check_static(method.density, pattern=method.pattern, may_miss=may_miss)
    ramp = method.ramp
    if ramp is not None and not is_ramp(ramp):
        cure = "Pass schedules.cubic_density(...), or leave it out for a constant."
        fail("ramp", ramp, "a schedule of the density", cure)


def _check_dense_until(method: Method) -> None:
    until = method.dense_until
    if until is None:
        return
    cure = "Leave it out to start sparse."
    checks.updates("dense_until", until, 1, optional=True, cure=cure)
    if method.ramp is not None:
        cure = "A `ramp` says itself when the network is dense: leave one of them out."
        fail("dense_until", until, "None beside `ramp`", cure)
    if method.masks is not None:
        cure = "The first masks are full: leave `masks` out."
        fail("dense_until", until, "None beside `masks`", cure)
    if never_due(*method.timing):
        stop = method.update_stop
        cure = "Lower it, raise update_stop, or use one_shot_magnitude."
        allowed = f"such that a cycle comes after it and before update_stop={stop}"
        fail("dense_until", until, allowed, cure)


def _check_frozen(method: Method) -> None:
    checks.flag("freeze", method.freeze)
    if method.freeze and method.hidden:
        cure = "Hidden weights train: leave out one of the two."
        fail("freeze", True, "False with `hidden`", cure)
    if method.within is None:
        return
    cure = "Leave out one of the two."
    if method.freeze:
        fail("freeze", True, "False beside `within`, which freezes the others", cure)
    if method.hidden:
        fail("hidden", True, "False beside `within`", cure)
    if method.pattern != SINGLE:
        allowed = "None beside `within`"
        fail("pattern", method.pattern.name, allowed, cure)


def check_inner(method: Method, inner_state: Any, layers: Layers) -> None:
    """Raises if the wrapped optimizer cannot work inside the engine."""
    for other in states_with(inner_state, "regrow_masks"):
        masks, structure = flatten(other.regrow_masks)
        pairs = zip(names_of(structure), masks, strict=True)
        both = {name for name, m in pairs if not is_hole(m)} & set(layers.names)
        if both:
            raise ArgumentError(
                f"another sparse method stands in `inner` and has masks of "
                f"{sorted(both)}, too; a layer must have one method. Take one of them "
                "away, or give them different layers with `where`."
            )

    def is_accumulator(node):
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(inner_state, is_leaf=is_accumulator)
    if any(is_accumulator(node) for node in nodes):
        raise ArgumentError(
            "optax.MultiSteps stands inside; masks would move on steps that only "
            "accumulate. Put it outside: optax.MultiSteps(method(...), k)."
        )
    if method.hidden and has_line_search(inner_state):
        raise ArgumentError(
            "a line search stands in `inner`, and hidden weights do not change the "
            "loss that it lowers; `inner` must have a learning rate of its own. Use "
            "optax.sgd(0.1), for instance, or static_sparse or rigl around the line "
            "search."
        )


# --- first masks ----------------------------------------------------------------------
def first_masks(
    method: Method, params: PyTree, seed: jax.Array
) -> tuple[Layers, tuple[jax.Array, ...]]:
    """The layers and their first masks: given, random, or of the largest weights."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    if not flat:  # `optax.tree.map_params` initialises with a tree without leaves
        return Layers(structure, (), (), method.pattern), ()
    if method.masks is None:
        layers = layers_of(params, method.where, method.stacked, method.pattern)
        _check_sizes(layers)
        usable = usable_weights(method, layers, params)
        return layers, tuple(_made(method, layers, params, seed, usable))
    layers = layers_of_masks(method.masks, params, method.stacked, method.pattern)
    # The trees of the state are like the parameters, whatever the masks' containers.
    layers = layers._replace(structure=structure)
    check_some(layers, params)
    _check_sizes(layers)
    _check_where(method, layers, params)
    given = layers.pick(method.masks)
    for name, mask in zip(layers.names, given, strict=True):
        check_dtype(mask, name)
    # Copied, since the state may be donated and the caller keeps the masks. The tree is
    # that of the parameters, not of the masks.
    kept = tuple(jnp.array(unpack(m), copy=True) for m in given)
    _check_given(method, layers, params, kept)
    check_within(layers, kept, usable_weights(method, layers, params))
    return layers, kept


def _check_where(method: Method, layers: Layers, params: PyTree) -> None:
    """Raises unless `where` chooses the leaves that have given masks."""
    if method.where is None:
        return
    masked = set(layers.index)
    chosen = {i for i, c in enumerate(choose(params, method.where)) if c}
    if differ := sorted(masked ^ chosen):
        raise ArgumentError(
            f"`where` and `masks` choose different leaves: only one of them has "
            f"{[leaf_names(params)[i] for i in differ]}; they must agree. Leave out "
            "`where`: the leaves are those with masks."
        )


def usable_weights(
    method: Method, layers: Layers, params: PyTree
) -> tuple[jax.Array, ...] | None:
    """The masks of `within`, one per leaf; None without. Raises if there is no room."""
    if method.within is None or not layers.index:
        return None
    usable = usable_of(method.within, layers, params)
    if method.masks is None:
        final = unit_counts_of(method.density, layers, params)
        check_room(layers, final, usable)
    return usable


def _check_sizes(layers: Layers) -> None:
    for leaf in layers.leaves:
        if leaf.size >= 2**31:  # counts of a layer are int32
            raise ArgumentError(
                f"{leaf.name!r} of shape {leaf.shape} is a layer of {leaf.size} "
                "weights; a layer must hold fewer than 2**31. Make it several layers: "
                f"stacked={{{leaf.name!r}: axis}} takes each slice along an axis as "
                "one."
            )


def _made(
    method: Method,
    layers: Layers,
    params: PyTree,
    seed: jax.Array,
    usable: tuple[jax.Array, ...] | None,
) -> list[jax.Array]:
    """Masks of whole units, with the counts that a ramp has at the start."""
    if not layers.index:
        return []
    if method.dense_until is not None:
        full = usable or [jnp.ones_like(x, dtype=bool) for x in layers.pick(params)]
        return [jnp.array(m, copy=True) for m in full]
    if method.ramp is None:
        counts: Sequence[Any] = unit_counts_of(method.density, layers, params)
    else:
        counts = first_counts(method.ramp, method.density, layers, params)
    leaves, units = layers.pick(params), layers.units
    # Shapes alone have no largest weights; any masks have the right type.
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    if method.hidden and not abstract:
        sizes = [(x,) for x in layers.view(leaves)]
        kept = top_of_layers(sizes, counts, units.axes, jnp.abs)
    else:
        # If units are weights, masks have the sharding of the leaf.
        like = [
            x if x.shape == unit.shape else jax.ShapeDtypeStruct(unit.shape, x.dtype)
            for x, unit in zip(leaves, units.leaves, strict=True)
        ]
        if usable is not None:
            counts = at_most(counts, layers, usable)
        own = jax.random.fold_in(seed, 0)
        kept = random_of_layers(own, units, like, counts, usable)
    return list(map(place, layers.spread(kept, leaves), leaves))


def _check_given(
    method: Method, layers: Layers, params: PyTree, kept: Sequence[jax.Array]
) -> None:
    """Raises unless given masks follow the pattern and keep what the density asks."""
    if any(map(is_abstract, kept)):
        return
    pattern, moving = layers.pattern, method.ramp is not None
    # Under a ramp, groups of fixed density may start with any number.
    if not (moving and pattern.density is not None):
        for mask, leaf in zip(kept, layers.leaves, strict=True):
            if not leaf.pattern.follows(mask, leaf.axis):
                raise ArgumentError(
                    f"in `masks`, {leaf.name!r} does not follow {pattern.name}: "
                    + (
                        "units must be whole or empty"
                        if pattern.density is None
                        else "a group has another number of weights"
                    )
                    + ". Make the masks with this pattern."
                )
    if moving:
        return
    check_some_kept("masks", kept)
    if method.density is None or pattern.density is not None:
        return
    counts = unit_counts_of(method.density, layers, params)
    wanted = sum(
        total(n) * size for n, size in zip(counts, layers.unit_sizes, strict=True)
    )
    given = sum(whole_count(mask) for mask in kept)
    if wanted != given:
        raise ArgumentError(
            f"`masks` keep {given} weights and `density`={method.density!r} asks for "
            f"{wanted}; they must agree. Leave out `density`: the masks are the budget."
        )
