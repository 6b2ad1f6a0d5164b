"""The entry point of ``sparse-optax``: answers at once, and says what is missing.

It is installed as the module ``sparse_optax_command`` too, which is what the command
runs: a module of the package is imported after the package, and that after jax.
"""

import contextlib
import importlib.metadata
import sys
import time


def main() -> int:
    """Runs the command, or says how to install what it needs.

    Returns:
      The exit status.
    """
    started, words = time.monotonic(), sys.argv[1:]
    if words == ["--version"]:
        print(f"sparse-optax {importlib.metadata.version('sparse_optax')}")
        return 0
    try:
        _say_loading(words)
        from sparse_optax.experiments import cli
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sparse_optax":
            raise
        print(
            f"sparse-optax: the command needs the package {error.name!r}, which is not "
            "installed. Install it with the others of the experiments: pip install "
            '"sparse_optax[experiments]".',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("sparse-optax: stopped before anything was done.", file=sys.stderr)
        return 130
    return cli.main(started=started)


def _say_loading(words: list[str]) -> None:
    """Tells of the seconds that the libraries take, where progress is shown."""
    if words[:1] == ["train"] and not {"-h", "--help", "--quiet"} & set(words):
        # What cannot be written is told of in the end.
        with contextlib.suppress(OSError):
            print("0:00 loading the libraries", flush=True)


if __name__ == "__main__":
    sys.exit(main())
