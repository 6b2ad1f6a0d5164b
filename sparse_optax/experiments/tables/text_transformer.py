"""A character transformer on the help pages of Python, at four densities.

No paper has this table. 786,432 weights in 16 kernels, AdamW with a decay of 0.1 on the
kernels, one cycle of the learning rate up to 3e-3, batch 32 of 128 characters, 15
epochs; loss of the validation part in bits a character. Dynamic masks move twice an
epoch. GSM passes its gate before AdamW, whose decay is not in the gradient: a passive
weight falls by the sum of rate times decay, so that the decay is 2.5 there, exp(-10)
in all, from the dense network and for as long again; ``alive / kept`` says whether that
sufficed. Wanda and SparseGPT cut the dense network once, after 1,000 texts, and do not
train on, as their papers do. No method was tuned.
"""

from typing import Any

from sparse_optax.experiments.recipes import TWO_OF_FOUR
from sparse_optax.experiments.tables import common, costs, published

SEEDS = range(2)
DENSITIES = (0.2, 0.1, 0.05)
LABELS = {
    "gradual_magnitude": "gradual magnitude",
    "rigl": "RigL",
    "sparse_momentum": "sparse momentum",
    "gsm": "GSM, decoupled decay",
}
CUTS = {
    "l2": "cut by global magnitude",
    "wanda": "Wanda",
    "sparse_gpt": "SparseGPT",
}
_RECIPE: dict[str, Any] = dict(dataset="topics", model="transformer")


def _lines():
    yield "dense", published.Line("dense", _RECIPE | dict(method="dense"))
    two = dict(method="gradual_magnitude", density=0.5, pattern="2:4", cycles=2)
    yield "2_4", published.Line("2:4 by gradual magnitude, 50%", _RECIPE | two)
    for density in DENSITIES:
        for method, label in LABELS.items():
            options = _RECIPE | dict(method=method, density=density)
            options |= dict(cycles=2) if method != "gsm" else {}
            name = f"{method}_d{density:g}"
            yield name, published.Line(f"{label}, {density:.0%}", options)
    # One cut of the dense network, without training after it, at the papers' 50%.
    for method, label in CUTS.items():
        options = _RECIPE | dict(method=method, density=0.5)
        yield f"{method}_d0.5", published.Line(f"{label}, 50%", options)
        if method in TWO_OF_FOUR:
            line = published.Line(f"{label}, 2:4", options | dict(pattern="2:4"))
            yield f"{method}_2_4", line


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)


def render(records):
    """One line a method and density."""
    lines = []
    for group, line in LINES.items():
        ours = common.group(ROWS, records, group)
        if not ours:
            runs = [row.config for row in ROWS if row.group == group]
            cost = costs.told(costs.together(runs))
            lines.append([line.label, "-", cost, "-", "-"])
            continue
        results = [record.results for record in ours]
        gaps = [r["gap"]["alive"] / r["gap"]["kept"] for r in results if "gap" in r]
        lines.append(
            [
                line.label,
                f"{results[0]['kept']:,}",
                common.mean_se([r["valid_bits"] for r in results], 3),
                common.mean_se([r["test_bits"] for r in results], 3),
                common.mean_se(gaps) if gaps else "-",
            ]
        )
    header = [
        "transformer",
        "kept",
        "validation, bits a character, mean ± SE (runs)",
        "test",
        "alive / kept before the cut",
    ]
    return common.markdown(header, lines) + (
        "\n\nHours are those of all runs of a line on two processor cores."
    )


TABLE = common.Table(
    "text_transformer", "A character transformer, bits against density", ROWS, render
)
