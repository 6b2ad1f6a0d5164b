"""``compact_training``: sparse training whose steps become faster as units die."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.compaction.analysis import Analysis
from sparse_optax.export.compaction.compact import (
    Source,
    Traced,
    analysis_of,
    find_needed,
    leaf_of,
    shape_of,
    source_of,
    traced_program,
)
from sparse_optax.export.compaction.facts import (
    Settings,
    cut,
    everything,
    is_number,
    lengths,
)
from sparse_optax.export.compaction.record import multiply_adds_of
from sparse_optax.export.compaction.small_form import (
    Cut,
    Lifted,
    arrays_in,
    cut_of,
    lifted,
    to_full,
    to_small,
)
from sparse_optax.layers import PyTree, is_hole, is_mask, leaf_names, path_name
from sparse_optax.masks.optimizer_state import kept_masks, states_with
from sparse_optax.schedules.timing import NoCycle

# Gradients of which the momentum of a missing weight is made: 0.9^100 is 3e-5.
_WINDOW = 100
# Updates after a cycle in full form: the method looks whether its zeros are there.
_LOOKS = 2
# Before one is compiled, the compilation of a small form is taken for this share of
# that of the full one, which has the cycle too.
_SHARE = 0.5
# Until a size is measured, this share of a step does not depend on it.
_FIXED = 0.2
# Nothing stays that is not needed: whether there is room for it, sizes say.
_EXACT = Settings(fold=False, spare_takes=False)
# A size has this much room, so that later cycles fit.
_ROOM = 1.05


class CompactTrained(NamedTuple):
    """What ``CompactTraining`` returns.

    Attributes:
      params: The parameters, at full size.
      state: The optimizer state, at full size.
      stats: The running statistics, or None.
      losses: The loss of each step, before its update.
    """

    params: PyTree
    state: PyTree
    stats: PyTree
    losses: jax.Array


class TrainingForm(NamedTuple):
    """The form in which some of the steps were taken.

    Attributes:
      multiply_adds: Of the loss, for one batch.
      steps: Steps that were taken in it.
      seconds: How long they took.
      compile_seconds: How long its compilation took.
    """

    multiply_adds: int
    steps: int
    seconds: float
    compile_seconds: float


class CompactTraining:
    """Training that is compacted between cycles, made by ``compact_training``.

    Call it with a number of batches, as often as you like. Compiled programs are kept
    from call to call.
    """

    def __init__(self, setting: "_Setting"):
        """Made by ``compact_training``."""
        self._setting = setting
        self._tasks: dict[Any, _Task] = {}

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        batches: PyTree,
        *data: Any,
        stats: PyTree | None = None,
    ) -> CompactTrained:
        """Trains for as many steps as there are batches.

        Args:
          params: The parameters.
          state: The optimizer state, of any number of finished updates.
          batches: An array, or a tuple of trees of arrays, with one entry per step
            along each leading axis. Give the same number of steps at each call:
            another number is compiled anew.
          *data: Arrays that are the same at each step, such as the whole data set.
          stats: Running statistics, if ``fn`` takes them.

        Returns:
          A ``CompactTrained``. What was given stays as it is.
        """
        return _train(self, params, state, batches, data, stats)

    @property
    def record(self) -> tuple[TrainingForm, ...]:
        """What was done in which form: the full one first, then the smaller ones in the
        order in which they were compiled.
        """
        forms = [form for task in self._tasks.values() for form in task.forms]
        return tuple(form.record() for form in forms)

    def table(self) -> str:
        """The record as aligned plain text."""
        rows = [("multiply-adds", "steps", "ms per step", "compiled in s")]
        for form in self.record:
            per_step = 1000 * form.seconds / max(form.steps, 1)
            rows.append(
                (
                    f"{form.multiply_adds:,}",
                    f"{form.steps:,}",
                    f"{per_step:.3g}",
                    f"{form.compile_seconds:.2f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pairs = (zip(row, widths, strict=True) for row in rows)
        return "\n".join("  ".join(x.rjust(n) for x, n in pair) for pair in pairs)


class _Setting(NamedTuple):
    """The arguments of ``compact_training``."""

    fn: Callable[..., Any]
    tx: optax.GradientTransformationExtraArgs
    total_steps: int
    window: int | None
    batch: Callable[..., Any] | None
    compile_at: tuple[int, ...] | None

    def args(self, item: Any, data: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of ``fn`` at one step."""
        given = (*_as_tuple(item), *data)
        return given if self.batch is None else _as_tuple(self.batch(*given))


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if type(x) is tuple else (x,)


