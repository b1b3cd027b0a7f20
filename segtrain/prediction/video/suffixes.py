"""What counts as a video, and what its result is called."""

from segtrain.prediction.backgrounds import TRANSPARENT

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv"),
        *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".mxf"),
    }
)


def video_suffix_of(background: str) -> str:
    """What is added to the name of a clip without its suffix; .webm is the one with alpha."""
    return "_cutout.webm" if background == TRANSPARENT else "_background.mp4"
