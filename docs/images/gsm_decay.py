"""Draw gsm_decay.png: how weights decay to zero under GSM, from the records.

Run from the root of a checkout: ``python docs/images/gsm_decay.py``.
"""

from pathlib import Path

from matplotlib.figure import Figure

from sparse_optax.experiments import plots, records

TITLES = {
    "plain_s0": "as in the paper",
    "gate_s0": "gate at 0.7 of the density",
    "settle_s0": "settled from epoch 160",
}


def main():
    """Reads the records of one seed and writes the figure next to this file."""
    found = records.read_folder(Path("results/gsm_lenet300"))
    canvas = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (name, title) in zip(canvas.subplots(1, 3), TITLES.items(), strict=True):
        plots.small_weights(axes, found[name])
        result = found[name].results
        axes.set_title(
            f"{title}\nerror {result['test_error_before_cut']:.2f}% before the cut, "
            f"{result['test_error']:.2f}% after",
            fontsize=10,
        )
    plots.save(canvas, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
