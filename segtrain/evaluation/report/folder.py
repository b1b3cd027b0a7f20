"""The files of a report. Imports nothing heavy: whether there is room is asked before any work."""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError

PAGE = "index.html"
PICTURES = "pictures"

Kind = Literal["photo", "thumb", "truth", "prediction", "errors"]

_SUFFIXES: dict[Kind, str] = {
    "photo": "jpg",
    "thumb": "jpg",
    "truth": "png",
    "prediction": "png",
    "errors": "png",
}
_OURS = re.compile(r"(\d+)-(photo\.jpg|thumb\.jpg|truth\.png|prediction\.png|errors\.png)")
_LEFT_BY_A_KILL = re.compile(rf"\.{_OURS.pattern}\.\d+\.tmp")


def picture_path(folder: Path, index: int, kind: Kind) -> Path:
    """Where a file of the picture `index` lies: by number, for a name may be anything."""
    return folder / PICTURES / f"{index}-{kind}.{_SUFFIXES[kind]}"


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """See that a report may be written to `folder`; nothing is made or removed yet.

    Raises:
        UsageError: it is no folder, or a report is there and nobody allowed to replace it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {folder} is a file; name a folder")
    for path in (folder / PAGE, folder / PICTURES):
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; give --overwrite or another --report")


def remove_stale(folder: Path, wanted: Collection[int]) -> None:
    """Remove what an earlier report left of pictures that this one has not.

    Only what a report writes goes; whatever else lies there stays.

    Args:
        wanted: the indices of the pictures that stay.
    """
    pictures = folder / PICTURES
    for path in list(pictures.iterdir()) if pictures.is_dir() else []:
        ours = _OURS.fullmatch(path.name)
        stale = ours is not None and int(ours[1]) not in wanted
        if stale or _LEFT_BY_A_KILL.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
