"""Writing a file so that a kill or a full disk leaves either the old one or the new one, whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from segtrain.errors import ResourceError


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; when the block ends well it takes `path`'s place.

    The bytes are on the disk before the name is: flushed, synced, then renamed. If the block
    raises, the temporary file goes and what stood at `path` before is untouched.

    Args:
        durable: False leaves it to the system when the bytes reach the disk: after a power cut the
            file may be empty. For thousands of files, whose writer syncs once and checks them.

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
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(
            f"cannot write {path}: {reason}; free some space or choose another folder"
        ) from error
    finally:
        # Where the folder is missing or a file there is nothing to remove and nothing to add.
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content`, whole or not at all. Raises ResourceError."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises ResourceError."""
    write_bytes(path, text.encode())
