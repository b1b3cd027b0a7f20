"""How long the command line keeps a person waiting: python benchmarks/startup.py

Whole processes, in turn with `python -c pass`, so that the interpreter's own share is seen.
"""

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
