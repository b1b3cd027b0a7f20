"""People of a video on a new background, with the same frames, timestamps and audio."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segtrain.errors import UsageError
from segtrain.runtime.files import refuse_existing
from segtrain.runtime.optional_imports import require

if TYPE_CHECKING:
    from segtrain.inference.backend import Backend
    from segtrain.prediction.backgrounds import BackgroundFn


@dataclass(frozen=True)
class VideoStats:
    """Statistics of a processed video.

    Attributes:
        num_frames: number of frames.
        seconds: from the first frame to the end of the last.
        person_fraction: fraction of person pixels, averaged over the frames.
    """

    num_frames: int
    seconds: float
    person_fraction: float


def predict_video(
    source: Path,
    target: Path,
    backend: "Backend",
    *,
    make_background: "BackgroundFn",
    overwrite: bool,
) -> VideoStats:
    """Put the people of a video on a new background, frame by frame, in constant memory.

    Args:
        source: a video in any format that libav reads.
        target: .mp4, or .webm for a transparent background. It is written completely or not at
            all.
        backend: the network.
        make_background: from `segtrain.prediction.backgrounds.build_background_fn`; called for
            each frame.
        overwrite: allow a target that exists. The source is never overwritten.

    Raises:
        UsageError: PyAV is missing, or the target exists or is the source.
        DataError: the source is not a video, is damaged, truncated or too large.
        ResourceError: the target cannot be written.
        Stopped: a signal was received; no partial output remains.
    """
    require("av", "video")
    if target.resolve() == source.resolve():
        raise UsageError(f"{target} is also the input", "choose another --output")
    refuse_existing([target], overwrite=overwrite, option="--output")
    from segtrain.prediction.video.run import convert

    return convert(source, target, backend, make_background=make_background)
