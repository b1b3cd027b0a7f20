"""Seconds and memory of what comes after the network: python benchmarks/compose.py

A drawn scene of 12 megapixels and a probability as a network that sees 224 pixels would give it,
enlarged. Prints each step's median seconds, wall clock and of all threads together; the peak of its
arrays beyond the photo and its probability; and the peak of the whole process.
"""

import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable

import cv2
import numpy as np

from segtrain.data.people.scenes import draw_person_scene
from segtrain.prediction.backgrounds import background_maker
from segtrain.prediction.cleaning import clean
from segtrain.prediction.outputs import OUTPUTS, Composition, Result
from segtrain.prediction.refine import refine

WIDTH, HEIGHT = 4000, 3000
REPEATS = 5


def main() -> None:
    scene = draw_person_scene(5, 0, width=400, height=300)
    image = cv2.resize(scene.image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    people = np.maximum.reduce(scene.people).astype(np.float32)
    seen = cv2.resize(people, (299, 224), interpolation=cv2.INTER_AREA)
    probability = cv2.resize(cv2.GaussianBlur(seen, (0, 0), 1.5), (WIDTH, HEIGHT))

    def result() -> Result:
        return Result(image=image, answer=refined)

    def composition() -> Composition:
        return Composition(result(), background_maker("blur"))

    refined = refine(image, probability)
    steps: dict[str, Callable[[], object]] = {
        "refine": lambda: refine(image, probability),
        "clean": lambda: clean(refined),
        "cut-out": lambda: result().cutout(),
        "new background, from the start": lambda: composition().composed,
        "overlay": lambda: composition().overlay(),
        "probability": lambda: composition().probability(),
    }

    def all_of_it() -> None:
        cut = Result(image=image, answer=refine(image, probability))
        whole = Composition(cut, background_maker("blur"))
        for kind in ("cutout", "background"):
            OUTPUTS[kind].make(whole)

    steps["refine, cut-out and new background"] = all_of_it
    for name, step in steps.items():
        wall, cpu = _seconds(step)
        print(f"{name}: {wall:.2f} s ({cpu:.2f} s CPU), {_peak(step) / 1e6:.0f} MB")
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"whole process: {whole / 1e6:.0f} MB, {cv2.getNumThreads()} threads")


def _seconds(step: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = [], []
    for _ in range(REPEATS):
        wall_started, cpu_started = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - wall_started)
        cpu.append(time.process_time() - cpu_started)
    return statistics.median(wall), statistics.median(cpu)


def _peak(step: Callable[[], object]) -> int:
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
