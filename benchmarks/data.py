"""Speed and memory of the data path compared with the usual pipeline.

    python benchmarks/data.py index                  # a generated annotation file of COCO's size
    python benchmarks/data.py loading --data /data/coco    # images/s on one core
    python benchmarks/data.py prepare --data /data/coco

The usual pipeline is that of most training scripts: PIL decodes, pycocotools draws the masks,
torchvision resizes, flips, crops and normalizes to float tensors. Variants alternate, and medians
are reported, so that a noisy machine affects all of them equally.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from segtrain.config.schema import DataConfig
from segtrain.data.datasets import open_selection
from segtrain.data.loader import Batches, train_batches
from segtrain.data.prepare import prepare
from segtrain.data.transforms import TrainTransform
from segtrain.demo.dataset import demo_people_root
from segtrain.runtime.cpu import available_cpus

SIZE, BATCH_SIZE = 224, 16
NUM_IMAGES, NUM_ANNOTATIONS, NUM_PEOPLE = 118_287, 860_001, 262_465


class UsualDataset(Dataset):
    """COCO people as typical training scripts load them."""

    def __init__(self, root: Path, split: str) -> None:
        self.coco = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
        self.folder = root / f"{split}2017"
        [self.person] = self.coco.getCatIds(catNms=["person"])
        self.ids = self.coco.getImgIds()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.coco.imgs[self.ids[index]]
        image = Image.open(self.folder / row["file_name"]).convert("RGB")
        target = np.zeros((row["height"], row["width"]), dtype=np.uint8)
        for annotation in self.coco.loadAnns(self.coco.getAnnIds(row["id"], self.person)):
            mask = self.coco.annToMask(annotation)
            target[mask == 1] = 255 if annotation["iscrowd"] else 1
        mask = Image.fromarray(target)
        side = round(SIZE * random.uniform(1.0, 1.5))
        image = F.resize(image, side)
        mask = F.resize(mask, side, interpolation=F.InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = F.hflip(image), F.hflip(mask)
        top = random.randint(0, image.height - SIZE)
        left = random.randint(0, image.width - SIZE)
        image, mask = (F.crop(x, top, left, SIZE, SIZE) for x in (image, mask))
        tensor = F.normalize(F.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return tensor, torch.from_numpy(np.array(mask)).long()


def segtrain_batches(root: Path, workers: int) -> Batches:
    source = open_selection(DataConfig(root=str(root)), "train")
    return train_batches(
        source,
        TrainTransform(SIZE),
        batch_size=BATCH_SIZE,
        workers=workers,
        seed=0,
        pin_memory=False,
    )


def measure_seconds(batches: "Batches | DataLoader", num_images: int) -> float:
    """Seconds to load `num_images` after the first batch, which waits for the worker processes."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    for _ in range(num_images // BATCH_SIZE):
        next(iterator)
    seconds = time.perf_counter() - started
    del iterator
    gc.collect()  # ends the worker processes
    return seconds


