"""What the pictures show: the numbers given, in styles that are told apart in grey."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")

from helpers import refuses
from matplotlib import colors, pyplot
from matplotlib.figure import Figure

import sparse_optax
from sparse_optax import plot, report

PARAMS = {"a": {"kernel": jnp.ones((16, 10))}, "b": {"kernel": jnp.ones((10, 4))}}


@pytest.fixture
def axes():
    return Figure().add_subplot()


def lines(axes):
    """The lines by label, as lists of numbers."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    }


def test_lines_are_told_apart_in_grey():
    """No two of the first fourteen have one brightness, style and marker."""
    ways = plot.styles(14)
    looks = {(w["linestyle"], w["marker"]) for w in ways}
    assert len(looks) == 14
    grey = [np.dot(colors.to_rgb(w["color"]), (0.2126, 0.7152, 0.0722)) for w in ways]
    assert all(abs(a - b) > 0.02 for a, b in itertools.pairwise(grey))
    assert "marker" not in plot.styles(1, markers=False)[0]


def test_a_mask_is_shown_as_it_is(axes):
    mask = np.random.default_rng(0).random((30, 20)) < 0.2
    shown = plot.mask({"a": {"kernel": jnp.asarray(mask)}}, axes=axes)
    np.testing.assert_array_equal(shown.images[0].get_array(), mask)


def test_a_large_mask_is_averaged(axes):
    mask = np.random.default_rng(0).random((1000, 300)) < 0.1
    shown = np.asarray(plot.mask(mask, axes=axes).images[0].get_array())
    assert shown.shape == (256, 256)
    rows = [slice(int(i * 1000 / 256), int((i + 1) * 1000 / 256)) for i in range(256)]
    columns = [slice(int(i * 300 / 256), int((i + 1) * 300 / 256)) for i in range(256)]
    for i, j in ((0, 0), (17, 200), (255, 255)):
        assert shown[i, j] == pytest.approx(mask[rows[i], columns[j]].mean())


def test_inputs_as_an_image(axes):
    mask = np.random.default_rng(0).random((12, 5)) < 0.5
    shown = plot.mask(mask, image=(2, 3, 2), axes=axes).images[0].get_array()
    want = 100 * mask.mean(axis=1).reshape(2, 3, 2).mean(axis=2)
    np.testing.assert_allclose(shown, want)


def test_a_leaf_of_a_state_and_a_convolution(axes):
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=0)
    state = tx.init(PARAMS)
    shown = plot.mask(state, "b/kernel", axes=axes).images[0].get_array()
    assert shown.sum() == 10
    kernel = np.zeros((3, 3, 2, 4), bool)
    assert plot.mask(kernel, axes=axes).images[1].get_array().shape == (18, 4)


@pytest.mark.parametrize("jitted", [False, True])
def test_densities_of_summaries_and_of_metrics(axes, jitted):
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=0)
    state = tx.init(PARAMS)
    make = jax.jit(report.metrics) if jitted else report.summary
    plot.densities([make(PARAMS, state)] * 3, steps=[0, 10, 20], axes=axes)
    shown = lines(axes)
    assert set(shown) == {"a/kernel", "b/kernel"}
    assert shown["a/kernel"] == ([0, 10, 20], pytest.approx([25.0] * 3))
    assert axes.get_yscale() == "log"


def test_decay_shows_what_is_left_above_the_cut(axes):
    plot.decay({"x": [1, 0.1, 0.0]}, 0.05, axes=axes)
    times, left = lines(axes)["x"]
    assert (times, left[:2]) == ([1, 2, 3], [100, 10])
    assert np.isnan(left[2])  # nothing has no place on this axis
    assert lines(axes)["what the cut keeps"][1] == [5, 5]
    assert axes.get_yscale() == "log"


def test_errors_with_their_range(axes):
    errors = {"A": {0.05: [1.0, 2.0, 6.0], 0.01: 4.0}}
    plot.error_by_density(errors, dense=0.5, axes=axes)
    line, _, (bars,) = axes.containers[0].lines
    assert list(line.get_xdata()) == [1, 5]
    assert list(line.get_ydata()) == [4, 3]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[4, 4], [1, 6]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5"]


def test_without_axes_there_is_a_new_figure():
    first, second = plot.mask(np.eye(3, dtype=bool)), plot.mask(np.eye(3, dtype=bool))
    try:
        assert first.figure is not second.figure
        assert first.figure.number in pyplot.get_fignums()
    finally:
        pyplot.close("all")


MASK = np.eye(4, dtype=bool)
REFUSED = {
    "a float mask": (lambda: plot.mask(np.eye(3)), "mask", "`masks`", "boolean"),
    "two leaves": (
        lambda: plot.mask({"a": MASK, "b": MASK}),
        "mask",
        "`name`",
        "'a', 'b'",
    ),
    "an image": (lambda: plot.mask(MASK, image=(3, 3)), "mask", "`image`", "is 4"),
    "no moment": (lambda: plot.densities([]), "densities", "`history`", "one moment"),
    "one summary": (
        lambda: plot.densities(report.summary(PARAMS)),
        "densities",
        "`history`",
        "list",
    ),
    "steps": (
        lambda: plot.densities({"a": [1.0]}, steps=[1, 2]),
        "densities",
        "`steps`",
        "1 numbers",
    ),
    "a density": (lambda: plot.decay({"a": [1.0]}, 0), "decay", "`density`", "0"),
    "an error": (
        lambda: plot.error_by_density({"a": [1.0]}),
        "error_by_density",
        "`errors`",
        "dict",
    ),
    "axes": (lambda: plot.mask(MASK, axes=3), "mask", "`axes`", "matplotlib"),
    "styles": (lambda: plot.styles(-1), "styles", "`number`", "at least 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_do_not_fit(what):
    call, name, argument, words = REFUSED[what]
    with refuses(name, argument, words):
        call()


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import numpy as np\n"
        "import sparse_optax\n"
        "try: sparse_optax.plot.mask(np.eye(2, dtype=bool))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 'pip install "sparse_optax[plot]"' in done.stdout
