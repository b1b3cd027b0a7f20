"""Time and memory of the steps after the model: python benchmarks/compose.py

The input is a drawn scene of 12 megapixels with an upsampled probability as of a model that works
at 224 pixels. Prints for each step the median wall-clock and CPU seconds, and the peak memory of
its arrays beyond the photo and its probability; then the peak memory of the whole process.
"""

import argparse
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np

from segtrain.demo.scenes import draw_person_scene
from segtrain.prediction.backgrounds import build_background_fn
from segtrain.prediction.outputs import OUTPUTS, Composite, Result
from segtrain.prediction.refine import refine_probs
from segtrain.prediction.small_components import remove_small_components

WIDTH, HEIGHT = 4000, 3000
REPEATS = 5


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    scene = draw_person_scene(5, 0, width=400, height=300)
    image = cv2.resize(scene.image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    people = np.maximum.reduce(scene.people).astype(np.float32)
    small = cv2.resize(people, (299, 224), interpolation=cv2.INTER_AREA)
    probability = cv2.resize(cv2.GaussianBlur(small, (0, 0), 1.5), (WIDTH, HEIGHT))

    def result() -> Result:
        return Result(image=image, probs=refined)

    def composite() -> Composite:
        return Composite(result(), build_background_fn("blur"))

    refined = refine_probs(image, probability)
    steps: dict[str, Callable[[], object]] = {
        "refine": lambda: refine_probs(image, probability),
        "clean": lambda: remove_small_components(refined),
        "cutout": lambda: result().cutout(),
        "new background": lambda: composite().pixels,
        "overlay": lambda: composite().overlay(),
        "probability": lambda: composite().probability(),
    }

    def run_all() -> None:
        refined_result = Result(image=image, probs=refine_probs(image, probability))
        refined_composite = Composite(refined_result, build_background_fn("blur"))
        for kind in ("cutout", "background"):
            OUTPUTS[kind].make(refined_composite)

    steps["refine, cutout and new background"] = run_all
    for name, step in steps.items():
        wall, cpu = measure_seconds(step)
        print(f"{name}: {wall:.2f} s ({cpu:.2f} s CPU), {measure_peak(step) / 1e6:.0f} MB")
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"whole process: {process_peak / 1e6:.0f} MB, {cv2.getNumThreads()} threads")


def measure_seconds(step: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = [], []
    for _ in range(REPEATS):
        wall_started, cpu_started = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - wall_started)
        cpu.append(time.process_time() - cpu_started)
    return statistics.median(wall), statistics.median(cpu)


def measure_peak(step: Callable[[], object]) -> int:
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