def measure_rates(
    variants: dict[str, Callable[[], "Batches | DataLoader"]], num_images: int, repeats: int
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, build in variants.items():
            rates[name].append(num_images / measure_seconds(build(), num_images))
    return rates


def benchmark_loading(root: Path, repeats: int, short_side: int) -> None:
    """Images/s, from the files to a batch."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        config = DataConfig(root=str(root))
        prepare(config, prepared, short_side=short_side, workers=len(cores))
        usual = UsualDataset(root, "train")
        # One epoch, so that every image is read once.
        num_images = (len(usual) // BATCH_SIZE - 1) * BATCH_SIZE
        os.sched_setaffinity(0, cores[:1])
        one_core = measure_rates(
            {
                "usual pipeline": lambda: DataLoader(usual, BATCH_SIZE, shuffle=True),
                "segtrain, raw": lambda: segtrain_batches(root, 0),
                "segtrain, prepared": lambda: segtrain_batches(prepared, 0),
            },
            num_images,
            repeats,
        )
        os.sched_setaffinity(0, cores)
        workers = measure_rates(
            {
                "segtrain, raw, 1 worker": lambda: segtrain_batches(root, 1),
                "segtrain, raw, 2 workers": lambda: segtrain_batches(root, 2),
                "segtrain, prepared, 1 worker": lambda: segtrain_batches(prepared, 1),
                "segtrain, prepared, 2 workers": lambda: segtrain_batches(prepared, 2),
            },
            num_images,
            repeats,
        )
    print_table(
        f"{num_images} images, one core", one_core, dict.fromkeys(one_core, "usual pipeline")
    )
    references = {name: name.rpartition(",")[0] + ", 1 worker" for name in workers}
    print_table(f"{num_images} images, {len(cores)} cores", workers, references)


def print_table(title: str, rates: dict[str, list[float]], references: dict[str, str]) -> None:
    table = Table(title=title)
    for heading in ("", "images/s", "from", "to", "ratio", "against"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in rates.items():
        # The ratio within each repeat: a slow machine slows down both.
        pairs = zip(values, rates[references[name]], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        summary = [statistics.median(values), min(values), max(values)]
        table.add_row(name, *(f"{x:.0f}" for x in summary), f"{ratio:.2f}", references[name])
    Console(width=100).print(table)


def benchmark_prepare(root: Path, repeats: int) -> None:
    rates = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            result = prepare(
                DataConfig(root=str(root)),
                Path(folder) / "prepared",
                short_side=320,
                workers=available_cpus(),
            )
            rates.append(sum(result.num_images.values()) / (time.perf_counter() - started))
    print(
        f"prepare on {available_cpus()} cores: {statistics.median(rates):.0f} images/s "
        f"({min(rates):.0f} to {max(rates):.0f})"
    )


OPEN = """
import re, sys, time
from pathlib import Path
from segtrain.data.coco.dataset import CocoDataset

def peak() -> float:
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

before = peak()
started = time.perf_counter()
source = CocoDataset(Path(sys.argv[1]), "train")
seconds = time.perf_counter() - started
print(f"{seconds:.2f} s, peak {peak():.0f} MB (after imports {before:.0f}), {len(source):,} images")
"""

GROWTH = """
import os, sys
from pathlib import Path
from segtrain.data.coco.dataset import CocoDataset

def private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

source = CocoDataset(Path(sys.argv[1]), "train")
coco = source.coco
if os.fork() == 0:
    before = private()
    for i in range(len(source)):
        source.image_path(i)
        for region in coco.regions(i):
            coco.polygons(region)
    print(f"a forked worker that reads every outline grows by {(private() - before) / 1e3:.1f} MB")
    os._exit(0)
os.wait()
"""


def benchmark_index(repeats: int) -> None:
    """Open a file like instances_train2017.json for the first time and again."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "coco"
        size = write_large_coco(root)
        print(f"annotation file: {size / 1e6:.0f} MB, {NUM_PEOPLE:,} people")
        environment = {**os.environ, "SEGTRAIN_CACHE": f"{folder}/cache"}
        for repeat in range(repeats + 1):
            result = subprocess.run(
                [sys.executable, "-c", OPEN, root], env=environment, text=True, capture_output=True
            )
            print(
                f"{'first start' if repeat == 0 else 'again'}: {result.stdout.strip()}", flush=True
            )
        cached = sum(path.stat().st_size for path in Path(folder, "cache").iterdir())
        print(f"size of the cache: {cached / 1e6:.0f} MB")
        subprocess.run([sys.executable, "-c", GROWTH, root], env=environment, check=True)


def write_large_coco(root: Path) -> int:
    """Write 118,287 empty images and 860,001 annotations with outlines as long as COCO's."""
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir(parents=True)
    names = [f"{number:012d}.jpg" for number in range(1, NUM_IMAGES + 1)]
    for name in names:
        (root / "train2017" / name).touch()
    images = [
        {"id": n + 1, "file_name": name, "height": 480, "width": 640, "license": 3,
         "coco_url": f"http://images.cocodataset.org/train2017/{name}",
         "date_captured": "2013-11-14 16:28:13"}
        for n, name in enumerate(names)
    ]  # fmt: skip
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    with path.open("w", encoding="utf-8") as file:
        file.write('{"images": ' + json.dumps(images) + ', "annotations": [')
        for number in range(NUM_ANNOTATIONS):
            file.write((", " if number else "") + json.dumps(random_annotation(rng, number)))
        categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
        file.write('], "categories": ' + json.dumps(categories) + "}")
    return path.stat().st_size


def random_annotation(rng: np.random.Generator, number: int) -> dict[str, object]:
    is_person = (
        number * NUM_PEOPLE // NUM_ANNOTATIONS != (number + 1) * NUM_PEOPLE // NUM_ANNOTATIONS
    )
    angles = np.linspace(0, 2 * np.pi, int(rng.integers(8, 40)), endpoint=False)
    radii = rng.uniform(10, 90) * rng.uniform(0.8, 1.2, len(angles))
    x = rng.uniform(100, 540) + radii * np.cos(angles)
    y = rng.uniform(100, 380) + radii * np.sin(angles)
    outline = np.stack([x, y], axis=1).round(2).ravel().tolist()
    return {
        "segmentation": [outline],
        "area": round(float(np.pi * radii.mean() ** 2), 4),
        "iscrowd": 0,
        "image_id": int(rng.integers(1, NUM_IMAGES + 1)),
        "bbox": [round(float(v), 2) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))],
        "category_id": 1 if is_person else 18,
        "id": number + 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["index", "loading", "prepare"])
    parser.add_argument("--data", type=Path, help="root in COCO layout (default: drawn people)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--short-side", type=int, default=320, help="short side of the prepared images"
    )
    arguments = parser.parse_args()
    if arguments.benchmark == "index":
        benchmark_index(arguments.repeats)
        return
    root = (arguments.data or demo_people_root()).resolve()
    if arguments.benchmark == "loading":
        benchmark_loading(root, arguments.repeats, arguments.short_side)
    else:
        benchmark_prepare(root, arguments.repeats)


if __name__ == "__main__":
    main()
