"""The train loop: one jitted epoch, evaluated, recorded and resumable.

The data lie on the device. An epoch is one ``lax.scan`` over its steps, inside one
jitted call that also draws the order of the images; networks with convolutions are
stepped through in Python on a CPU, where XLA runs a convolution inside a scan ten
times slower than the same step outside.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax.checks import ArgumentError
from sparse_optax.experiments import (
    checkpoints,
    data,
    methods,
    models,
    recipes,
    records,
    units,
)
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.setup import Build, Setup

# Shares of |w| under these are recorded every epoch: what GSM drives to zero.
SMALL = (1e-3, 1e-4, 1e-6)
# Images a call when a network with convolutions is evaluated.
_CHUNK = 1000
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


def train(
    config: configs.TrainConfig,
    *,
    runs: str | Path | None = "runs",
    record_path: str | Path | None = None,
    checkpoint_every: int = 10,
    fresh: bool = False,
    command: str | None = None,
    on_epoch: Callable[[Progress], None] | None = None,
) -> Trained:
    """Trains a network as ``config`` says, and evaluates it after each epoch.

    A run that was killed goes on from its newest checkpoint and ends with the same
    bits as an unbroken one. The error to report is the test error of the last epoch
    (``record.results["test_error"]``), after the cut where the method has one.

    Args:
      config: the run; what it leaves out comes from the recipe of the data set.
      runs: folder of checkpoints and final weights, or None to keep none.
      record_path: where the record is written, or None to write none.
      checkpoint_every: epochs between two checkpoints, at least 1.
      fresh: start from the first epoch even where a checkpoint is found.
      command: what reproduces the run, for the record; the running command otherwise.
      on_epoch: called after each epoch.

    Returns:
      The record, the final parameters and the final optimizer state.

    Raises:
      ValueError: for a value outside its range and for a folder that cannot be
        written to, before training starts.

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
        records.check_writable(Path(record_path).parent)
    dataset = data.load(config.dataset, split=config.split)
    for name, stage in (("", resolved), ("base.", resolved.base)):
        if stage.batch_size > len(dataset.train_x):
            raise ValueError(
                f"TrainConfig: {name}batch_size={stage.batch_size} must be at most "
                f"{len(dataset.train_x)}, the training images of {config.dataset}."
            )
    setting = _Setting(
        dataset,
        None if runs is None else Path(runs),
        checkpoint_every,
        fresh,
        command or records.command_line(),
        on_epoch or (lambda progress: None),
    )
    trained = _train(resolved, setting, stage=config.method)
    if record_path is not None:
        record = dataclasses.replace(trained.record, name=Path(record_path).stem)
        records.write(record_path, record)
        trained = trained._replace(record=record)
    return trained


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
    on_epoch: Callable[[Progress], None]


def _train(config: configs.Resolved, setting: _Setting, stage: str) -> Trained:
    """One stage in its folder, after the dense stage that it may start from."""
    dataset = setting.dataset
    init_key, order_key, method_key = jax.random.split(jax.random.key(config.seed), 3)
    draw = functools.partial(
        models.create_stateful,
        config.model,
        dataset.train_x.shape[1:],
        dataset.classes,
        init=config.init,
    )
    apply, params, stats = draw(key=init_key)
    base, earlier = None, configs.base_of(config)
    if earlier is not None:
        base = _train(earlier, setting, stage="base")
        params, stats = base.params, base.stats
    setup = Setup(
        config,
        len(dataset.train_x) // config.batch_size,
        method_key,
        lambda params, images: apply(params, stats, images)[0],
        params,
        (dataset.train_x, dataset.train_y),
        lambda key: draw(key=key)[1],
        init_key,
    )
    try:
        plan = methods.BUILDERS[config.method](setup)
    except ArgumentError as error:
        raise ValueError(
            f"train: method={config.method!r} does not fit epochs={config.epochs} of "
            f"{setup.steps_per_epoch} steps with update_epochs={config.update_epochs} "
            f"and density={config.density:g}. {error}"
        ) from error
    run = _Run(config, setting, stage, apply, plan, order_key, base)
    if setting.runs is None:
        return run.train(params, stats, folder=None)
    # Where the density is read after training only, all of them go on from one run.
    shared = None
    if recipes.METHODS[config.method].cut_only:
        whole = dataclasses.replace(config, density=1.0)
        shared = setting.runs / configs.default_name(whole)
    folder = checkpoints.RunFolder(setting.runs / configs.default_name(config), shared)
    with folder.lock(wait=stage == "base"):
        if setting.fresh:
            folder.clear()
        elif (
            stage == "base"
            and (done := folder.finished(_joined(params, stats))) is not None
        ):
            return Trained(done[1], *_parted(done[0]), None)
        return run.train(params, stats, folder)


def _joined(params: Any, stats: Any) -> Any:
    """The form of weights in files: statistics are one more layer, if there are any."""
    return {**params, "stats": stats} if stats else params