@boundary("compact_training")
def compact_training(
    fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    total_steps: int,
    window: int | None = None,
    batch: Callable[..., Any] | None = None,
    compile_at: Sequence[int] | None = None,
) -> CompactTraining:
    r"""Sparse training whose steps become faster as units die.

    Between two cycles the masks do not move. A unit that nothing reads, and an input
    that nothing takes, needs no arithmetic until the next cycle. So the network trains
    in the small form of ``compact`` most of the time, and in its full form

    - in the last W updates before a cycle, where the momentum of missing weights is
      formed: of its older part :math:`\beta^W` is left with decay :math:`\beta`;
    - in the update with the cycle, and the two after it, where the method checks its
      zeros.

    Weights that are present get the updates of plain training. A weight or bias whose
    unit nothing reads has no gradient: it takes the optimizer's own update for a
    gradient of zero, such as :math:`w \leftarrow (1 - \eta \lambda) w`. The momentum of
    a missing weight of such a unit stands still in small form. Running statistics of a
    unit that went do, too.

    The optimizer must work entry by entry, as SGD and Adam do. A clip by the global
    norm does not: use ``clip_by_active_norm``. The loss must leave units alone that
    nothing reads: put decay into the optimizer.

    **When a size is compiled.** Programs depend on sizes and not on index sets, so one
    serves for many cycles. All steps are full at first. Times are measured: a new size
    is compiled when the time that it would have saved so far reaches the time of its
    compilation, and the steps that are left will save more than that again. So the
    choice, and the last bits of the result, may differ from run to run;
    ``compile_at`` fixes it.

    Args:
      fn: The loss, ``fn(params, *args)``, a floating scalar; with running statistics
        ``fn(params, stats, *args)``, which returns the loss and the new statistics.
        Any function that ``compact`` understands.
      tx: The optimizer, with a sparse method of this package that leaves missing
        weights at zero. No accumulation of gradients.
      total_steps: The number of updates after which training ends, at least 1.
      window: W, at least 0. None is 100 where a cycle reads the momentum of missing
        weights, and 0 where it does not. The period or more means plain training.
      batch: ``batch(*batches, *data)`` gives the arguments of ``fn`` at a step, such
        as ``lambda rows, x, y: (x[rows], y[rows])``. None hands over what is given.
      compile_at: Numbers of finished updates: after each of them the next steps in
        small form compile a new size. None measures.

    Returns:
      A ``CompactTraining``: call it with parameters, optimizer state and batches.

    Raises:
      ValueError: If an argument is out of range; when it is called, if the optimizer or
        the loss does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> def loss(params, x, y):
      ...     hidden = jnp.maximum(x @ params["v"] + params["b"], 0)
      ...     return jnp.mean((hidden @ params["w"] - y) ** 2)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (200, 4, 10))  # 200 batches of 4
      >>> params = {"b": jnp.zeros(30), "v": jax.random.normal(keys[1], (10, 30)),
      ...     "w": jax.random.normal(keys[2], (30, 1))}
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.sgd(0.01, momentum=0.9), density=0.05, update_period=50,
      ...     update_stop=200, key=0)
      >>> training = sparse_optax.compact_training(
      ...     loss, tx, total_steps=200, window=20, compile_at=range(0, 200, 50))
      >>> params, state, _, losses = training(
      ...     params, tx.init(params), (x, x[..., :1]))
      >>> full, *small = training.record
      >>> full.steps, sum(form.steps for form in small)
      (72, 128)
      >>> small[-1].multiply_adds < full.multiply_adds / 2
      True
    """
    if not callable(fn):
        checks.fail("fn", fn, "a function fn(params, *args)", "Pass the loss.")
    checks.transformation("tx", tx)
    cure = "Give the number of updates of the whole training."
    checks.whole("total_steps", total_steps, 1, static=True, cure=cure)
    if window is not None:
        cure = "Give 100, for instance, or leave it out."
        checks.whole("window", window, 0, static=True, cure=cure)
    if batch is not None and not callable(batch):
        cure = "Give lambda rows, x, y: (x[rows], y[rows]), for instance."
        checks.fail("batch", batch, "a function of batches and data", cure)
    setting = _Setting(
        fn,
        optax.with_extra_args_support(tx),
        int(total_steps),
        None if window is None else int(window),
        batch,
        None if compile_at is None else _counts(compile_at),
    )
    return CompactTraining(setting)


