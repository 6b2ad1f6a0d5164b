"""The train loop: one jitted epoch, evaluated, recorded and resumable.

The data lie on the device. An epoch is one ``lax.scan`` over its steps, inside one
jitted call that also draws the order of the images; networks with convolutions are
stepped through in Python on a CPU, where XLA runs a convolution inside a scan ten
times slower than the same step outside. ImageNet is read from its files, step by step.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax import budgets
from sparse_optax.checks import MOST_UPDATES, ArgumentError
from sparse_optax.experiments import (
    augment,
    checkpoints,
    data,
    imagenet,
    methods,
    models,
    recipes,
    records,
    sizes,
    units,
)
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.checkpoints import joined, parted
from sparse_optax.experiments.setup import Build, Setup, mean_loss

# Shares of |w| under these are recorded every epoch: what GSM drives to zero.
SMALL = (1e-3, 1e-4, 1e-6)
# Images a call when a network with convolutions is evaluated, and of those in files,
# which are larger.
_CHUNK = 1000
_FILES_CHUNK = 100
# Seconds after which an epoch ends in a checkpoint, whatever its number.
_SAVE_SECONDS = 300
# Images of the rehearsal of a method: errors do not depend on how many there are.
_REHEARSED = 8
# Steps that may wait in the queue of the device while another one is taken.
_QUEUED = 2
# Columns of the layers that are summed, and what the sums are called.
_TOTALS = {"weights": "weights", "kept": "kept", "nonzero": "nonzeros"}


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
      record: its record.
      params: the final parameters, pruned weights exactly zero.
      stats: the final running statistics of batch norm, empty without.
      opt_state: the final optimizer state, None where the weights were loaded.
    """

    record: records.Record
    params: Any
    stats: Any
    opt_state: Any


class Progress(NamedTuple):
    """Handed to ``on_epoch`` after each epoch.

    Attributes:
      stage: ``"base"`` during the dense training before the method, else the method.
      epoch: number of the epoch, from 1.
      epochs: how many there are.
      metrics: train_loss, valid_error, test_error, seconds and the rest.
    """

    stage: str
    epoch: int
    epochs: int
    metrics: dict[str, Any]


class Activity(NamedTuple):
    """Handed to ``on_activity`` before whatever may take its time.

    Attributes:
      stage: as in :class:`Progress`.
      text: what is done now.
      brief: whether it is one of many steps of an epoch.
    """

    stage: str
    text: str
    brief: bool = False


class Stage(NamedTuple):
    """A training of its own: the method, or the base that it starts from.

    Attributes:
      config: its run.
      done: whether it has finished before.
    """

    config: configs.Resolved
    done: bool


class Stopped(KeyboardInterrupt):
    """Ctrl-C during a run; the text says after which epoch and how to go on."""


class TimeOver(Stopped):
    """The hours of a run are over; the text says after which epoch, as above."""


class _Clock:
    """The hours that are left to all stages of a call; None is without end."""

    def __init__(self, hours: float | None):
        if hours is not None and not 0 <= hours < math.inf:
            raise ValueError(
                f"train: hours={hours!r} must be a finite number, 0 or above, or left "
                "out for no limit."
            )
        self._end = None if hours is None else time.monotonic() + 3600 * hours
        self.trained = False  # whether this call has trained an epoch

    def left(self) -> float:
        """Seconds that are left."""
        return math.inf if self._end is None else self._end - time.monotonic()

    def over(self) -> bool:
        """Whether the hours are over. One epoch is trained in any case: with hours
        shorter than the compilation no run would ever end.
        """
        return self.trained and self.left() <= 0


