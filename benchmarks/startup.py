"""Startup time of the command line: python benchmarks/startup.py

Times whole processes, alternating with `python -c pass`, which shows the part of the interpreter.
"""

import argparse
import statistics
import subprocess
import sys
import time

REPEATS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "segtrain --help": [sys.executable, "-m", "segtrain", "--help"],
    "segtrain train --nonsense": [sys.executable, "-m", "segtrain", "train", "--nonsense"],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:28} {statistics.median(times[1:]):.3f} s (median of {REPEATS})")


if __name__ == "__main__":
    main()
