"""What an update of a language model of 8B weights needs, for 8 to 256 devices.

    python benchmarks/bench_scale.py [--devices 8 64 256] [--methods sgd gsm ...]

Compiled only, for CPU devices that never run; each row is a process of its own. Bytes
are those of one device. With donated arguments XLA on CPU copies what it could reuse,
for plain SGD too, so that temporaries are given for both.
"""

import argparse
import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "tests" / "scale.py"
METHODS = ("sgd", "gsm", "sparse_momentum", "whole_leaves")


def compiled(*arguments: str) -> dict:
    """The line that ``scale.py`` prints."""
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints one row for each method and number of devices."""
    parser = argparse.ArgumentParser(description="What an update needs.")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--kind", choices=("Auto", "Explicit"), default="Auto")
    options = parser.parse_args()
    print(
        "| method | devices | lower, s | compile, s | arguments, MB | temporaries, MB "
        "| donated, MB | all-reduces | elements |\n|---" + "|---:" * 8 + "|"
    )
    for method in options.methods:
        for devices in options.devices:
            plain = compiled(method, options.kind, str(devices))
            donated = compiled(method, options.kind, str(devices), "donate")
            sums = plain["collectives"].get("all-reduce", [])
            megabytes = (
                plain["argument_bytes"],
                plain["temporary_bytes"],
                donated["temporary_bytes"],
            )
            row = [
                method,
                devices,
                plain["lower_seconds"],
                plain["compile_seconds"],
                *(f"{x / 1e6:.2f}" for x in megabytes),
                len(sums),
                sum(sums),
            ]
            print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