def train(
    config: configs.TrainConfig,
    *,
    runs: str | Path | None = "runs",
    record_path: str | Path | None = None,
    checkpoint_every: int = 10,
    fresh: bool = False,
    hours: float | None = None,
    command: str | None = None,
    on_epoch: Callable[[Progress], None] | None = None,
    on_activity: Callable[[Activity], None] | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> Trained:
    """Trains a network as ``config`` says, and evaluates it after each epoch.

    A run that was killed goes on from its newest checkpoint and ends with the same
    bits as an unbroken one; one that has finished is read and not trained again. Ctrl-C
    ends it after the epoch that it is in, with a checkpoint, and a second one at once.
    The end of ``hours`` does the same as one Ctrl-C.
    The error to report is the test error of the last epoch
    (``record.results["test_error"]``), after the cut where the method has one.

    Args:
      config: the run; what it leaves out comes from the recipe of the data set.
      runs: folder of checkpoints and final weights, or None to keep none.
      record_path: where the record is written, or None to write none.
      checkpoint_every: epochs between two checkpoints, at least 1; there is one also
        where five minutes have passed since the last.
      fresh: start from the first epoch even where a checkpoint or a finished run is
        found.
      hours: how long the call may train, at least one epoch; None for no limit.
      command: what reproduces the run, for the record; the running command otherwise.
      on_epoch: called after each epoch.
      on_activity: called before what may take its time: loading, compiling, an epoch,
        and each step where they are taken one by one.
      on_note: called with a line that tells of a damaged checkpoint that was passed
        over; by default it becomes a warning.

    Returns:
      The record, the final parameters and the final optimizer state.

    Raises:
      ValueError: for a value outside its range, for one that does not fit the model or
        the data set, and for a folder that cannot be written to, before training
        starts; where a file cannot be written, with what is kept; where an epoch ends
        with weights that are not finite; for a folder that holds another run; for a
        file of ImageNet that is no readable image, of those to train on in the first
        epoch.
      ImportError: for ImageNet without grain or Pillow.
      Busy: where another process trains the same run.
      Stopped: after Ctrl-C.
      TimeOver: at the end of ``hours``, where the run has not finished.

    Examples:
      >>> from sparse_optax.experiments import config, train
      >>> run = config.TrainConfig(density=0.1, epochs=2)
      >>> trained = train.train(run, runs=None)
      >>> trained.record.results["kept"], trained.record.results["weights"]
      (5020, 50200)
    """
    resolved = configs.resolve(config)
    if checkpoint_every < 1:
        raise ValueError(
            f"train: checkpoint_every={checkpoint_every} must be 1 or more."
        )
    if record_path is not None:
        records.check_file(record_path)
    tell = on_activity or (lambda activity: None)
    tell(Activity(resolved.method, f"loading {resolved.dataset}"))
    dataset = data.load(resolved.dataset, split=resolved.split, pixels=resolved.pixels)
    _check_steps(resolved, len(dataset.train_x))
    setting = _Setting(
        dataset,
        None if runs is None else Path(runs),
        checkpoint_every,
        fresh,
        command or records.command_line(),
        _Clock(hours),
        on_epoch or (lambda progress: None),
        tell,
        on_note,
    )
    trained = _train(resolved, setting, stage=resolved.method)
    if record_path is not None:
        record = dataclasses.replace(
            trained.record, name=Path(record_path).stem, command=setting.command
        )
        records.write(record_path, record)
        trained = trained._replace(record=record)
    return trained


def stages(
    config: configs.Resolved, runs: str | Path, *, fresh: bool = False
) -> list[Stage]:
    """What a run trains, in this order: its base, where it has one, then itself.

    Args:
      config: a resolved run.
      runs: folder of the runs.
      fresh: whether finished ones are trained again.

    Returns:
      One stage or more. No base is trained for a run that has finished.

    Examples:
      >>> from sparse_optax.experiments import config, train
      >>> run = config.resolve(config.TrainConfig(method="magnitude"))
      >>> [(x.config.method, x.config.epochs, x.done) for x in train.stages(run, "no")]
      [('dense', 60, False), ('magnitude', 40, False)]
    """
    path = Path(runs) / configs.default_name(config)
    done = checkpoints.is_finished(path) and not fresh
    earlier = None if done else configs.base_of(config)
    before = [] if earlier is None else stages(earlier, runs, fresh=fresh)
    return [*before, Stage(config, done)]


def _check_steps(config: configs.Resolved, images: int) -> None:
    """Raises where a batch or a number of steps does not fit the data set."""
    for name, stage in (("", config), ("base.", config.base)):
        if not stage.batch_size:
            continue
        if stage.batch_size > images:
            raise ValueError(
                f"TrainConfig: {name}batch_size={stage.batch_size} must be at most "
                f"{images}, the training images of {config.dataset}. Give fewer."
            )
        steps = images // stage.batch_size
        for field in ("epochs", "drop_epochs"):
            value = getattr(stage, field)
            most = MOST_UPDATES // steps
            if max(value if isinstance(value, tuple) else (value,), default=0) > most:
                raise ValueError(
                    f"TrainConfig: {name}{field}={value} must be at most {most}: an "
                    f"epoch has {steps} steps, and no more than {MOST_UPDATES} are "
                    "counted. Give fewer epochs."
                )


def _short(value: float) -> float:
    """Six digits: what a record needs of a measured number."""
    return float(f"{value:.6g}")


class _Setting(NamedTuple):
    """What the stages of one call share."""

    dataset: data.Dataset
    runs: Path | None
    checkpoint_every: int
    fresh: bool
    command: str
    clock: _Clock
    on_epoch: Callable[[Progress], None]
    on_activity: Callable[[Activity], None]
    on_note: Callable[[str], None]


def _train(config: configs.Resolved, setting: _Setting, stage: str) -> Trained:
    """One stage in its folder, or what it left there when it finished."""
    dataset = setting.dataset
    keys = jax.random.split(jax.random.key(config.seed), 3)
    draw = functools.partial(
        models.create_stateful,
        config.model,
        dataset.train_x.shape[1:],
        dataset.classes,
        init=config.init,
        dtype=config.dtype,
    )
    start = draw(key=keys[0])
    if setting.runs is None:
        return _train_stage(config, setting, stage, draw, start, keys, None)
    shared = None
    if recipes.METHODS[config.method].cut_only:
        shared = setting.runs / configs.default_name(configs.training_of(config))
    folder = checkpoints.RunFolder(setting.runs / configs.default_name(config), shared)
    waits = stage == "base" or shared is not None
    with folder.lock(wait=lambda: waits and setting.clock.left() > 0):
        if setting.fresh:
            folder.start_again()
        elif (done := folder.finished(joined(*start[1:]))) is not None:
            _check_files(done[1].results.get("files", {}), _files(dataset))
            what = f"the finished run {done[1].name}"
            _check_finite(done[0], what, "Train it again with --fresh.")
            return Trained(done[1], *parted(done[0]), None)
        return _train_stage(config, setting, stage, draw, start, keys, folder)


def _train_stage(config, setting, stage, draw, start, keys, folder) -> Trained:
    """One stage, after the stage that it may start from."""
    dataset = setting.dataset
    init_key, order_key, method_key = keys
    apply, params, stats = start

    def setup(params, stats, images):
        return Setup(
            config,
            len(dataset.train_x) // config.batch_size,
            method_key,
            lambda params, images: apply(params, stats, images)[0],
            params,
            images,
            lambda key: draw(key=key)[1],
            init_key,
        )

    _check_counts(config, params)
    base, earlier = None, configs.base_of(config)
    if earlier is not None:
        # Whatever the method refuses, it refuses before its base is trained. Traced, so
        # that nothing is computed.
        few = (dataset.train_x[:_REHEARSED], dataset.train_y[:_REHEARSED])
        few = jax.tree.map(jnp.asarray, few)

        def rehearse(params):
            plan = _plan(config, setup(params, stats, few))
            opt_state = plan.optimizer.init(params)
            return plan.optimizer.update(params, opt_state, params)

        jax.eval_shape(rehearse, params)
        base = _train(earlier, setting, stage="base")
        params, stats = base.params, base.stats
    images = dataset.train_x, dataset.train_y
    setting.on_activity(Activity(stage, "preparing the method"))
    plan = _plan(config, setup(params, stats, images))
    run = _Run(config, setting, stage, apply, plan, order_key, base)
    return run.train(params, stats, folder)


def _plan(config: configs.Resolved, made: Setup) -> Build:
    """The method of a run."""
    try:
        return methods.BUILDERS[config.method](made)
    except ArgumentError as error:
        raise ValueError(
            f"train: method={config.method!r} does not fit epochs={config.epochs} of "
            f"{made.steps_per_epoch} steps with update_epochs={config.update_epochs} "
            f"and density={config.density:g}. {error} Here: raise epochs, take more "
            "cycles in an epoch, or choose method='static'."
        ) from error


def _check_counts(config: configs.Resolved, params: Any) -> None:
    """Raises where a share of all weights is less than one of them."""
    chosen = jax.tree.leaves(sparse_optax.eligible(params))
    leaves = zip(jax.tree.leaves(params), chosen, strict=True)
    total = sum(leaf.size for leaf, counted in leaves if counted)
    method = recipes.METHODS[config.method]
    shares = {"density": config.density} if method.pooled else {}
    if config.method == "gsm" and config.gate is not None:
        shares["gate"] = config.gate
    for name, share in shares.items():
        if budgets.count(share, total) < 1:
            raise ValueError(
                f"TrainConfig: {name}={share!r} must be at least {1 / total:.3g}, one "
                f"of the {total} weights of {config.model} that are counted. Raise it."
            )


@jax.jit
def _finite(weights: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(weights)]))


