"""Which pictures and videos are meant on the command line."""

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import UsageError
from segtrain.images import find_images
from segtrain.prediction.video.suffixes import VIDEO_SUFFIXES

STDIN = "-"


@dataclass(frozen=True)
class Input:
    """A file, or standard input.

    path: None for standard input. stem: where outputs go below the output folder, without ending.
    """

    path: Path | None
    stem: Path

    @property
    def is_video(self) -> bool:
        return self.path is not None and self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(words: Sequence[str], leave_out: Path | None = None) -> list[Input]:
    """Every picture and video that is meant, once, in the order given.

    Neighbours that differ only in their extension, 1.jpg and 1.png, get the stems 1_jpg and 1_png.

    Args:
        words: files, folders (their pictures down to the bottom, videos not), glob patterns, and
            "-" for standard input.
        leave_out: a folder whose pictures are left out of the folders that contain it: the results
            of an earlier run.

    Raises:
        UsageError: a word means nothing.
    """
    found: dict[Path | None, Path] = {}
    for word in words:
        for path, relative in _meant_by(word, leave_out):
            found.setdefault(path, relative)
    twins = Counter(path.with_suffix("") for path in found if path is not None)
    inputs = []
    for path, relative in found.items():
        stem = relative
        if path is not None:
            stem = relative.with_suffix("")
            if twins[path.with_suffix("")] > 1:
                stem = stem.with_name(f"{stem.name}_{path.suffix[1:]}")
        inputs.append(Input(path, stem))
    return inputs


def _meant_by(word: str, leave_out: Path | None) -> list[tuple[Path | None, Path]]:
    """Each file with its path relative to what was named."""
    if word == STDIN:
        return [(None, Path("stdin"))]
    path = Path(word)
    if path.is_dir():
        pictures = [file for file in find_images(path) if not _is_result(file, path, leave_out)]
        if not pictures:
            raise UsageError(f"there are no pictures in the folder {path}")
        return [(file, file.relative_to(path)) for file in pictures]
    if path.exists():
        return [(path, Path(path.name))]
    # Path.glob takes no absolute pattern.
    matches = [Path(match) for match in sorted(glob.glob(word, recursive=True))]  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if not files:
        raise UsageError(f"{word} is no file, no folder, and matches nothing")
    return [(file, Path(file.name)) for file in files]


def _is_result(file: Path, folder: Path, leave_out: Path | None) -> bool:
    if leave_out is None or leave_out.resolve() == folder.resolve():
        return False
    return file.resolve().is_relative_to(leave_out.resolve())
