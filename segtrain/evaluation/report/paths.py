"""The files of a report. Imports nothing heavy: existing files are refused before any work."""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError
from segtrain.runtime.files import refuse_existing

PAGE = "index.html"
IMAGES = "images"

AssetKind = Literal["photo", "thumb", "truth", "prediction", "errors"]

_SUFFIXES: dict[AssetKind, str] = {
    "photo": "jpg",
    "thumb": "jpg",
    "truth": "png",
    "prediction": "png",
    "errors": "png",
}
_ASSET = re.compile(r"(\d+)-(photo\.jpg|thumb\.jpg|truth\.png|prediction\.png|errors\.png)")
# Left by a process that was killed while it wrote.
_TEMP_FILE = re.compile(rf"\.{_ASSET.pattern}\.\d+\.tmp")


def image_path(folder: Path, index: int, kind: AssetKind) -> Path:
    """The path of a file of the image `index`. Numbered, because image names can be anything."""
    return folder / IMAGES / f"{index}-{kind}.{_SUFFIXES[kind]}"


def check_report_dir(folder: Path, *, overwrite: bool) -> None:
    """Check that a report may be written to `folder`, before any work.

    Raises:
        UsageError: it is a file, or contains a report and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {folder} is a file", "give a folder")
    files = (folder / PAGE, folder / IMAGES)
    refuse_existing(files, overwrite=overwrite, option="--report")


def remove_stale(folder: Path, indices: Collection[int]) -> None:
    """Remove the files of images that an earlier report had and this one has not.

    Other files in the folder stay.

    Args:
        indices: of the images in this report.
    """
    images = folder / IMAGES
    for path in list(images.iterdir()) if images.is_dir() else []:
        asset = _ASSET.fullmatch(path.name)
        stale = asset is not None and int(asset[1]) not in indices
        if stale or _TEMP_FILE.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
