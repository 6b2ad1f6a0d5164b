"""Run the notebooks of this folder from top to bottom; any error is fatal.

    python notebooks/execute.py                  # all of them
    python notebooks/execute.py quickstart       # one, by name
    python notebooks/execute.py --output FOLDER  # keep the executed copies
    python notebooks/execute.py --jobs 2         # two at a time
    python notebooks/execute.py --write          # make the notebooks from their .py

Each notebook is a pair: edit the ``.py`` file, run ``--write``, look at the plots, and
commit both. Without ``--write`` a pair whose cells differ fails.

Each notebook runs in a fresh kernel of this interpreter, in an empty working folder,
so that it cannot lean on files of the checkout. A notebook that draws nothing fails
too: the plots are what it is for. The executed copies, also those of failed runs, are
written to a temporary folder unless ``--output`` names another.
"""

import argparse
import concurrent.futures
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

FOLDER = pathlib.Path(__file__).resolve().parent
CELL_SECONDS = 600


def count_plots(notebook: nbformat.NotebookNode) -> int:
    """Number of pictures among the outputs of the code cells."""
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def execute(path: pathlib.Path, output: pathlib.Path, write: bool) -> str | None:
    """Run one notebook and save the executed copy.

    Args:
        path: The ``.py`` file of the pair.
        output: Existing folder for the copy.
        write: Whether the copy becomes the notebook of the pair.

    Returns:
        What went wrong, or None.
    """
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # random ones would differ at each writing
    other = path.with_suffix(".ipynb")
    if not write:
        if not other.exists() or cells(nbformat.read(other, 4)) != cells(notebook):
            return f"{other.name} is not made from {path.name}; run it with --write"
        notebook = nbformat.read(other, as_version=4)
    nbformat.validate(notebook)
    error = None
    with tempfile.TemporaryDirectory() as workdir:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": workdir}},
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as caught:
            error = str(caught)
    nbformat.write(notebook, output / other.name)
    if error is None and count_plots(notebook) == 0:
        error = "no plot among its outputs"
    if write and error is None:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this run
        nbformat.write(notebook, other)
    return error


def main() -> int:
    """Run what the command line names; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run (default: all)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the copies")
    parser.add_argument("--write", action="store_true", help="keep them as the pair's")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    arguments = parser.parse_args()

    scripts = sorted(set(FOLDER.glob("*.py")) - {pathlib.Path(__file__).resolve()})
    known = {path.stem: path for path in scripts}
    names = [pathlib.Path(name).stem for name in arguments.names] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"no such notebook: {unknown or FOLDER}; there are {list(known)}")

    if arguments.jobs < 1 or (arguments.write and arguments.jobs > 1):
        parser.error("--jobs must be at least 1, and 1 with --write, which keeps times")

    output = arguments.output or pathlib.Path(tempfile.mkdtemp(prefix="notebooks-"))
    output.mkdir(parents=True, exist_ok=True)

    # A backend forced from outside would keep the kernel from embedding its plots.
    os.environ.pop("MPLBACKEND", None)

    def run(name: str) -> tuple[str | None, float]:
        start = time.perf_counter()
        error = execute(known[name], output, arguments.write)
        return error, time.perf_counter() - start

    def outcomes() -> Iterator[tuple[str | None, float]]:
        if arguments.jobs == 1:  # in the main thread, where Ctrl-C ends the kernel
            yield from map(run, names)
            return
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            yield from pool.map(run, names)

    failures = 0
    for name, (error, seconds) in zip(names, outcomes(), strict=True):
        failures += error is not None
        outcome = "ok" if error is None else "FAILED"
        print(f"{name}: {outcome} in {seconds:.0f} s", flush=True)
        if error is not None:
            print(error, file=sys.stderr, flush=True)
    print(f"executed copies: {output}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
