"""Atomic file writes: a kill or a full disk leaves either the old file or the new one, complete."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segtrain.errors import ResourceError, UsageError


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = True, backup: Path | None = None, needs: int | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that replaces `path` when the block succeeds.

    The file is flushed, synced, then renamed, so that its bytes are on the disk before its name is.
    If the block raises, the temporary file is removed and `path` is untouched.

    Args:
        durable: False skips the sync: after a power cut the file may be empty. For writers of
            thousands of files, which sync once and verify them.
        backup: the previous file at `path` is moved here; at every moment one of the two exists.
        needs: number of bytes that will be written, for the message when the disk is full.

    Raises:
        ResourceError: the folder cannot be created or written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if backup is not None and path.exists():
            _back_up(path, backup)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        space = f"{needs / 1e6:.1f} MB" if needs is not None else "some space"
        raise ResourceError(
            f"cannot write {path}: {reason}", f"free {space} or choose another folder"
        ) from error
    finally:
        # If the folder is missing, or one of its parents is a file, there is nothing to remove.
        with suppress(OSError):
            temporary.unlink()


def _back_up(path: Path, backup: Path) -> None:
    """Give the file at `path` a second name, `backup`, replacing an older backup."""
    link = backup.with_name(f".{backup.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(path)
    except OSError:
        path.replace(backup)  # no hard links here: for a moment only the backup exists
    else:
        link.replace(backup)
        # rename() does nothing if both names are already the same file, after a kill at this point.
        link.unlink(missing_ok=True)


def remove_temp_files(folder: Path) -> int:
    """Remove the temporary files that killed writers left in `folder`; return their number."""
    leftovers = [path for path in folder.rglob(".*.tmp") if path.is_file() or path.is_symlink()]
    for path in leftovers:
        with suppress(OSError):
            path.unlink()
    return len(leftovers)


def remove_temp_files_beside(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left.

    For the user's own folders, where other files may be being written; `remove_temp_files` is for
    folders that belong to one process.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    for other in path.parent.glob(".*.tmp"):
        if leftover.fullmatch(other.name):
            with suppress(OSError):
                other.unlink()


def refuse_existing(paths: Iterable[Path], *, overwrite: bool, option: str) -> None:
    """Raise UsageError if one of `paths` exists and `overwrite` is false.

    Args:
        option: the option that names another place, e.g. --output.
    """
    for path in paths:
        # exists() is false for a dangling link, which would be replaced as well.
        if not overwrite and (path.exists() or path.is_symlink()):
            raise UsageError(f"{path} exists", f"use --overwrite or another {option}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically. Raises ResourceError."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8. Raises ResourceError."""
    write_bytes(path, text.encode())