def _counts(compile_at: Sequence[int]) -> tuple[int, ...]:
    """``compile_at`` as integers, checked."""
    cure = "Give [0], for instance, or leave it out."
    if not isinstance(compile_at, Sequence | np.ndarray) or isinstance(compile_at, str):
        checks.fail("compile_at", compile_at, "a sequence of integers", cure)
    for x in compile_at:
        checks.whole("compile_at", x, 0, static=True, cure=cure)
    return tuple(sorted(map(int, compile_at)))


# --- the steps of a call --------------------------------------------------------------
class _Now(NamedTuple):
    """Where a call stands, at full size."""

    params: PyTree
    state: PyTree
    stats: PyTree
    losses: jax.Array


class _Given(NamedTuple):
    """What a call does not change."""

    batches: PyTree
    data: tuple[Any, ...]


@boundary("compact_training")
def _train(
    training: CompactTraining,
    params: PyTree,
    state: PyTree,
    batches: PyTree,
    data: tuple[Any, ...],
    stats: PyTree,
) -> CompactTrained:
    setting, n = training._setting, _steps_in(batches)
    given = jax.tree.map(jnp.asarray, _Given(batches, data))
    now = _Now(params, state, stats, jnp.zeros(n, jnp.float32))
    # Copies, which the programs may overwrite, in types that do not change.
    now = jax.tree.map(_own, now)
    count, key = _finished(now.state), _signature((now, given))
    task = training._tasks.get(key)
    if task is None:
        task = training._tasks[key] = _Task(setting, now, given)
    full = task.in_full(count, n)
    for start, stop in _runs(full):
        if full[start]:
            now = task.train_full(now, given, start, stop)
        else:
            now = task.train_small(now, given, start, stop, count + start)
        if _finished(now.state) != count + stop:
            raise ArgumentError(
                f"`tx` counted {_finished(now.state) - count - start} updates in "
                f"{stop - start} steps; each step must be an update. Use larger "
                "batches in place of optax.MultiSteps."
            )
    return CompactTrained(*now)


