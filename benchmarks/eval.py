"""Time of the evaluation besides the model, on one core: python benchmarks/eval.py

Evaluates a drawn 640x480 image with a prediction whose outline is near the true one; then a
12-megapixel image, with its memory; then confidence intervals over 5,000 images. Times are CPU
times, which other processes do not increase.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np

from segtrain.evaluation.bootstrap import compare, compute_intervals
from segtrain.evaluation.boundary import boundary_counts, contour_counts
from segtrain.evaluation.counts import RECORD, Records, count_image
from segtrain.types import Image, Probs

REPEATS = 100
GOAL_MS = 12


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    cv2.setNumThreads(1)
    probs, mask = draw(480, 640)
    predicted = (probs >= 0.5).astype(np.uint8)
    steps = {
        f"one image (goal {GOAL_MS})": lambda: count_image(probs, mask),
        "its boundary IoU": lambda: boundary_counts(predicted, mask),
        "its contours": lambda: contour_counts(predicted, mask),
    }
    for name, step in steps.items():
        times = milliseconds(step)
        quartiles = statistics.quantiles(times, n=4)
        print(f"{name:32} {quartiles[1]:.2f} ms ({quartiles[0]:.2f} to {quartiles[2]:.2f})")

    probs, mask = draw(3000, 4000)
    tracemalloc.start()
    started = time.process_time()
    count_image(probs, mask)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    print(f"{'12 megapixels':32} {seconds:.2f} s, {peak:.0f} MiB; {RECORD.itemsize} bytes a record")

    records = random_records(5000)
    for name, run in {
        "intervals of 5,000 images": lambda: compute_intervals(records),
        "comparison of 5,000 images": lambda: compare(records, records),
    }.items():
        print(f"{name:32} {milliseconds(run, 3)[1] / 1000:.2f} s")


def draw(height: int, width: int) -> tuple[Probs, Image]:
    """Probabilities and a mask of person blobs with another outline; 10 % of the pixels ignored."""
    rng = np.random.default_rng(0)
    noise, outline_noise, ignore_noise = (
        cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), height / 16)
        for _ in range(3)
    )
    scale = noise.std()
    mask = (noise + 0.2 * outline_noise > 0.5 * scale).astype(np.uint8)
    mask[ignore_noise > np.quantile(ignore_noise, 0.9)] = 255
    return 1 / (1 + np.exp(-8 * (noise / scale - 0.5))), mask


def random_records(num: int) -> Records:
    rng = np.random.default_rng(0)
    records = np.zeros(num, dtype=RECORD)
    records["index"] = records["identity"] = np.arange(num)
    for field in ("confusion", "boundary", "contour", "in_bin", "confidence"):
        records[field] = rng.integers(1, 50_000, records[field].shape)
    return records


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Sorted times. One additional run at first warms the caches."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        run()
        times.append((time.process_time() - started) * 1000)
    return sorted(times[1:])


if __name__ == "__main__":
    main()
