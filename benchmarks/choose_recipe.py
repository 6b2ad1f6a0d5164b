"""Chooses the numbers of the two recipes on the validation split of MNIST.

One number moves at a time, from those of ``START``; each variant is trained with seeds
that no table has, and its validation error is printed. Test errors are not read. Each
run is a line of the file of records; a run that it has is not trained again.

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
# What each variant has but for one number: what the recipes were before this choice.
START = {
    "long_average_regrow": {"rate": 0.5, "momentum": 0.998},
    "falling_budget_regrow": {
        "rate": 0.3,
        "momentum": "auto",
        "factor": 5.0,
        "ramp": 0.6,
    },
}
GRIDS = {
    "rate": (0.1, 0.2, 0.3, 0.5, 0.7),
    "momentum": (0.9, 0.98, 0.998, 0.9995),
    "factor": (2.0, 3.0, 5.0, 10.0),
    "ramp": (0.3, 0.45, 0.6, 0.75),
    "shares": ("uniform", "erdos_renyi", "erdos_renyi_kernel", "linear"),
}
RECORDS = pathlib.Path(__file__).parent / "records" / "choose_recipe.jsonl"


def variants():
    """Name -> (method, numbers)."""
    found = {}
    for method, start in START.items():
        start = start | {"shares": "erdos_renyi_kernel"}
        found[f"{method}: start"] = method, start
        for name in start:
            for value in GRIDS[name]:
                if value != start[name]:
                    shown = value if isinstance(value, str) else f"{value:g}"
                    label = f"{method}: {name} {shown}"
                    found[label] = method, start | {name: value}
    return found


def builder(method, numbers):
    """A builder of the method with these numbers."""

    def build(setup):
        options = {
            "prune_rate": schedules.cosine_prune_rate(
                numbers["rate"], stop=setup.total
            ),
            "momentum": numbers["momentum"],
        }
        if "factor" in numbers:
            end = int(numbers["ramp"] * setup.total) // setup.period * setup.period
            options |= {"initial_factor": numbers["factor"], "density_stop": end}
        return shared.masked(
            getattr(sparse_optax, method)(
                shared.inner(setup),
                density=shared.budget(setup),
                update_period=setup.period,
                update_stop=setup.total,
                key=setup.key,
                **options,
            )
        )

    return build


def trained(method, numbers, density, seed):
    """The record of a run of the method with these numbers."""
    plain = methods.BUILDERS[method]
    methods.BUILDERS[method] = builder(method, numbers)
    try:
        run = train.train(
            TrainConfig(
                dataset="mnist",
                method=method,
                density=density,
                shares=numbers["shares"],
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


def validation_error(name, method, numbers, density, seed, path):
    """The validation error of the last epoch, in percent, from the file or trained."""
    if (name, density, seed) not in recorded(path):
        record = trained(method, numbers, density, seed)
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
    for name, (method, numbers) in variants().items():
        if re.search(given.only, name):
            errors = [
                validation_error(
                    name, method, numbers, given.density, seed, given.records
                )
                for seed in seeds
            ]
            print(f"{name:45s}{np.mean(errors):7.3f}  {errors}", flush=True)


if __name__ == "__main__":
    main()