def _own(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jnp.copy(x)
    return jnp.array(x, x.dtype, copy=True)


def _steps_in(batches: PyTree) -> int:
    """The number of steps."""
    shapes = [np.shape(x) for x in jax.tree.leaves(batches)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or 0 in counts:
        raise ArgumentError(
            "`batches` must hold arrays with one entry per step along each leading "
            f"axis, at least one; got the shapes {shapes}. Stack the batches."
        )
    return counts.pop()


def _signature(tree: Any) -> Any:
    """What programs are kept by."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _finished(state: PyTree) -> int:
    """The number of finished updates of the method in a state."""
    counts = [s.count for s in states_with(state, "regrow_masks")]
    if not counts:
        raise ArgumentError(
            f"`state` holds no masks; got {type(state).__name__}, and it must come "
            "from an optimizer with a sparse method, such as sparse_momentum_regrow. "
            "Pass tx.init(params)."
        )
    if any(np.ndim(x) for x in counts):
        raise ArgumentError(
            "`state` holds several members of an ensemble; it must be that of one "
            "network. Train the members one after another."
        )
    return int(counts[0])


def _runs(full: np.ndarray) -> list[tuple[int, int]]:
    """Starts and stops of runs of steps of one form."""
    changes = np.flatnonzero(np.diff(full)) + 1
    ends = [0, *changes.tolist(), len(full)]
    return list(itertools.pairwise(ends))


# --- forms ----------------------------------------------------------------------------
class _Form:
    """A compiled program and what is measured of it."""

    def __init__(self, call: Callable[..., Any], multiply_adds: int, seconds: float):
        self.call = call
        self.multiply_adds = multiply_adds
        self.compile_seconds = seconds
        self.steps = 0
        self.seconds = 0.0
        self.per_step = math.inf

    def run(self, *args: Any, start: int, stop: int) -> Any:
        """Takes steps, and measures them."""
        begin = time.perf_counter()
        made = jax.block_until_ready(self.call(*args, start, stop))
        took = time.perf_counter() - begin
        self.steps += stop - start
        self.seconds += took
        self.per_step = min(self.per_step, took / (stop - start))
        return made

    def record(self) -> TrainingForm:
        """What is measured."""
        return TrainingForm(
            self.multiply_adds, self.steps, self.seconds, self.compile_seconds
        )


class _SmallForm(_Form):
    """A form that serves all index sets of its sizes."""

    def __init__(self, plan: "_Plan", *args: Any):
        super().__init__(*args)
        self.sizes = sizes_of(plan.analysis)
        self.sums = sums_of(plan.analysis)
        self.rows = plan.rows
        self.text = plan.lifted.text
        # Index sets in derivatives of their own; nearly always there are none.
        self.arrays = plan.arrays()

    def serves(self, plan: "_Plan") -> bool:
        """Whether the program is that of a plan."""
        same = plan.rows == self.rows and plan.lifted.text == self.text
        return same and (not self.arrays or plan.arrays() == self.arrays)


def sizes_of(analysis: Analysis) -> dict[Any, tuple[Any, ...]]:
    """The lengths of what is needed of each value."""
    return {x: lengths(box, x.shape) for x, box in analysis.need.items()}


def sums_of(analysis: Analysis) -> dict[Any, int]:
    """Over how many indices each contraction sums."""
    return {key: int(kept.sum()) for key, kept in analysis.sums.items()}


class _Plan(NamedTuple):
    """One analysis, and what it makes of the leaves."""

    analysis: Analysis
    cuts: tuple[Cut, ...]  # of the parameters, then of the statistics
    lifted: Lifted
    own: list[Any]  # shapes of the parameters that are needed
    others: list[Any]  # shapes of all other arguments

    def loss(self, params: list[Any], others: list[Any], constants: Any) -> Any:
        """The loss, and the new statistics."""
        value, *stats = self.lifted.call(constants, *params, *others)
        return value, stats

    def arrays(self) -> bytes:
        """The arrays that stand in the derivative itself."""
        gradient = jax.grad(self.loss, has_aux=True)
        return arrays_in(gradient, self.own, self.others, self.lifted.constants)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows below the box of each leaf."""
        return tuple(x.rows for x in self.cuts)


# --- one kind of call -----------------------------------------------------------------
class _Task:
    """Programs for parameters and batches of certain shapes."""

    def __init__(self, setting: _Setting, now: _Now, given: _Given):
        self.setting = setting
        self.has_stats = now.stats is not None
        self.number = len(jax.tree.leaves(now.params))
        between = _told(setting.tx, now)
        self.due, self.near = between.due, np.zeros(0, int)
        wanted = _WINDOW if between.reads_momentum else 0
        self.window = wanted if setting.window is None else setting.window
        self.args = jax.eval_shape(
            lambda given: setting.args(_entry(given.batches, 0), given.data), given
        )
        self.source = self._source(now)
        self.traced = self._traced()
        self.owners = _owners(self.source, now)
        self.looped = _looped(self.traced)
        self.full: _Form | None = None
        self.small: list[_SmallForm] = []
        self.compiled = 0  # of `compile_at`
        self.lost = 0.0  # seconds that a smaller size would have saved
        self.planning = 0.0  # seconds to prepare steps in small form

    @property
    def forms(self) -> list[_Form]:
        """All forms."""
        return [*([] if self.full is None else [self.full]), *self.small]

    # --- the loss ---------------------------------------------------------------------
    def _source(self, now: _Now) -> Source:
        """The loss as a function to compact."""
        fn, variables = self.setting.fn, {"params": now.params, "stats": now.stats}

        def loss(variables, *args):
            if self.has_stats:
                return fn(variables["params"], variables["stats"], *args)
            return fn(variables["params"], *args)

        state = (lambda out: {"stats": out[1]}) if self.has_stats else None
        masks = {"params": _tree_of(now.params, kept_masks(now.state, "state"))}
        return source_of(loss, variables, masks, state, _EXACT)

    def _traced(self) -> Traced:
        """Its program, checked."""
        traced = traced_program(self.source, self.args)
        value = traced.result[0] if self.has_stats else traced.result
        right = hasattr(value, "shape") and not value.shape
        if not right or not jnp.issubdtype(value.dtype, jnp.floating):
            cure = "Return the mean over the batch; statistics need `stats`."
            checks.fail("fn", value, "a function that gives a floating scalar", cure)
        return traced

    # --- full form --------------------------------------------------------------------
    def in_full(self, count: int, n: int) -> np.ndarray:
        """Which of the next n steps are in full form."""
        steps = np.arange(count, count + n)
        near = self._due_before(count + n + self.window)
        # From the looks back to the end of the window.
        ahead = near[steps + self.window + 1] - near[np.maximum(steps - _LOOKS, 0)]
        return (ahead > 0) | (steps <= _LOOKS)

    def _due_before(self, stop: int) -> np.ndarray:
        """For each count up to ``stop``, how many cycles are due before it."""
        if len(self.near) <= stop:
            stop = max(stop, self.setting.total_steps + self.window)
            counts = jnp.arange(stop, dtype=jnp.int32)
            due = [np.asarray(is_due(counts)) for is_due in self.due]
            any_due = np.logical_or.reduce(due)
            self.near = np.concatenate([[0], np.cumsum(any_due)])
        return self.near

    def train_full(self, now: _Now, given: _Given, start: int, stop: int) -> _Now:
        """Takes steps in full form."""
        if self.full is None:
            call, seconds = self._compiled(self._full_step, now, given, ())
            work, _ = multiply_adds_of(analysis_of(self.source, self.traced))
            self.full = _Form(call, work, seconds)
        return self.full.run(now, given, (), start=start, stop=stop)

    def _full_step(self, now: _Now, args: Any, constants: Any) -> tuple[_Now, Any]:
        def loss(params):
            if self.has_stats:
                return self.setting.fn(params, now.stats, *args)
            return self.setting.fn(params, *args), None

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(now.params)
        tx = self.setting.tx
        updates, state = tx.update(gradient, now.state, now.params)
        params = optax.apply_updates(now.params, updates)
        return now._replace(params=params, state=state, stats=stats), value

    def _compiled(
        self, step: Any, now: Any, given: _Given, constants: Any
    ) -> tuple[Callable[..., Any], float]:
        """A program of many steps, and the seconds of its compilation."""
        begin = time.perf_counter()
        zero = jnp.zeros([], jnp.int32)

        def one(now, given, constants, i):
            args = self.setting.args(_entry(given.batches, i), given.data)
            after, loss = step(now, args, constants)
            losses = now.losses.at[i].set(loss.astype(jnp.float32))
            after = after._replace(losses=losses)
            return jax.tree.map(_as_before, after, now)

        def many(now, given, constants, start, stop):
            return lax.fori_loop(
                start, stop, lambda i, now: one(now, given, constants, i), now
            )

        function = many if self.looped else one
        places = (zero, zero) if self.looped else (zero,)
        jitted = jax.jit(function, donate_argnums=0)
        compiled = jitted.lower(now, given, constants, *places).compile()
        seconds = time.perf_counter() - begin

        def call(now, given, constants, start, stop):
            if self.looped:
                return compiled(now, given, constants, np.int32(start), np.int32(stop))
            for i in range(start, stop):
                now = compiled(now, given, constants, np.int32(i))
            return now

        return call, seconds

    # --- small form -------------------------------------------------------------------
    def train_small(
        self, now: _Now, given: _Given, start: int, stop: int, count: int
    ) -> _Now:
        """Takes steps between two cycles, in the form that is fastest."""
        begin = time.perf_counter()
        source = self._source(now)
        raw = self._analysed(analysis_of(source, self.traced))
        work = multiply_adds_of(raw)[1]
        found = self._fitting(source, raw)
        left = self._left(count, stop - start)
        if self._pays(work, found, stop - start, left, count):
            found = self._made(source, now, given, raw)
            begin = time.perf_counter() - self.planning
        if found is None:
            return self.train_full(now, given, start, stop)
        form, plan = found
        small = self._to_small(plan, now)
        self.planning = time.perf_counter() - begin
        after = form.run(small, given, plan.lifted.constants, start=start, stop=stop)
        return self._to_full(plan, now, after)

    def _analysed(
        self,
        known: Analysis,
        settings: Settings = _EXACT,
        raw: Analysis | None = None,
        room: tuple[Any, Any] = ({}, {}),
    ) -> Analysis:
        """What is needed of the loss; with ``raw``, that is it, filled up to sizes."""
        analysis = known.again()
        analysis.settings = settings
        analysis.real = {} if raw is None else raw.need
        analysis.least, analysis.least_sums = room
        find_needed(self.source, self.traced, analysis)
        return analysis

    def _fitting(
        self, source: Source, raw: Analysis
    ) -> tuple[_SmallForm, _Plan] | None:
        """The fastest form that has room for what is needed."""
        for form in sorted(self.small, key=lambda form: form.multiply_adds):
            if not _fits(sizes_of(raw), form.sizes):
                continue
            room = form.sizes, form.sums
            analysis = self._analysed(raw, _EXACT, raw, room)
            if sizes_of(analysis) != form.sizes or sums_of(analysis) != form.sums:
                continue
            plan = self._plan(source, analysis, form.rows)
            if plan is not None and form.serves(plan):
                return form, plan
        return None

    def _left(self, count: int, n: int) -> int:
        """Steps that are left in small form, from here on, about."""
        rest = max(self.setting.total_steps - count, n)
        return int(rest * (1 - self.in_full(count, rest).mean()))

    def _pays(self, work: int, found: Any, n: int, left: int, count: int) -> bool:
        """Whether a new size is compiled now."""
        if self.setting.compile_at is not None:
            reached = sum(x <= count for x in self.setting.compile_at)
            more, self.compiled = reached > self.compiled, reached
            return more
        if self.full is None:
            return False
        compiling = _SHARE * self.full.compile_seconds
        if self.small:
            compiling = self.small[-1].compile_seconds
        present = self.full if found is None else found[0]
        gain = self._gain(present, work)
        if gain * n <= self.planning:
            return False
        self.lost += gain * n
        if self.lost < compiling or gain * left < compiling:
            return False
        self.lost = 0.0
        return True

    def _gain(self, present: _Form, work: int) -> float:
        """Seconds that a step with so many multiply-adds saves, by what is measured."""
        assert self.full is not None
        whole, slow = self.full.multiply_adds, self.full.per_step
        measured = [f for f in self.small if f.steps and f.multiply_adds < whole]
        fixed = _FIXED * slow
        if measured:
            best = min(measured, key=lambda form: form.multiply_adds)
            share = best.multiply_adds / whole
            fixed = max(0.0, (best.per_step - share * slow) / (1 - share))
        guess = fixed + (slow - fixed) * work * _ROOM / max(whole, 1)
        return present.per_step - guess

    def _made(
        self, source: Source, now: _Now, given: _Given, raw: Analysis
    ) -> tuple[_SmallForm, _Plan]:
        """A new form, with room for what is needed now."""
        room = _with_room_for(self._analysed(raw, Settings(fold=False)))
        analysis = self._analysed(raw, _EXACT, raw, room)
        plan = self._plan(source, analysis, None)
        assert plan is not None
        small = self._to_small(plan, now)
        step = self._small_step(plan, small)
        call, seconds = self._compiled(step, small, given, plan.lifted.constants)
        form = _SmallForm(plan, call, multiply_adds_of(analysis)[1], seconds)
        self.small.append(form)
        return form, plan

    def _plan(
        self,
        source: Source,
        analysis: Analysis,
        rows: tuple[int, ...] | None,
    ) -> _Plan | None:
        """How an analysis cuts the leaves; None if these rows have no room for it."""
        inputs = self.traced.program.inputs[: len(source.leaves)]
        cuts = []
        for i, (value, x) in enumerate(zip(inputs, source.leaves, strict=True)):
            box = analysis.need.get(value)
            if i >= self.number:  # statistics have no updates below their box
                cuts.append(cut_of(box, np.zeros(np.shape(x), bool)))
                continue
            made = cut_of(box, _changing(source, i))
            room = rows[i] if rows is not None else _with_room(made, x)
            if made.rows > room:
                return None
            cuts.append(made._replace(rows=room))
        return self._small_plan(analysis, tuple(cuts))

    def _small_plan(self, analysis: Analysis, cuts: tuple[Cut, ...]) -> _Plan:
        """Loss and statistics, of the boxes that are needed of each leaf."""
        inputs, n = self.traced.program.inputs, len(cuts)
        there = [x.box is not None for x in cuts]
        boxes = [
            jax.ShapeDtypeStruct(x.inside(value.shape), value.dtype)
            for value, x in zip(inputs, cuts, strict=False)
            if x.box is not None
        ]
        others = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[n:]]

        def run(*arrays):
            leaves, args = iter(arrays[: len(boxes)]), arrays[len(boxes) :]
            given = [next(leaves) if needed else None for needed in there]
            for value, x in zip(inputs[n:], args, strict=True):
                box, whole = analysis.need.get(value), everything(value)
                given.append(None if box is None else cut(x, whole, box))
            return [x for x in analysis.run(given) if x is not None]

        made, split = lifted(run, *boxes, *others), sum(there[: self.number])
        return _Plan(analysis, cuts, made, boxes[:split], [*boxes[split:], *others])

    def _small_step(self, plan: _Plan, small: _Now) -> Any:
        """A step in small form, of a form of certain sizes."""
        cuts, inputs = plan.cuts[: self.number], self.traced.program.inputs
        heads = [x.inside(v.shape) for x, v in zip(cuts, inputs, strict=False)]
        tx, structure = self.setting.tx, jax.tree.structure(small.params)

        def step(now, args, constants):
            leaves = jax.tree.leaves(now.params)
            boxes = [
                x if cut.whole else x[: head[0]]
                for x, cut, head in zip(leaves, cuts, heads, strict=True)
                if cut.box is not None
            ]
            (value, stats), gradients = jax.value_and_grad(plan.loss, has_aux=True)(
                boxes, [*now.stats, *jax.tree.leaves(args)], constants
            )
            given = iter(gradients)
            gradient = [
                _with_rows(x[:0] if cut.box is None else next(given), x.shape)
                for x, cut in zip(leaves, cuts, strict=True)
            ]
            updates, state = tx.update(
                jax.tree.unflatten(structure, gradient),
                now.state,
                now.params,
                regrow_between=NoCycle(),
            )
            params = optax.apply_updates(now.params, updates)
            return now._replace(params=params, state=state, stats=stats), value

        _check_optimizer(tx, small)
        return step

    def _to_small(self, plan: _Plan, now: _Now) -> _Now:
        """Parameters, state and statistics in small form."""
        params, structure = jax.tree.flatten(now.params)
        small = [to_small(c, x) for c, x in zip(plan.cuts, params, strict=False)]
        cuts = plan.cuts[self.number :]
        stats = [
            to_small(c, x)
            for c, x in zip(cuts, jax.tree.leaves(now.stats), strict=True)
            if c.box is not None
        ]
        leaves, own = jax.tree.flatten(now.state, is_leaf=is_mask)
        state = [
            x if i is None else to_small(plan.cuts[i], x)
            for x, i in zip(leaves, self.owners, strict=True)
        ]
        made = _Now(
            jax.tree.unflatten(structure, small),
            jax.tree.unflatten(own, state),
            stats,
            now.losses,
        )
        # Leaves that are not cut are copied too: both forms may overwrite their own.
        return jax.tree.map(_own, made)

    def _to_full(self, plan: _Plan, now: _Now, small: _Now) -> _Now:
        """What steps in small form have made of a network."""
        params, structure = jax.tree.flatten(now.params)
        new = [
            to_full(c, x, s)
            for c, x, s in zip(
                plan.cuts, params, jax.tree.leaves(small.params), strict=False
            )
        ]
        leaves, own = jax.tree.flatten(now.state, is_leaf=is_mask)
        state = [
            s if i is None else to_full(plan.cuts[i], x, s)
            for x, s, i in zip(
                leaves,
                jax.tree.leaves(small.state, is_leaf=is_mask),
                self.owners,
                strict=True,
            )
        ]
        stats, form = jax.tree.flatten(now.stats)
        moved = iter(small.stats)
        stats = [
            x if c.box is None else to_full(c, x, next(moved))
            for c, x in zip(plan.cuts[self.number :], stats, strict=True)
        ]
        return _Now(
            jax.tree.unflatten(structure, new),
            jax.tree.unflatten(own, state),
            jax.tree.unflatten(form, stats),
            small.losses,
        )


# --- parts ----------------------------------------------------------------------------
def _entry(batches: PyTree, i: Any) -> PyTree:
    """The batch of one step."""
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batches
    )


