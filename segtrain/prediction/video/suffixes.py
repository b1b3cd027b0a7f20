"""What counts as a video, and what its result is called. Imports nothing heavy."""

from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv"),
        *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".mxf"),
    }
)
TRANSPARENT = "transparent"


def target_of(source: Path, output_dir: Path, background: str) -> Path:
    """Where the result of a clip goes: clip_background.mp4, or clip_cutout.webm with alpha."""
    ending = "_cutout.webm" if background == TRANSPARENT else "_background.mp4"
    return output_dir / (source.stem + ending)
