"""`segtrain prepare`: a data set filtered and scaled once, as an ordinary folder of masks.

Training from it decodes less than half the pixels of a COCO photo, and needs neither its
annotations nor its disk space.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segtrain import __version__
from segtrain.classes import IGNORE, PERSON
from segtrain.config import DataConfig
from segtrain.data import Pictures, data_roots, open_pictures
from segtrain.data.sample import tolerated
from segtrain.data.threads import in_threads
from segtrain.errors import DataError, UsageError
from segtrain.files import atomic_write, write_text
from segtrain.images import encode_image

MANIFEST_VERSION = 1
# Masks that people can look at: what is ignored is gray.
MASK_VALUES = {"background": 0, "person": 255, "ignore": 128}

_JPEG_QUALITY = 92
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Prepared:
    """What lies in the folder now."""

    num_pictures: dict[str, int]
    """Pictures of each split."""
    num_kept: int
    """Of these, those that an earlier run had written."""
    damaged: list[str]
    num_bytes: int


@dataclass(frozen=True)
class _Task:
    """One picture to write."""

    split: str
    index: int
    name: str
    """Its place in the split, without suffix."""

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Where picture and mask go."""
        base = folder / self.split
        return base / "images" / f"{self.name}.jpg", base / "masks" / f"{self.name}.png"


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    short_side: int,
    workers: int,
    tell: Callable[[str], object],
) -> Prepared:
    """Write the selected pictures of both splits into `folder`; run again, it goes on.

    Args:
        config: names one root and the selection.
        folder: gets train/ and val/, each with images/*.jpg and masks/*.png (0 background, 255
            person, 128 ignored), and manifest.json once everything is there.
        short_side: of the pictures written, pixels; smaller ones stay as they are.
        workers: threads.
        tell: takes a line for the user.

    Raises:
        UsageError: `folder` holds something else, or lies in the data set.
        DataError: the data set is malformed or more than 1 % of its pictures are damaged.
        ResourceError: the disk is full or not writable.
    """
    [root] = data_roots(config)
    _check_place(root, folder)
    sources = {split: open_pictures(config, split) for split in ("train", "val")}
    for split, source in sources.items():
        for line in [*source.notes, *(f"{n} left out, {why}" for why, n in source.skipped.items())]:
            tell(f"{split}: {line}")
    head = _head(root, config, short_side, sources)
    _begin(folder, head)
    tasks = [task for split, source in sources.items() for task in _tasks(split, source)]
    todo = [task for task in tasks if not all(map(_is_whole, task.files(folder)))]
    damaged = _write_all(todo, sources, folder, short_side=short_side, workers=workers)
    done = [task for task in tasks if (task.split, task.index) not in damaged]
    _finish(folder, head, done, sources)
    return Prepared(
        num_pictures={split: sum(task.split == split for task in done) for split in sources},
        num_kept=len(tasks) - len(todo),
        damaged=list(damaged.values()),
        num_bytes=sum(path.stat().st_size for task in done for path in task.files(folder)),
    )


def _check_place(root: Path, folder: Path) -> None:
    if folder.resolve().is_relative_to(root):
        raise UsageError(
            f"{folder} lies in the data set, which stays as it is; name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a new folder")


def _head(
    root: Path, config: DataConfig, short_side: int, sources: dict[str, Pictures]
) -> dict[str, Any]:
    """What the result depends on; a folder begun under another head is not gone on with."""
    return {
        "version": MANIFEST_VERSION,
        "source": str(root),
        "short_side": short_side,
        "selection": {split: source.manifest for split, source in sources.items()},
        "mask_values": MASK_VALUES,
    }


def _begin(folder: Path, head: dict[str, Any]) -> None:
    """Leave a note of what is being prepared here, or check that it is the same."""
    for path in (_manifest(folder), _unfinished(folder)):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = all(found.get(key) == value for key, value in head.items())
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            raise UsageError(
                f"{path} is of another data set, selection or size; name another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty and was not begun by prepare; name a new folder")
    write_text(_unfinished(folder), json.dumps(head, indent=1))


def _manifest(folder: Path) -> Path:
    return folder / "manifest.json"


def _unfinished(folder: Path) -> Path:
    return folder / "manifest.unfinished.json"


def _tasks(split: str, source: Pictures) -> Iterator[_Task]:
    names: set[str] = set()
    for index in range(len(source)):
        name = source.stem(index)
        if name in names:
            raise DataError(
                f"{source.picture_path(index)}: two pictures are called {name}; rename one"
            )
        names.add(name)
        yield _Task(split, index, name)


def _is_whole(path: Path) -> bool:
    """Whether a file written here reached the disk: after a power cut a name may come without."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            tail = file.read()
    except OSError:
        return False
    return tail.endswith((_JPEG_END, _PNG_END))


def _write_all(
    tasks: list[_Task],
    sources: dict[str, Pictures],
    folder: Path,
    *,
    short_side: int,
    workers: int,
) -> dict[tuple[str, int], str]:
    """Write pictures and masks; returns the damaged pictures with their messages."""
    damaged: dict[tuple[str, int], str] = {}
    total = sum(map(len, sources.values()))

    def write(task: _Task) -> str | None:
        try:
            _write(task, sources[task.split], folder, short_side)
        except DataError as error:
            return str(error)
        return None

    with _one_thread_each():
        for task, problem in in_threads(write, tasks, desc="preparing", workers=workers):
            if problem is None:
                continue
            damaged[task.split, task.index] = problem
            if len(damaged) > tolerated(total):
                raise DataError(
                    f"{len(damaged)} of {total} pictures cannot be used, last: {problem}"
                )
    return damaged


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenCV's own threads would only get in the way of ours."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _write(task: _Task, source: Pictures, folder: Path, short_side: int) -> None:
    shrink = int(source.catalog.sizes[task.index].min()) > short_side
    sample = source.sample(task.index, short_side if shrink else None)
    picture, mask = task.files(folder)
    values = np.zeros(256, dtype=np.uint8)
    values[PERSON], values[IGNORE] = MASK_VALUES["person"], MASK_VALUES["ignore"]
    for path, pixels in ((mask, cv2.LUT(sample.mask, values)), (picture, sample.image)):
        content = encode_image(np.asarray(pixels, dtype=np.uint8), path, jpeg_quality=_JPEG_QUALITY)
        # Two syncs a picture would take longer than the picture.
        with atomic_write(path, durable=False) as file:
            file.write(content)


def _finish(
    folder: Path, head: dict[str, Any], done: list[_Task], sources: dict[str, Pictures]
) -> None:
    """Once all pictures are on the disk, say what they are."""
    os.sync()
    pictures = {}
    for task in done:
        catalog = sources[task.split].catalog
        pictures[f"{task.split}/{task.name}"] = {
            "identity": f"{catalog.identities[task.index]:016x}",
            "num_people": int(catalog.num_people[task.index]),
            "has_crowd": bool(catalog.has_crowd[task.index]),
        }
    manifest = {**head, "segtrain": __version__, "pictures": pictures}
    write_text(_manifest(folder), json.dumps(manifest, indent=1))
    _unfinished(folder).unlink(missing_ok=True)
