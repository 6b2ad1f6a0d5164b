"""Chooses the numbers of the two recipes on the validation split of MNIST.

One number moves at a time, from the defaults; each variant is trained with seeds that
no table has, and its validation error is printed. Test errors are not read. Each run
is a line of the file of records; a run that it has is not trained again.

    python benchmarks/choose_recipe.py --density 0.02 --seeds 2
    python benchmarks/choose_recipe.py --only rate --density 0.01
"""

import argparse
import json
import pathlib
import re

import numpy as np

import sparse_optax
from sparse_optax import schedules
from sparse_optax.experiments import methods, train
from sparse_optax.experiments import setup as shared
from sparse_optax.experiments.config import TrainConfig

FIRST_SEED = 100
# What a method takes where no rate is given.
DEFAULT_RATES = {"long_average_regrow": 0.5, "falling_budget_regrow": 0.3}
RECORDS = pathlib.Path(__file__).parent / "records" / "choose_recipe.jsonl"


def variants():
    """Name -> (method, a function of a run that gives what differs)."""

    def rate(value):
        return lambda setup: {
            "prune_rate": schedules.cosine_prune_rate(value, stop=setup.total)
        }

    found = {}
    for method in ("long_average_regrow", "falling_budget_regrow"):
        found[f"{method}: defaults"] = method, lambda setup: {}
        for value in (0.1, 0.2, 0.3, 0.5, 0.7):
            if value != DEFAULT_RATES[method]:
                found[f"{method}: rate {value}"] = method, rate(value)
        for beta in (0.9, 0.98, 0.998, 0.9995):
            if (method, beta) == ("long_average_regrow", 0.998):
                continue  # its default
            found[f"{method}: average {beta}"] = (
                method,
                lambda setup, beta=beta: {"momentum": beta},
            )
    for factor in (2.0, 3.0, 10.0):
        found[f"falling_budget_regrow: factor {factor:g}"] = (
            "falling_budget_regrow",
            lambda setup, factor=factor: {"initial_factor": factor},
        )
    for share in (0.3, 0.45, 0.75):
        found[f"falling_budget_regrow: ramp {share}"] = (
            "falling_budget_regrow",
            lambda setup, share=share: {
                "density_stop": int(share * setup.total) // setup.period * setup.period
            },
        )
    for shares in ("uniform", "erdos_renyi", "linear"):
        for method in ("long_average_regrow", "falling_budget_regrow"):
            found[f"{method}: budget {shares}"] = method, shares
    return found


def builder(method, options):
    """A builder of the method with other numbers than its defaults."""

    def build(setup):
        return shared.masked(
            getattr(sparse_optax, method)(
                shared.inner(setup),
                density=shared.budget(setup),
                update_period=setup.period,
                update_stop=setup.total,
                key=setup.key,
                **options(setup),
            )
        )

    return build


def trained(method, options, density, seed):
    """The record of a run of the method with other numbers."""
    plain = methods.BUILDERS[method]
    shares = options if isinstance(options, str) else None
    change = (lambda setup: {}) if shares else options
    methods.BUILDERS[method] = builder(method, change)
    try:
        run = train.train(
            TrainConfig(
                dataset="mnist",
                method=method,
                density=density,
                shares=shares,
                seed=seed,
            ),
            # Its folder would be that of the defaults, and a finished run is read.
            runs=None,
        )
    finally:
        methods.BUILDERS[method] = plain
    return run.record


def recorded(path):
    """(variant, density, seed) -> validation error in percent, of a file of records."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(
                f"{path}: line {number} is no whole record ({error}). Delete it."
            ) from error
    return {
        (run["variant"], run["density"], run["seed"]): run["valid_error"]
        for run in runs
    }


def validation_error(name, method, options, density, seed, path):
    """The validation error of the last epoch, in percent, from the file or trained."""
    if (name, density, seed) not in recorded(path):
        record = trained(method, options, density, seed)
        run = {
            "variant": name,
            "density": density,
            "seed": seed,
            "valid_error": record.results["valid_error"],
            "versions": record.versions,
            "commit": record.commit,
        }
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")
    return recorded(path)[name, density, seed]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression of variants")
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS)
    given = parser.parse_args()
    given.records.parent.mkdir(parents=True, exist_ok=True)
    given.records.touch()
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    for name, (method, options) in variants().items():
        if re.search(given.only, name):
            errors = [
                validation_error(
                    name, method, options, given.density, seed, given.records
                )
                for seed in seeds
            ]
            print(f"{name:45s}{np.mean(errors):7.3f}  {errors}", flush=True)


if __name__ == "__main__":
    main()
