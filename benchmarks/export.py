"""Time of predicting one photo in a new process: python benchmarks/export.py

Alternates between a checkpoint and the .onnx exported from it. Times are of the whole process, from
the command line to the mask on disk: wall-clock time, and CPU time, which other processes do not
increase.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from segtrain.checkpoint import Checkpoint, save_checkpoint
from segtrain.config.resolve import load_config
from segtrain.imaging.images import resize_image, write_image
from segtrain.models import build_model

REPEATS = 7
GOAL_SECONDS = 1.5
SMALL_UNET = ["model.base_channels=16", "data.image_size=224"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, photo = Path(folder, "unet.pt"), Path(folder, "photo.jpg")
        write_small_unet(checkpoint)
        write_photo(photo)
        onnx = checkpoint.with_suffix(".onnx")
        export = ["export", "--checkpoint", str(checkpoint), "--output", str(onnx)]
        subprocess.run([sys.executable, "-m", "segtrain", *export], check=True)
        cold_predict({"checkpoint": checkpoint, f"onnx (goal {GOAL_SECONDS} s)": onnx}, photo)


def cold_predict(models: dict[str, Path], photo: Path) -> None:
    """Print how long `segtrain predict` takes for one photo in a new process, for each model."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(REPEATS + 1):
        for name, path in models.items():
            command = ["predict", str(photo), "--checkpoint", str(path), "--overwrite"]
            command += ["--output", str(photo.parent / "out")]
            seconds[name].append(run_timed([sys.executable, "-m", "segtrain", *command]))
    for name, times in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[1:], strict=True))
        fastest = min(wall for wall, _ in times[1:])
        print(
            f"{name:24} {wall:.2f} s (fastest {fastest:.2f}), CPU {cpu:.2f} s "
            f"(medians of {REPEATS})"
        )


def run_timed(command: Sequence[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    after, ended = os.times(), time.perf_counter()
    cpu = after.children_user + after.children_system
    return ended - started, cpu - before.children_user - before.children_system


def write_small_unet(path: Path) -> None:
    """A checkpoint with two million random weights."""
    config = load_config(sets=SMALL_UNET)
    torch.manual_seed(0)
    model = build_model(config.model.name, **config.model.kwargs)
    weights = model.state_dict()
    save_checkpoint(
        path, Checkpoint(config=config, weights=weights, epoch=0, global_step=0, metrics={})
    )


def write_photo(path: Path) -> None:
    """A photo of random blobs, 1280x960."""
    blobs = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    write_image(path, resize_image(blobs, (960, 1280)))


if __name__ == "__main__":
    main()