def _check_finite(weights: Any, what: str, cure: str) -> None:
    """Raises where weights are not finite: no epoch and no stage can mend them."""
    if not _finite(weights):
        raise ValueError(f"train: {what} has weights that are not finite. {cure}")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C, so that an epoch ends whole; a second one raises."""
    asked: list[int] = []

    def ask(number, frame):
        del frame
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    # Handlers can be set in the main thread only, and replace Python's own only.
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _files(dataset: data.Dataset) -> dict[str, Any]:
    """How many files each part of a data set has, and which; nothing of arrays."""
    parts = {"train": dataset.train_x, "valid": dataset.valid_x, "test": dataset.test_x}
    return {
        name: [len(part), part.images.digest()]
        for name, part in parts.items()
        if isinstance(part, imagenet.Cropped)
    }


def _check_files(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises where a run would go on with other images than those it began with."""
    for name, found in now.items():
        if found != before[name]:
            raise ValueError(
                f"train: the {name} part of imagenet has {found[0]} files, and the run "
                f"began with {before[name][0]}, or with others. Put these back, or "
                "train it again with --fresh."
            )


def _stored(params: Any, masks: Any) -> Any:
    """Masks of the weights that a file holds: those that are kept or not zero. Nothing
    is lost where a method has no masks, and no kept weight is forgotten.
    """
    hole = optax.MaskedNode()

    def join(x, takes_part, kept):
        found = x != 0 if takes_part else kept
        return found if isinstance(kept, optax.MaskedNode) else found | kept

    eligible = sparse_optax.eligible(params)
    if masks is None:
        masks = jax.tree.map(lambda x: hole, params)
    return jax.tree.map(join, params, eligible, masks)


