"""How long one photo takes in a fresh process: python benchmarks/export.py

By a checkpoint and by the .onnx made of it, in turn: whole processes, from the command line to the
mask on disk. Beside the clock stands the
processor's time, which others on the same machine do not make longer.
"""

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
from segtrain.config import load_config
from segtrain.images import resize_image, write_image
from segtrain.models import build_model

REPEATS = 7
GOAL_SECONDS = 1.5
SMALL_UNET = ["model.base_channels=16", "data.image_size=224"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, photo = Path(folder, "unet.pt"), Path(folder, "photo.jpg")
        write_small_unet(checkpoint)
        write_photo(photo)
        onnx = checkpoint.with_suffix(".onnx")
        export = ["export", "--checkpoint", str(checkpoint), "--output", str(onnx)]
        subprocess.run([sys.executable, "-m", "segtrain", *export], check=True)
        cold_predict({"checkpoint": checkpoint, f"onnx (goal {GOAL_SECONDS} s)": onnx}, photo)


def cold_predict(networks: dict[str, Path], photo: Path) -> None:
    """Print what `segtrain predict` takes for one photo in a fresh process, for each network."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for _ in range(REPEATS + 1):
        for name, network in networks.items():
            command = ["predict", str(photo), "--checkpoint", str(network), "--overwrite"]
            command += ["--output", str(photo.parent / "out")]
            seconds[name].append(timed([sys.executable, "-m", "segtrain", *command]))
    for name, times in seconds.items():
        wall, processor = (statistics.median(kind) for kind in zip(*times[1:], strict=True))
        fastest = min(one for one, _ in times[1:])
        print(
            f"{name:24} {wall:.2f} s (fastest {fastest:.2f}), of the processor {processor:.2f} s "
            f"(medians of {REPEATS})"
        )


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Seconds on the clock and of the processor that a process takes."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    after, ended = os.times(), time.perf_counter()
    processor = after.children_user + after.children_system
    return ended - started, processor - before.children_user - before.children_system


def write_small_unet(path: Path) -> None:
    """Two million random weights."""
    config = load_config(sets=SMALL_UNET)
    torch.manual_seed(0)
    model = build_model(config.model.name, **config.model.kwargs)
    weights = model.state_dict()
    save_checkpoint(
        path, Checkpoint(config=config, weights=weights, epoch=0, global_step=0, metrics={})
    )


def write_photo(path: Path) -> None:
    """Random blots, 1280x960."""
    blots = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    write_image(path, resize_image(blots, (960, 1280)))


if __name__ == "__main__":
    main()