def _as_before(new: Any, old: Any) -> Any:
    """In the type of the array before, so that a loop can carry it."""
    if jnp.issubdtype(old.dtype, jax.dtypes.extended):
        return new
    return lax.convert_element_type(new, old.dtype)


def _with_rows(inside: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A gradient of a box, and zero for the rows below it."""
    if inside.shape == shape:
        return inside
    rows = shape[0] - inside.shape[0]
    return lax.pad(
        inside,
        jnp.zeros((), inside.dtype),
        [(0, rows, 0), *[(0, 0, 0)] * (len(shape) - 1)],
    )


def _tree_of(params: PyTree, named: dict[str, Any]) -> PyTree:
    """Masks by name as a tree like the parameters."""
    structure, names = jax.tree.structure(params), leaf_names(params)
    masks = [named.get(name, optax.MaskedNode()) for name in names]
    return jax.tree.unflatten(structure, masks)


def _changing(source: Source, i: int) -> np.ndarray:
    """Which entries of a leaf training changes: those of a mask, or all."""
    mask = source.kept[i]
    return np.ones(np.shape(source.leaves[i]), bool) if mask is None else mask


def _with_room_for(raw: Analysis) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Sizes of values and of sums, with room for later cycles."""
    sizes = {
        value: tuple(map(_rounded, lengths(box, value.shape), value.shape))
        for value, box in raw.need.items()
    }
    sums = {key: _rounded(int(kept.sum()), len(kept)) for key, kept in raw.sums.items()}
    return sizes, sums


def _with_room(made: Cut, x: Any) -> int:
    """Rows below a box, with room for later cycles."""
    if not np.ndim(x) or made.whole:
        return made.rows
    return made.rows + max(1, -(-made.rows // 4))


def _rounded(n: Any, whole: Any) -> Any:
    """A length with room, up to a multiple of about a twelfth of the whole."""
    if not is_number(n) or not is_number(whole) or n == whole:
        return n
    step = 2 ** max(0, math.floor(math.log2(whole / 12))) if whole else 1
    return min(whole, math.ceil(n * _ROOM / step) * step)


def _fits(sizes: Any, room: Any) -> bool:
    """Whether there is room for all that is needed."""
    return sizes.keys() <= room.keys() and all(
        not is_number(a) or a <= b
        for x, own in sizes.items()
        for a, b in zip(own, room[x], strict=True)
    )


def _looped(traced: Traced) -> bool:
    """Whether many steps are one program. On a CPU XLA's convolution is many times
    slower inside of a loop.
    """
    names = {eqn.name for eqn in _equations(traced.program)}
    return jax.default_backend() != "cpu" or "conv_general_dilated" not in names


def _equations(program: Any) -> Any:
    for eqn in program.equations:
        yield eqn
        if eqn.body is not None:
            yield from _equations(eqn.body)


def _owners(source: Source, now: _Now) -> list[int | None]:
    """For each leaf of the optimizer state the parameter that it is cut like."""
    n = len(jax.tree.leaves(now.params))
    part = source._replace(leaves=source.leaves[:n], names=source.names[:n])
    paths, _ = jax.tree_util.tree_flatten_with_path(now.state, is_leaf=is_mask)
    return [
        None if is_hole(x) else leaf_of(part, path_name(path), shape_of(x))
        for path, x in paths
    ]


def _shapes_after(
    tx: Any, gradient: PyTree, state: PyTree, params: PyTree, between: NoCycle
) -> Any:
    """Shapes of the state after an update without a cycle."""

    def update(gradient, state, params):
        return tx.update(gradient, state, params, regrow_between=between)[1]

    return jax.eval_shape(update, gradient, state, params)


def _told(tx: Any, now: _Now) -> NoCycle:
    """What the methods in an optimizer tell."""
    between = NoCycle()
    try:
        _shapes_after(tx, now.params, now.state, now.params, between)
    except TypeError as error:
        if "regrow_between" not in str(error):
            raise
    if not between.due:
        raise ArgumentError(
            "`tx` does not hand extra arguments on to its sparse method; it must. "
            "Write its wrappers as optax.GradientTransformationExtraArgs, and use "
            "larger batches in place of optax.MultiSteps."
        )
    return between


def _check_optimizer(tx: Any, small: _Now) -> None:
    """Raises if an optimizer cannot work on leaves in small form."""
    reason = None
    try:
        after = _shapes_after(tx, small.params, small.state, small.params, NoCycle())
        if _signature(after) != _signature(small.state):
            reason = "its state changes shape"
    except ArgumentError:
        raise
    except Exception as error:  # whatever the code of others raises
        reason = str(error).partition("\n")[0]
    if reason is not None:
        raise ArgumentError(
            f"`tx` cannot update weights that are cut to a smaller shape ({reason}); "
            "it must work entry by entry. Use optax.sgd or optax.adam, for instance."
        )