def _movement(before: Any, after: Any) -> tuple[dict[str, int], Any]:
    """How many weights each layer keeps, and how many of them it did not before."""
    paths = jax.tree_util.tree_leaves_with_path(after)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
    ]
    kept, moved = jax.device_get(_counted(before, after))
    columns = (("kept", kept), ("moved", moved))
    counts = {
        f"{column}/{name}": int(number)
        for column, numbers in columns
        for name, number in zip(names, numbers, strict=True)
    }
    return counts, after


@jax.jit
def _counted(before: Any, after: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    came = [
        jnp.logical_and(b, jnp.logical_not(a)) for a, b in zip(old, new, strict=True)
    ]
    kept, moved = ([jnp.sum(x, dtype=jnp.int32) for x in xs] for xs in (new, came))
    return kept, moved


class _Run(NamedTuple):
    """One stage: the epochs of one optimizer."""

    config: configs.Resolved
    setting: _Setting
    stage: str
    apply: Callable[..., tuple[jax.Array, Any]]
    plan: Build
    order_key: jax.Array
    base: Trained | None

    def train(
        self, params: Any, stats: Any, folder: checkpoints.RunFolder | None
    ) -> Trained:
        """Trains from what is given, or from the newest checkpoint of the folder."""
        config, dataset = self.config, self.setting.dataset
        opt_state = self.plan.optimizer.init(params)
        # Copies: donated buffers must not be shared, neither inside nor outside.
        params = self.plan.start(params, opt_state)
        params, stats, opt_state = jax.tree.map(jnp.copy, (params, stats, opt_state))
        history = {"wall_seconds": 0.0, "compile_seconds": 0.0, "epochs": []}
        # Of the start: what trained is the code of then.
        files = _files(dataset)
        packages = ("grain", "pillow") if files else ()
        history["environment"] = records.environment(packages)
        if files:
            history["files"] = files
        like = (joined(params, stats), opt_state)
        note = self.setting.on_note
        restored = None if folder is None else folder.restore(like, note)
        first = 0
        if restored is not None:
            first, (weights, opt_state), history = restored
            params, stats = parted(weights)
            _check_files(history.get("files", {}), files)
            self._tell(f"going on after epoch {first} of {config.epochs}")
        state = params, stats, opt_state

        self._tell("compiling")
        evaluate = self._evaluator()
        start = time.perf_counter()
        run_epoch = self._epoch_function(state)
        if files and first < config.epochs:
            # A file that cannot be read is found before an epoch is lost to it.
            self._tell("reading the images of validation and test")
            evaluate(self.plan.shown(params, opt_state), stats)
        compiled = time.perf_counter()
        history["compile_seconds"] += compiled - start
        saved, kept_at = first, time.monotonic()
        clock = self.setting.clock
        masks = self._masks(opt_state)
        steps = len(dataset.train_x) // config.batch_size
        if first < config.epochs:
            self._tell(f"epoch {first + 1} of {config.epochs}, {steps} steps")
        try:
            with _interrupts() as asked:
                for epoch in range(first, config.epochs):
                    if clock.over():
                        raise TimeOver
                    begin = time.perf_counter()
                    key = jax.random.fold_in(self.order_key, epoch)
                    state, loss = jax.block_until_ready(run_epoch(state, key))
                    seconds = time.perf_counter() - begin
                    self._check_epoch(epoch + 1, state[:2])
                    counts, masks = _movement(masks, self._masks(state[2]))
                    metrics = {
                        "epoch": epoch + 1,
                        "train_loss": _short(float(loss)),
                        **evaluate(self.plan.shown(state[0], state[2]), state[1]),
                        **counts,
                        "seconds": _short(seconds),
                    }
                    history["epochs"].append(metrics)
                    history["wall_seconds"] += time.perf_counter() - begin
                    number = epoch + 1
                    clock.trained = True
                    due = number % self.setting.checkpoint_every == 0
                    due |= time.monotonic() - kept_at >= _SAVE_SECONDS
                    if folder is not None and (due or number == config.epochs):
                        folder.save(number, (joined(*state[:2]), state[2]), history)
                        saved, kept_at = number, time.monotonic()
                    self.setting.on_epoch(
                        Progress(self.stage, number, config.epochs, metrics)
                    )
                    if asked or clock.over():
                        if folder is not None and saved < number:
                            weights = joined(*state[:2])
                            folder.save(number, (weights, state[2]), history)
                            saved = number
                        if asked:
                            raise KeyboardInterrupt
        except KeyboardInterrupt as why:
            kind = TimeOver if isinstance(why, TimeOver) else Stopped
            done = len(history["epochs"])
            raise self._stopped(kind, done, saved, folder) from None

        params, stats, opt_state = state
        results, layers, params = self._results(
            params, stats, opt_state, history, evaluate
        )
        record = self._record(results, layers, history)
        if folder is not None:
            masks = None if self.plan.masks is None else self.plan.masks(opt_state)
            folder.finish(joined(params, stats), record, _stored(params, masks))
        return Trained(record, params, stats, opt_state)

    def _tell(self, text: str, *, brief: bool = False) -> None:
        self.setting.on_activity(Activity(self.stage, text, brief))

    def _check_epoch(self, number: int, weights: Any) -> None:
        """Raises where a run has diverged, before anything of it is kept."""
        flag = "--learning-rate"
        if self.stage == "base":
            flag = "--base.learning-rate (--learning-rate for method ticket)"
        name = configs.default_name(self.config)
        what = f"after epoch {number} of {self.config.epochs} the run {name}"
        _check_finite(weights, what, f"Give a lower learning rate with {flag}.")

    def _masks(self, opt_state: Any) -> Any:
        """The masks of the method, in arrays of their own; None where it has none."""
        if self.plan.masks is None:
            return None
        # The state is donated to the next epoch.
        return jax.tree.map(jnp.copy, self.plan.masks(opt_state))

    def _stopped(
        self, kind: type[Stopped], epoch: int, saved: int, folder: Any
    ) -> Stopped:
        """What Ctrl-C or the end of the hours raises after so many epochs."""
        stage = " of the base" if self.stage == "base" else ""
        done = f"stopped after epoch {epoch} of {self.config.epochs}{stage}"
        if folder is None:
            return kind(f"{done}; nothing of it is kept.")
        without = " without --fresh" if self.setting.fresh else ""
        where = "from there" if saved == epoch else f"after epoch {saved}"
        return kind(f"{done}; the same command{without} goes on {where}.")

    def _epoch_function(self, state):
        """Compiles ``(state, key) -> (state, mean loss)`` for one epoch."""
        train_x, train_y = self.setting.dataset.train_x, self.setting.dataset.train_y
        batch = self.config.batch_size
        steps = len(train_x) // batch
        key, step = self.order_key, self._step

        if isinstance(train_x, imagenet.Cropped):
            files = train_x
            example = (
                jax.ShapeDtypeStruct((batch, *files.shape[1:]), files.dtype),
                jax.ShapeDtypeStruct((batch,), np.int32),
            )
            one = jax.jit(step, donate_argnums=0)
            one = one.lower(state, key, np.int32(0), *example).compile()

            def read(state, key):
                seed = int(jax.random.bits(key, dtype=jnp.uint32))
                batches = imagenet.train_batches(
                    files.images, batch, seed=seed, size=files.size, epochs=1
                )
                return self._taken(one, state, key, batches, steps)

            return read

        images = jax.device_put((train_x, train_y))

        def chosen(state, key, number, rows, x, y):
            x, y = (a.at[rows].get(mode="promise_in_bounds") for a in (x, y))
            return step(state, key, number, x, y)

        def order(key):
            # The last images of the order make no full batch and sit this epoch out.
            rows = jax.random.permutation(key, len(images[0]))[: steps * batch]
            return rows.reshape(steps, batch)

        if not (
            models.MODELS[self.config.model].convolutional
            and jax.default_backend() == "cpu"
        ):

            def scanned(state, key, x, y):
                state, losses = jax.lax.scan(
                    lambda state, numbered: chosen(state, key, *numbered, x, y),
                    state,
                    (jnp.arange(steps), order(key)),
                )
                return state, losses.mean()

            scanned = jax.jit(scanned, donate_argnums=0)
            whole = scanned.lower(state, key, *images).compile()
            return lambda state, key: whole(state, key, *images)

        order = jax.jit(order)
        example = (state, key, np.int32(0), order(key)[0], *images)
        one = jax.jit(chosen, donate_argnums=0).lower(*example).compile()

        def looped(state, key):
            batches = ((rows, *images) for rows in np.asarray(order(key)))
            return self._taken(one, state, key, batches, steps)

        return looped

    def _step(self, state, key, number, x, y):
        """One update on a batch, and its loss."""
        config = self.config
        if config.augment in augment.KINDS[1:]:
            black = data.black(config.dataset, config.pixels)
            # Not the key of the dropout, which the models use as it is.
            crops = jax.random.fold_in(jax.random.fold_in(key, 2 + number), 1)
            x = augment.augment(crops, x, config.augment, black)
        params, stats, opt_state = state

        def loss_of(params):
            # Dropout. The order of the images takes the folds 0 and 1.
            drop = jax.random.fold_in(key, 2 + number)
            used = self.plan.sample(params, opt_state)
            logits, new = self.apply(used, stats, x, train=True, key=drop)
            return mean_loss(config, logits, y), new

        (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = self.plan.optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def _taken(self, step, state, key, batches, steps: int):
        """Takes steps one by one; the state after them and their mean loss."""
        losses = []
        for number, batch in enumerate(batches):
            state, loss = step(state, key, np.int32(number), *batch)
            losses.append(loss)
            # Steps are queued: what is told is a step that has been taken.
            if number >= _QUEUED:
                losses[number - _QUEUED].block_until_ready()
                taken = number - _QUEUED + 1
                self._tell(f"step {taken} of {steps}", brief=True)
        return state, jnp.stack(losses).mean()

    def _evaluator(self):
        """Makes ``params, stats -> {"valid_error", "test_error", "below_..."}``."""
        dataset, apply = self.setting.dataset, self.apply
        sets = {
            "valid_error": (dataset.valid_x, dataset.valid_y),
            "test_error": (dataset.test_x, dataset.test_y),
        }
        text = models.MODELS[self.config.model].text
        calls = {name: self._calls(x, y) for name, (x, y) in sets.items()}

        @jax.jit
        def wrong(params, stats, parts):
            return [
                jnp.sum(apply(params, stats, x)[0].argmax(-1) != y, dtype=jnp.int32)
                for x, y in parts
            ]

        @jax.jit
        def bits(params, stats, parts):
            return [
                optax.softmax_cross_entropy_with_integer_labels(
                    apply(params, stats, x)[0], y
                ).sum()
                / math.log(2)
                for x, y in parts
            ]

        @jax.jit
        def below(params):
            kernels = [
                leaf
                for leaf, kept in zip(
                    jax.tree.leaves(params),
                    jax.tree.leaves(sparse_optax.eligible(params)),
                    strict=True,
                )
                if kept
            ]
            return [
                sum(jnp.sum(jnp.abs(w) < limit, dtype=jnp.int32) for w in kernels)
                / sum(w.size for w in kernels)
                for limit in SMALL
            ]

        def evaluate(params, stats):
            metrics = {}
            for name, (x, y) in sets.items():
                wrongs = (wrong(params, stats, call) for call in calls[name]())
                count = sum(int(n) for numbers in wrongs for n in numbers)
                metrics[name] = _short(100 * count / y.size) if len(x) else None
                if text:
                    values = [bits(params, stats, call) for call in calls[name]()]
                    total = sum(float(n) for numbers in values for n in numbers)
                    size = _short(total / y.size) if len(x) else None
                    metrics[name.replace("error", "bits")] = size
            shares = (_short(float(share)) for share in below(params))
            names = (f"below_{limit:.0e}" for limit in SMALL)
            return {**metrics, **dict(zip(names, shares, strict=True))}

        return evaluate

    def _calls(self, x, y) -> Callable[[], Iterable[list[tuple[Any, Any]]]]:
        """Makes a function that gives the parts of a set that each call evaluates."""
        if isinstance(x, imagenet.Cropped):
            if not len(x):
                return lambda: ()
            return lambda: (
                [part]
                for part in imagenet.eval_batches(x.images, _FILES_CHUNK, size=x.size)
            )
        # One call for the whole set; images of networks with convolutions go in
        # several, for the memory that their activations take.
        whole = not models.MODELS[self.config.model].convolutional
        chunk = len(x) or 1 if whole else _CHUNK
        parts = [
            jax.device_put((x[i : i + chunk], y[i : i + chunk]))
            for i in range(0, len(x), chunk)
        ]
        return lambda: [parts] if whole else ([part] for part in parts)

    def _logits(self, stats, params, images):
        """The network with statistics of its own, as it is evaluated."""
        return self.apply(params, stats, images)[0]

    def _results(self, params, stats, opt_state, history, evaluate):
        """Final errors, layers and params, after the cut where the method has one."""
        errors = ("valid_error", "test_error")
        if models.MODELS[self.config.model].text:
            errors += ("valid_bits", "test_bits")
        last = {name: history["epochs"][-1][name] for name in errors}
        results = dict(last)
        if self.plan.cut is not None:
            gap = sparse_optax.gsm_gap(params, self.config.density)
            trained = functools.partial(self._logits, stats)
            params = self.plan.cut(params, opt_state, trained)
            what = f"after its cut the run {configs.default_name(self.config)}"
            _check_finite(params, what, "Keep more weights, or choose another method.")
            after = evaluate(params, stats)
            results = {
                **{name: after[name] for name in errors},
                **{f"{name}_before_cut": last[name] for name in errors},
                "gap": {
                    "alive": int(gap.alive),
                    "kept": int(gap.kept),
                    "ratio": float(gap.ratio),
                },
            }
        masks = None if self.plan.masks is None else self.plan.masks(opt_state)
        layers = records.layers(params, masks)
        for column, name in _TOTALS.items():
            results[name] = sum(layer[column] for layer in layers)
        images = self.setting.dataset.train_x
        counts = None
        if isinstance(images, np.ndarray):
            counts = units.dead_units(params, images, masks)
        if counts is not None:
            results["dead_units"] = counts.dead
            results["removed_units"] = counts.removed
            results["wasted_weights"] = counts.wasted
        stored = _stored(params, masks)
        weights = joined(params, stats)
        if "files" in history:
            results["files"] = history["files"]
        results["file_bytes"] = sparse_optax.export.sparse_bytes(weights, stored)
        if self.config.budget and sizes.parse(self.config.budget).unit == "FLOPs":
            kept = {layer["name"]: layer["kept"] for layer in layers}
            results["flops"] = sizes.flops(self.config.model, self.config.dataset, kept)
        skipped = optax.tree.get(opt_state, "skipped", None)
        if skipped is not None:
            results["skipped_cycles"] = int(skipped)
        return results, layers, params

    def _record(self, results, layers, history):
        columns = {
            # Epochs from before a column existed have none.
            name: [metrics.get(name) for metrics in history["epochs"]]
            for name in history["epochs"][-1]
        }
        base = None
        if self.base is not None:
            base = {
                key: getattr(self.base.record, key)
                for key in ("name", "config", "results")
            }
        return records.Record(
            name=configs.default_name(self.config),
            command=self.setting.command,
            config=configs.as_dict(self.config),
            seed=self.config.seed,
            **history.get("environment", records.environment()),
            wall_seconds=round(history["wall_seconds"], 3),
            compile_seconds=round(history["compile_seconds"], 3),
            seconds_per_epoch=float(np.median(columns["seconds"])),
            steps_per_epoch=len(self.setting.dataset.train_x) // self.config.batch_size,
            results=results,
            layers=layers,
            base=base,
            history=columns,
        )
