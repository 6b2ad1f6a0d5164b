"""Run the notebooks of this folder from top to bottom; any error is fatal.

    python notebooks/execute.py                  # all of them
    python notebooks/execute.py quickstart       # one, by name
    python notebooks/execute.py --output FOLDER  # keep the executed copies

Each notebook runs in a fresh kernel of this interpreter, in an empty working folder,
so that it cannot lean on files of the checkout. A notebook that draws nothing fails
too: the plots are what it is for. The executed copies, also those of failed runs, are
written to a temporary folder unless ``--output`` names another.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

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


def execute(path: pathlib.Path, output: pathlib.Path) -> str | None:
    """Run one notebook and save the executed copy.

    Args:
        path: The notebook.
        output: Existing folder for the copy, under the notebook's own name.

    Returns:
        What went wrong, or None.
    """
    notebook = nbformat.read(path, as_version=4)
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
    nbformat.write(notebook, output / path.name)
    if error is None and count_plots(notebook) == 0:
        error = "no plot among its outputs"
    return error


def main() -> int:
    """Run what the command line names; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks to run (default: all)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the copies")
    arguments = parser.parse_args()

    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    names = [pathlib.Path(name).stem for name in arguments.names] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"no such notebook: {unknown or FOLDER}; there are {list(known)}")

    output = arguments.output or pathlib.Path(tempfile.mkdtemp(prefix="notebooks-"))
    output.mkdir(parents=True, exist_ok=True)

    # A backend forced from outside would keep the kernel from embedding its plots.
    os.environ.pop("MPLBACKEND", None)

    failures = 0
    for name in names:
        start = time.perf_counter()
        error = execute(known[name], output)
        failures += error is not None
        outcome = "ok" if error is None else "FAILED"
        print(f"{name}: {outcome} in {time.perf_counter() - start:.0f} s", flush=True)
        if error is not None:
            print(error, file=sys.stderr, flush=True)
    print(f"executed copies: {output}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
