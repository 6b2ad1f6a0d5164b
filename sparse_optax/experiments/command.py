"""The entry point of ``sparse-optax``: says which packages are missing."""

import sys


def main() -> int:
    """Runs the command, or says how to install what it needs.

    Returns:
      The exit status.
    """
    try:
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
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