def _parted(weights: Any) -> tuple[Any, Any]:
    """Parameters and statistics of what :func:`_joined` made."""
    params = dict(weights)
    stats = params.pop("stats", {})
    return params, stats


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
        history["environment"] = records.environment()
        saved = (_joined(params, stats), opt_state)
        restored = None if folder is None else folder.restore(saved)
        first = 0
        if restored is not None:
            first, (weights, opt_state), history = restored
            params, stats = _parted(weights)
        state = params, stats, opt_state

        images = jax.device_put((dataset.train_x, dataset.train_y))
        evaluate = self._evaluator()
        start = time.perf_counter()
        run_epoch = self._epoch_function(state, images)
        compiled = time.perf_counter()
        history["compile_seconds"] += compiled - start
        for epoch in range(first, config.epochs):
            begin = time.perf_counter()
            key = jax.random.fold_in(self.order_key, epoch)
            state, loss = jax.block_until_ready(run_epoch(state, key, *images))
            seconds = time.perf_counter() - begin
            metrics = {
                "epoch": epoch + 1,
                "train_loss": _short(float(loss)),
                **evaluate(*state[:2]),
                "seconds": _short(seconds),
            }
            history["epochs"].append(metrics)
            history["wall_seconds"] += time.perf_counter() - begin
            last = epoch + 1 == config.epochs
            if folder is not None and (
                last or (epoch + 1) % self.setting.checkpoint_every == 0
            ):
                saved = (_joined(*state[:2]), state[2])
                folder.save(epoch + 1, saved, history)
            self.setting.on_epoch(
                Progress(self.stage, epoch + 1, config.epochs, metrics)
            )

        params, stats, opt_state = state
        results, layers, params = self._results(
            params, stats, opt_state, history, evaluate
        )
        record = self._record(results, layers, history)
        if folder is not None:
            folder.finish(_joined(params, stats), record)
        return Trained(record, params, stats, opt_state)

    def _epoch_function(self, state, images):
        """Compiles ``(state, key, x, y) -> (state, mean loss)`` for one epoch."""
        apply, optimizer = self.apply, self.plan.optimizer
        batch = self.config.batch_size
        steps = len(images[0]) // batch

        def step(state, key, number, rows, x, y):
            params, stats, opt_state = state
            x, y = (a.at[rows].get(mode="promise_in_bounds") for a in (x, y))

            def loss_of(params):
                # Dropout. The order of the images takes the folds 0 and 1.
                drop = jax.random.fold_in(key, 2 + number)
                logits, new = apply(params, stats, x, train=True, key=drop)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), new

            (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), stats, opt_state), loss

        def order(key):
            # The last images of the order make no full batch and sit this epoch out.
            rows = jax.random.permutation(key, len(images[0]))[: steps * batch]
            return rows.reshape(steps, batch)

        key = self.order_key
        if not (
            models.MODELS[self.config.model].convolutional
            and jax.default_backend() == "cpu"
        ):

            def scanned(state, key, x, y):
                state, losses = jax.lax.scan(
                    lambda state, numbered: step(state, key, *numbered, x, y),
                    state,
                    (jnp.arange(steps), order(key)),
                )
                return state, losses.mean()

            scanned = jax.jit(scanned, donate_argnums=0)
            return scanned.lower(state, key, *images).compile()

        order = jax.jit(order)
        example = (state, key, np.int32(0), order(key)[0], *images)
        one = jax.jit(step, donate_argnums=0).lower(*example).compile()

        def looped(state, key, x, y):
            losses = []
            for number, rows in enumerate(np.asarray(order(key))):
                state, loss = one(state, key, np.int32(number), rows, x, y)
                losses.append(loss)
            return state, jnp.stack(losses).mean()

        return looped

    def _evaluator(self):
        """Makes ``params, stats -> {"valid_error", "test_error", "below_..."}``."""
        dataset, apply = self.setting.dataset, self.apply
        sets = {
            "valid_error": (dataset.valid_x, dataset.valid_y),
            "test_error": (dataset.test_x, dataset.test_y),
        }
        whole = not models.MODELS[self.config.model].convolutional
        parts = {
            name: [
                jax.device_put((x[i : i + chunk], y[i : i + chunk]))
                for i in range(0, len(x), chunk)
            ]
            for name, (x, y) in sets.items()
            for chunk in [len(x) or 1 if whole else _CHUNK]
        }

        @jax.jit
        def wrong(params, stats, parts):
            return [
                jnp.sum(apply(params, stats, x)[0].argmax(-1) != y, dtype=jnp.int32)
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
            for name, (x, _) in sets.items():
                # One call for the whole set; images of networks with convolutions
                # go in several, for the memory that their activations take.
                calls = [parts[name]] if whole else [[part] for part in parts[name]]
                wrongs = (wrong(params, stats, call) for call in calls)
                count = sum(int(n) for numbers in wrongs for n in numbers)
                metrics[name] = _short(100 * count / len(x)) if len(x) else None
            shares = (_short(float(share)) for share in below(params))
            names = (f"below_{limit:.0e}" for limit in SMALL)
            return {**metrics, **dict(zip(names, shares, strict=True))}

        return evaluate

    def _results(self, params, stats, opt_state, history, evaluate):
        """Final errors, layers and params, after the cut where the method has one."""
        errors = ("valid_error", "test_error")
        last = {name: history["epochs"][-1][name] for name in errors}
        results = dict(last)
        if self.plan.cut is not None:
            gap = sparse_optax.gsm_gap(params, self.config.density)
            params = self.plan.cut(params)
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
        counts = units.dead_units(params, self.setting.dataset.train_x, masks)
        if counts is not None:
            results["dead_units"] = counts.dead
            results["removed_units"] = counts.removed
            results["wasted_weights"] = counts.wasted
        skipped = optax.tree.get(opt_state, "skipped", None)
        if skipped is not None:
            results["skipped_cycles"] = int(skipped)
        return results, layers, params

    def _record(self, results, layers, history):
        columns = {
            name: [metrics[name] for metrics in history["epochs"]]
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
