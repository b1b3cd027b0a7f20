"""Speed of drawing and writing the demo people on one core: python benchmarks/people.py

Prints the median of several repeats, each with different scenes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2

from segtrain.demo import write_demo_people

NUM_IMAGES, REPEATS = 100, 5


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cv2.setNumThreads(1)
    rates = []
    for seed in range(REPEATS + 1):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            write_demo_people(Path(folder), num_train=NUM_IMAGES - 1, num_val=1, seed=seed)
            rates.append(NUM_IMAGES / (time.perf_counter() - started))
    rates = rates[1:]  # the first repeat warms the caches
    print(
        f"{statistics.median(rates):.1f} images/s on one core "
        f"(median of {REPEATS} x {NUM_IMAGES}; {min(rates):.1f} to {max(rates):.1f})"
    )


if __name__ == "__main__":
    main()
