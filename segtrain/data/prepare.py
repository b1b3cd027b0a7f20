"""`segtrain prepare`: filter and scale a dataset once, into a folder of masks.

Training on the result decodes less than half the pixels of a COCO photo, and needs neither the
annotations nor the disk space of the original.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segtrain import __version__
from segtrain.config.schema import DataConfig
from segtrain.data.datasets import ImageSelection, data_roots, open_selection
from segtrain.data.sample import max_bad_samples
from segtrain.errors import DataError, UsageError
from segtrain.imaging.images import encode_image
from segtrain.runtime.files import atomic_write, write_text
from segtrain.runtime.thread_map import thread_map
from segtrain.types import IGNORE, PERSON

log = logging.getLogger(__name__)

MANIFEST_VERSION = 1
# Visible in an image viewer: ignored pixels are gray.
MASK_VALUES = {"background": 0, "person": 255, "ignore": 128}

_JPEG_QUALITY = 92
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class PrepareResult:
    """Contents of the prepared folder."""

    num_images: dict[str, int]
    """Number of images of each split."""
    num_kept: int
    """Number of these images that an earlier run had written."""
    damaged: list[str]
    """Messages of the damaged images."""
    num_bytes: int


@dataclass(frozen=True)
class _PrepareTask:
    """An image to write."""

    split: str
    index: int
    name: str
    """Name in the split, without suffix."""

    def paths(self, output_dir: Path) -> tuple[Path, Path]:
        """Paths of image and mask."""
        base = output_dir / self.split
        return base / "images" / f"{self.name}.jpg", base / "masks" / f"{self.name}.png"


def prepare(
    config: DataConfig,
    output_dir: Path,
    *,
    short_side: int,
    workers: int,
) -> PrepareResult:
    """Write the selected images of both splits; a second run continues an interrupted one.

    Args:
        config: one root and the selection.
        output_dir: gets train/ and val/, each with images/*.jpg and masks/*.png (0 background, 255
            person, 128 ignored), and manifest.json once all images are written.
        short_side: short side of the written images, pixels; smaller images keep their size.
        workers: threads.

    Raises:
        UsageError: `output_dir` contains other files, or is inside the dataset.
        DataError: the dataset is malformed or more than 1 % of its images are damaged.
        ResourceError: the disk is full or not writable.
    """
    [root] = data_roots(config)
    _check_output_dir(root, output_dir)
    selections = {split: open_selection(config, split) for split in ("train", "val")}
    for split, images in selections.items():
        for note in images.notes:
            log.info(f"{split}: {note}")
        for reason, count in images.skipped.items():
            log.info(f"{split}: {count} skipped, {reason}")
    header = _manifest_header(root, config, short_side, selections)
    _claim_output_dir(output_dir, header)
    tasks = [task for split, images in selections.items() for task in _tasks(split, images)]
    todo = [task for task in tasks if not all(map(_is_complete, task.paths(output_dir)))]
    damaged = _write_all(todo, selections, output_dir, short_side=short_side, workers=workers)
    done = [task for task in tasks if (task.split, task.index) not in damaged]
    _write_manifest(output_dir, header, done, selections)
    return PrepareResult(
        num_images={split: sum(task.split == split for task in done) for split in selections},
        num_kept=len(tasks) - len(todo),
        damaged=list(damaged.values()),
        num_bytes=sum(path.stat().st_size for task in done for path in task.paths(output_dir)),
    )


def _check_output_dir(root: Path, output_dir: Path) -> None:
    if output_dir.resolve().is_relative_to(root):
        raise UsageError(
            f"{output_dir} is inside the dataset, which stays unchanged", "name another folder"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"{output_dir} is a file", "name a new folder")


def _manifest_header(
    root: Path, config: DataConfig, short_side: int, selections: dict[str, ImageSelection]
) -> dict[str, Any]:
    """Collect what the result depends on; a run continues only a folder with the same header."""
    return {
        "version": MANIFEST_VERSION,
        "source": str(root),
        "short_side": short_side,
        "selection": {split: images.manifest for split, images in selections.items()},
        "mask_values": MASK_VALUES,
    }


def _claim_output_dir(output_dir: Path, header: dict[str, Any]) -> None:
    """Write the header to an empty folder, or check that the folder has the same header."""
    for path in (_manifest_path(output_dir), _unfinished_path(output_dir)):
        if not path.is_file():
            continue
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
            is_same = all(existing.get(key) == value for key, value in header.items())
        except (OSError, ValueError, AttributeError):
            is_same = False
        if not is_same:
            raise UsageError(
                f"{path} describes another dataset, selection or size", "name another folder"
            )
        return
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UsageError(
            f"{output_dir} is not empty and was not created by prepare", "name a new folder"
        )
    write_text(_unfinished_path(output_dir), json.dumps(header, indent=1))


def _manifest_path(output_dir: Path) -> Path:
    return output_dir / "manifest.json"


def _unfinished_path(output_dir: Path) -> Path:
    return output_dir / "manifest.unfinished.json"


def _tasks(split: str, images: ImageSelection) -> Iterator[_PrepareTask]:
    names: set[str] = set()
    for index in range(len(images)):
        name = images.name(index)
        if name in names:
            raise DataError(
                f"{images.image_path(index)}: two images have the name {name}", "rename one"
            )
        names.add(name)
        yield _PrepareTask(split, index, name)


def _is_complete(path: Path) -> bool:
    """Whether the whole file reached the disk: a power cut may leave a name without content."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            tail = file.read()
    except OSError:
        return False
    return tail.endswith((_JPEG_END, _PNG_END))


def _write_all(
    tasks: list[_PrepareTask],
    selections: dict[str, ImageSelection],
    output_dir: Path,
    *,
    short_side: int,
    workers: int,
) -> dict[tuple[str, int], str]:
    """Write images and masks; returns the messages of damaged images by (split, index)."""
    damaged: dict[tuple[str, int], str] = {}
    total = sum(map(len, selections.values()))

    def write(task: _PrepareTask) -> str | None:
        try:
            _write(task, selections[task.split], output_dir, short_side)
        except DataError as error:
            return str(error)
        return None

    with _single_threaded_opencv():
        for task, message in thread_map(write, tasks, desc="preparing", workers=workers):
            if message is None:
                continue
            damaged[task.split, task.index] = message
            if len(damaged) > max_bad_samples(total):
                raise DataError(f"{len(damaged)} of {total} images cannot be used, last: {message}")
    return damaged


@contextmanager
def _single_threaded_opencv() -> Iterator[None]:
    """Disable OpenCV's threads, which would compete with the worker threads."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _write(task: _PrepareTask, images: ImageSelection, output_dir: Path, short_side: int) -> None:
    is_larger = int(images.index.sizes[task.index].min()) > short_side
    sample = images.sample(task.index, short_side if is_larger else None)
    image_path, mask_path = task.paths(output_dir)
    values = np.zeros(256, dtype=np.uint8)
    values[PERSON], values[IGNORE] = MASK_VALUES["person"], MASK_VALUES["ignore"]
    for path, pixels in ((mask_path, cv2.LUT(sample.mask, values)), (image_path, sample.image)):
        content = encode_image(np.asarray(pixels, dtype=np.uint8), path, jpeg_quality=_JPEG_QUALITY)
        # Two fsyncs per image would take longer than the image.
        with atomic_write(path, durable=False) as file:
            file.write(content)


def _write_manifest(
    output_dir: Path,
    header: dict[str, Any],
    done: list[_PrepareTask],
    selections: dict[str, ImageSelection],
) -> None:
    """Describe the images, once all of them are on the disk."""
    os.sync()
    rows = {}
    for task in done:
        index = selections[task.split].index
        rows[f"{task.split}/{task.name}"] = {
            "identity": f"{index.identities[task.index]:016x}",
            "num_people": int(index.num_people[task.index]),
            "has_crowd": bool(index.has_crowd[task.index]),
        }
    manifest = {**header, "segtrain": __version__, "images": rows}
    write_text(_manifest_path(output_dir), json.dumps(manifest, indent=1))
    _unfinished_path(output_dir).unlink(missing_ok=True)
