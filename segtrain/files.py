"""Writing a file so that a kill or a full disk leaves either the old one or the new one, whole."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segtrain.errors import ResourceError


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = True, keep_as: Path | None = None, needs: int | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends well it takes `path`'s place.

    The bytes are on the disk before the name is: flushed, synced, then renamed. If the block
    raises, the temporary file goes and what stood at `path` before is untouched.

    Args:
        durable: False leaves it to the system when the bytes reach the disk: after a power cut the
            file may be empty. For thousands of files, whose writer syncs once and checks them.
        keep_as: what stood at `path` before goes here; at every moment one of the two is there.
        needs: bytes that will be written, for the message when there is no room.

    Raises:
        ResourceError: the folder cannot be made or written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _keep(path, keep_as)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        room = f" {needs / 1e6:.1f} MB" if needs is not None else " some space"
        raise ResourceError(
            f"cannot write {path}: {reason}; free{room} or choose another folder"
        ) from error
    finally:
        # Where the folder is missing or a file there is nothing to remove and nothing to add.
        with suppress(OSError):
            temporary.unlink()


def _keep(path: Path, keep_as: Path) -> None:
    """Give a file a second name, in the place of whoever had that name."""
    link = keep_as.with_name(f".{keep_as.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(path)
    except OSError:
        path.replace(keep_as)  # a file system without links: for a moment only this name is there
    else:
        link.replace(keep_as)
        # Where both are names of one file already (a kill came right here), nothing was renamed.
        link.unlink(missing_ok=True)


def sweep(folder: Path) -> int:
    """Remove the temporary files that killed writers left in `folder`; returns how many."""
    left = [path for path in folder.rglob(".*.tmp") if path.is_file() or path.is_symlink()]
    for path in left:
        with suppress(OSError):
            path.unlink()
    return len(left)


def sweep_beside(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left.

    In a folder of the user's, where others may be being written, as opposed to `sweep`.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    for other in path.parent.glob(".*.tmp"):
        if left.fullmatch(other.name):
            with suppress(OSError):
                other.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, whole or not at all. Raises ResourceError."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises ResourceError."""
    write_bytes(path, text.encode())
