"""What judging costs besides the network, on one core: python benchmarks/eval.py

A drawn 640x480 picture with a prediction whose outline lies near the true one: everything that
evaluation keeps of it. Then a 12-megapixel picture and its memory, and intervals over 5,000
pictures. It is the processor's time, which others on the same machine do not make longer.
"""

import statistics
import time
import tracemalloc

import cv2
import numpy as np

from segtrain.evaluation.bootstrap import compare, intervals
from segtrain.evaluation.boundaries import boundary_counts, contour_counts
from segtrain.evaluation.picture import Probs, count_picture
from segtrain.evaluation.records import RECORD, Records
from segtrain.images import Pixels

REPEATS = 100
GOAL_MS = 12


def main() -> None:
    cv2.setNumThreads(1)
    probs, mask = drawn(480, 640)
    predicted = (probs >= 0.5).astype(np.uint8)
    parts = {
        f"all of a picture (goal {GOAL_MS})": lambda: count_picture(probs, mask),
        "its boundary IoU": lambda: boundary_counts(predicted, mask),
        "its contours": lambda: contour_counts(predicted, mask),
    }
    for name, part in parts.items():
        times = milliseconds(part)
        quartiles = statistics.quantiles(times, n=4)
        print(f"{name:32} {quartiles[1]:.2f} ms ({quartiles[0]:.2f} to {quartiles[2]:.2f})")

    probs, mask = drawn(3000, 4000)
    tracemalloc.start()
    started = time.process_time()
    count_picture(probs, mask)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    print(f"{'12 megapixels':32} {seconds:.2f} s, {peak:.0f} MiB; a record {RECORD.itemsize} bytes")

    records = made_up_records(5000)
    for name, run in {
        "intervals of 5,000 pictures": lambda: intervals(records),
        "5,000 pictures compared": lambda: compare(records, records),
    }.items():
        print(f"{name:32} {milliseconds(run, 3)[1] / 1000:.2f} s")


def drawn(height: int, width: int) -> tuple[Probs, Pixels]:
    """Blobs of person, a prediction with another outline, and a tenth of the pixels ignored."""
    rng = np.random.default_rng(0)
    noise, more, other = (
        cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), height / 16)
        for _ in range(3)
    )
    scale = noise.std()
    mask = (noise + 0.2 * more > 0.5 * scale).astype(np.uint8)
    mask[other > np.quantile(other, 0.9)] = 255
    return 1 / (1 + np.exp(-8 * (noise / scale - 0.5))), mask


def made_up_records(num: int) -> Records:
    rng = np.random.default_rng(0)
    records = np.zeros(num, dtype=RECORD)
    records["index"] = records["identity"] = np.arange(num)
    for field in ("confusion", "boundary", "contour", "in_bin", "confidence"):
        records[field] = rng.integers(1, 50_000, records[field].shape)
    return records


def milliseconds(work, repeats: int = REPEATS) -> list[float]:
    """Sorted; once more at first, which warms the caches."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        times.append((time.process_time() - started) * 1000)
    return sorted(times[1:])


if __name__ == "__main__":
    main()
